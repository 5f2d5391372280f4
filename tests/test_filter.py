"""The filter: a variant that keeps the better part of what its method drew."""

import dataclasses

import numpy as np
import pytest

from defectlib import evaluation, export, judges, leaks, profiles, sampling, stages, study
from defectlib.metrics import features, nearest
from defectlib.report import explorer, scores

NAME = "crop_paste_filtered"


def seeds(s, name, defect):
    return [item.seed for item in sampling.load(s.folder(name, 0).path, defect)]


def test_the_better_half_by_distance_is_kept_as_it_was_drawn(tiny_parameters):
    s = study.open_category(tiny_parameters)
    record = stages.sample(s, NAME, 0)
    assert stages.sample(s, NAME, 0) == record and not s.folder(NAME, 0).stage_file("fit").exists()
    for defect in s.defects:
        drawn = sampling.load(s.folder("crop_paste", 0).path, defect)
        shots = [shot for shot in s.shots(0) if shot.defect == defect]
        ranked = nearest.nearest_shots(drawn, shots, features.load("tiny"))
        nearer = {drawn[i].seed for i in ranked["sample"].iloc[len(drawn) // 2 :]}
        assert set(seeds(s, NAME, defect)) == nearer and len(nearer) == s.n_per_defect(NAME) == 2
        for seed in nearer:
            for one, other in zip(*(sampling.read_pair(s.folder(m, 0).path, seed) for m in (NAME, "crop_paste"))):
                assert (one == other).all()
        told = next(m for m in record["metrics"] if (m["defect"], m["metric"]) == (defect, "samples_kept"))
        assert told["value"] == 2 and told["protocol"]["n_generated"] == 4
        assert told["protocol"]["mean_of_kept"] > told["protocol"]["mean_of_all"]


def test_what_is_kept_is_measured_and_learned_from_like_any_run(tiny_parameters):
    s = study.open_category(tiny_parameters)
    rows = {m["metric"]: m for m in stages.quality(s, NAME, 0)["metrics"]}
    assert rows["tiny-lpips"]["protocol"]["n_generated"] == 2
    scores = {m["metric"]: m for m in evaluation.downstream(s, NAME, 0)["metrics"]}
    assert scores["pixel_ap"]["protocol"]["n_generated"] == 2 * len(s.defects)


def test_flawed_samples_go_first_and_by_mask_the_rest(tiny_parameters, monkeypatch):
    """Three of four are kept: the flawed one is left out though the localiser agrees with it most."""
    variant = profiles.Variant(of="crop_paste", keep=profiles.Keep(share=0.75, by="mask_seen"))
    profile = profiles.load("smoke").model_copy(update={"variants": {NAME: variant}})
    monkeypatch.setattr(profiles, "load", lambda name: profile)
    s = study.open_category(tiny_parameters)
    stages.sample(s, "crop_paste", 0)
    first = {defect: seeds(s, "crop_paste", defect)[0] for defect in s.defects}
    monkeypatch.setattr(sampling, "problems", lambda report: report[report["seed"].isin(list(first.values()))])
    monkeypatch.setattr(judges, "seen", lambda s, seed, images, masks: list(np.linspace(1, 0.7, len(images))))
    stages.sample(s, NAME, 0)
    for defect in s.defects:
        assert seeds(s, NAME, defect) == seeds(s, "crop_paste", defect)[1:]


def test_a_filter_changes_nothing_else():
    keep = {"share": 0.5, "by": "mask_seen"}
    with pytest.raises(ValueError, match="a variant with it changes nothing else"):
        profiles.Variant(of="crop_paste", keep=keep, mask_source="perlin")
    with pytest.raises(ValueError, match="changes nothing else"):
        profiles.Variant(of="crop_paste", keep=keep, shots={"most": 2})
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share"):
            profiles.Keep(share=share, by="mask_seen")


def test_a_filter_of_another_share_takes_the_place_of_the_first(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    stages.sample(s, NAME, 0)
    variant = profiles.Variant(of="crop_paste", keep=profiles.Keep(share=0.25, by="nearest_shot"))
    profile = profiles.load("smoke").model_copy(update={"variants": {NAME: variant}})
    monkeypatch.setattr(profiles, "load", lambda name: profile)
    s = study.open_category(tiny_parameters)
    stages.sample(s, NAME, 0)
    assert {len(seeds(s, NAME, defect)) for defect in s.defects} == {1}
    images = s.folder(NAME, 0).path / "images"
    assert len(list(images.iterdir())) == len(s.defects), "what the first filter kept was moved aside"


def test_a_variant_that_drew_and_now_filters_leaves_nothing_of_what_it_drew(tiny_parameters, monkeypatch):
    variants = [
        profiles.Variant(of="crop_paste", config={"flip": False}),
        profiles.Variant(of="crop_paste", keep=profiles.Keep(share=0.5, by="nearest_shot")),
    ]
    for variant in [*variants, variants[0]]:
        profile = profiles.load("smoke").model_copy(update={"variants": {NAME: variant}})
        monkeypatch.setattr(profiles, "load", lambda name, profile=profile: profile)
        s = study.open_category(tiny_parameters)
        stages.sample(s, NAME, 0)
        drawn = sampling.load(s.folder(NAME, 0).path)
        images = s.folder(NAME, 0).path / "images"
        assert len(list(images.iterdir())) == len(drawn) == len(s.defects) * s.n_per_defect(NAME)
        monkeypatch.undo()


def test_other_tools_take_what_was_kept_for_a_run_like_any(tiny_parameters, tmp_path):
    s = study.open_category(tiny_parameters)
    stages.sample(s, NAME, 0)
    table = export.export(tiny_parameters, NAME, 0, tmp_path / "out")
    assert table["written"].sum() == 2 * len(s.defects)
    assert not leaks.spoils(leaks.of_run(s.folder(NAME, 0).path)[0])
    assert (s.category, NAME, 0) in explorer.drawn_runs(s)
    assert len(scores.scores(s, NAME, 0, s.defects[0])) == 2


def test_the_key_of_a_filter_holds_what_it_ranks_by(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    first = stages.sample(s, NAME, 0)["key"]
    monkeypatch.setattr(stages, "_worth", lambda s, seed, drawn, by: np.zeros(len(drawn)))
    quality = s.settings.quality.model_copy(update={"extractor": "inception"})
    localiser = s.settings.downstream.localiser.model_copy(update={"steps": 3})
    downstream = s.settings.downstream.model_copy(update={"localiser": localiser})
    for change, asked in (({"quality": quality}, True), ({"downstream": downstream}, False)):
        other = dataclasses.replace(s, settings=s.settings.model_copy(update=change))
        assert (stages.keep(other, NAME, 0)["key"] != first) == asked, "by distance the localiser is not asked"
        assert stages.keep(s, NAME, 0)["key"] == first
