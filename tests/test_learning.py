import dataclasses

import pytest
import torch

from defectlib import evaluation, learning, profiles, sampling, study

CURVE = profiles.CurveSettings(samples=[2, 3, 9], shots=[1], tasks=["localisation", "classification"])


@pytest.fixture
def s(tiny_parameters):
    """A tiny category with a curve of its own; four samples of each defect are drawn."""
    s = study.open_category(tiny_parameters)
    downstream = s.settings.downstream.model_copy(update={"curve": CURVE})
    return dataclasses.replace(s, settings=s.settings.model_copy(update={"downstream": downstream}))


def test_curves_are_of_the_seeds_that_the_profile_names(s):
    """A job of one seed on a cluster draws none of another's."""

    def seeds(asked, own):
        curve = s.settings.downstream.model_copy(update={"curve": CURVE.model_copy(update={"seeds": asked})})
        settings = s.settings.model_copy(update={"downstream": curve})
        return learning.seeds(dataclasses.replace(s, settings=settings, seeds=own))

    assert seeds(None, (0, 1, 2)) == (0, 1, 2) and seeds([0], (0, 1, 2)) == (0,) and seeds([0], (1,)) == ()


def points(record, metric):
    return {m["protocol"]["n"]: m for m in record["metrics"] if m["metric"] == metric}


def test_points_are_nested_equally_long_and_end_at_the_downstream_scores(s, monkeypatch):
    whole = {m: evaluation.downstream(s, m, 0) for m in (study.SHOTS_ONLY, "crop_paste")}
    given, real = [], evaluation.models.train_localiser
    monkeypatch.setattr(evaluation.models, "train_localiser", lambda *a: (given.append(a), real(*a))[1])
    record = learning.curve(s, "crop_paste", 0)
    most = max(sum(shot.defect == d for shot in s.shots(0)) for d in s.defects)
    for metric, task in (("pixel_ap", "localisation"), ("accuracy", "classification")):
        by_n, by_shots = points(record, f"{metric}_by_samples"), points(record, f"{metric}_by_shots")
        assert list(by_n) == [0, 2, 3, 4] and list(by_shots) == [1, most], "nine are not drawn"
        own = [learning._score(whole[m], task)["value"] for m in (study.SHOTS_ONLY, "crop_paste")]
        assert [by_n[0]["value"], by_n[4]["value"], by_shots[most]["value"]] == [*own, own[1]]
        assert {m["protocol"]["optimiser_steps"] for m in [*by_n.values(), *by_shots.values()]} == {2}
    assert [len(a[0]) for a in given] == [4, 6, 8], "two and three of each defect; four of each from one shot"
    drawn = sampling.load(s.folder("crop_paste", 0).path)
    assert all(any(torch.equal(image, item.image) for item in drawn) for image in given[1][0])
    assert all(any(torch.equal(image, more) for more in given[1][0]) for image in given[0][0]), "nested"


def test_over_shots_the_method_is_fitted_on_the_first_of_each_defect(s):
    few = learning.first(s.shots(0), dict.fromkeys(s.defects, 1))
    assert [shot.defect for shot in few] == list(s.defects) and few[0].id == s.shots(0)[0].id
    assert len(learning.first(s.shots(0), {})) == len(s.shots(0))
    whole = learning._drawn_from(s, "crop_paste", s.shots(0), 0)
    evaluation.sample(s, "crop_paste", 0)
    kept = sampling.load(s.folder("crop_paste", 0).path)
    assert all(torch.equal(a.image, b.image) for a, b in zip(whole, kept, strict=True)), "as a run draws"
    fewer = learning._drawn_from(s, "crop_paste", few, 0)
    assert [item.seed for item in fewer] == [item.seed for item in kept]
    assert not all(torch.equal(a.image, b.image) for a, b in zip(fewer, kept, strict=True))


def test_a_killed_curve_goes_on_where_it_stopped(s, monkeypatch):
    evaluation.downstream(s, "crop_paste", 0)
    real, calls = learning.evaluation.train_classifier, []

    def dies(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    evaluation.downstream(s, study.SHOTS_ONLY, 0)
    monkeypatch.setattr(learning.evaluation, "train_classifier", dies)
    with pytest.raises(KeyboardInterrupt):
        learning.curve(s, "crop_paste", 0)
    folder = s.folder("crop_paste", 0)
    assert not folder.stage_file("learning_curve").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in (folder.path / "curve").iterdir()}
    assert "localisation_samples_3.json" in kept and "classification_samples_2.json" in kept
    record = learning.curve(s, "crop_paste", 0)
    assert {n: (folder.path / "curve" / n).stat().st_mtime_ns for n in kept} == kept, "not trained again"
    monkeypatch.setattr(learning, "_trained_point", None)
    assert learning.curve(s, "crop_paste", 0) == record, "read, not repeated"


def test_other_points_set_the_old_curve_aside(s):
    learning.curve(s, study.SHOTS_ONLY, 0)
    folder = s.folder(study.SHOTS_ONLY, 0)
    assert points(folder.record("learning_curve"), "pixel_ap_by_shots").keys() == {1, 2}
    fewer = s.settings.downstream.model_copy(update={"curve": CURVE.model_copy(update={"tasks": ["localisation"]})})
    learning.curve(
        dataclasses.replace(s, settings=s.settings.model_copy(update={"downstream": fewer})), "shots_only", 0
    )
    assert [f.name for f in (folder.path / "curve").iterdir()] == ["localisation_shots_1.json"]
    assert folder.stage_file("downstream").exists() and list((folder.path / "superseded").glob("*/curve"))


def test_the_shots_alone_are_trained_as_long_where_a_profile_counts_epochs(s, monkeypatch):
    epochs = s.settings.downstream.localiser.model_copy(update={"epochs": 3, "steps": None, "batch_size": 2})
    only = s.settings.downstream.model_copy(
        update={"localiser": epochs, "curve": profiles.CurveSettings(tasks=["localisation"])}
    )
    s = dataclasses.replace(s, settings=s.settings.model_copy(update={"downstream": only}))
    by_n = points(learning.curve(s, "crop_paste", 0), "pixel_ap_by_samples")
    steps = {n: m["protocol"]["optimiser_steps"] for n, m in by_n.items()}
    assert steps == {0: 12, 4: 12}, "3 epochs of 8 samples in batches of 2"
    assert by_n[0]["protocol"]["n_train_real"] == len(s.shots(0))
