import shutil
from collections import Counter

import pandas as pd
import pytest
import torch

from defectlib import evaluation, images, prepare, sampling, stages, study
from defectlib.masks import sources
from defectlib.masks.interpolation import NoMask


def test_stages_make_what_they_lack_once(tiny_parameters):
    s = study.open_category(tiny_parameters)
    record = stages.quality(s, "crop_paste", 0)
    folder = s.folder("crop_paste", 0)
    times = {stage: folder.stage_file(stage).stat().st_mtime_ns for stage in ("fit", "sample", "quality")}
    assert stages.quality(s, "crop_paste", 0) == record
    assert {stage: folder.stage_file(stage).stat().st_mtime_ns for stage in times} == times, "read, not repeated"
    names = {m["metric"] for m in record["metrics"]}
    assert {"tiny-kid", "tiny-is", "tiny-lpips", "tiny-ic-lpips"} <= names
    assert {m["defect"] for m in record["metrics"]} == set(s.defects)


def test_variants_draw_with_the_fit_of_their_method(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters.model_copy(update={"methods": ["crop_paste"]}))
    assert set(s.variants) == {
        f"crop_paste_{name}" for name in ("no_turns", "anywhere", "feather", "two_shots", "filtered")
    }
    stages.sample(s, "crop_paste", 0)
    record = stages.sample(s, "crop_paste_feather", 0)
    assert record["inputs"]["fit"] == s.folder("crop_paste", 0).record("fit")["key"]
    assert not s.folder("crop_paste_feather", 0).stage_file("fit").exists()
    assert s.load("crop_paste_feather", 0).config.feather == 2.0
    drawn = [sampling.load(s.folder(name, 0).path) for name in ("crop_paste", "crop_paste_feather")]
    assert all(torch.equal(a.mask, b.mask) and not torch.equal(a.image, b.image) for a, b in zip(*drawn))
    assert "crop_paste_feather" in set(study.results(s.parameters, [s.category])["method"])


def test_other_sampling_parameters_keep_the_fit_and_set_the_old_samples_aside(tiny_parameters):
    s = study.open_category(tiny_parameters)
    stages.sample(s, "crop_paste", 0)
    fit = s.folder("crop_paste", 0).stage_file("fit").stat().st_mtime_ns
    more = study.open_category(tiny_parameters.model_copy(update={"prompts": {s.defects[0]: "another text"}}))
    stages.sample(more, "crop_paste", 0)
    folder = more.folder("crop_paste", 0)
    assert folder.stage_file("fit").stat().st_mtime_ns == fit
    (aside,) = (folder.path / "superseded").iterdir()
    assert (aside / "samples.csv").exists() and (aside / "images").is_dir()


def test_a_killed_drawing_continues_to_the_same_set(tiny_parameters, tmp_path, monkeypatch):
    s = study.open_category(tiny_parameters)
    written = images.write_mask
    count = iter(range(100))

    def dies(*arguments):
        if next(count) == 5:
            raise KeyboardInterrupt
        written(*arguments)

    monkeypatch.setattr(images, "write_mask", dies)
    with pytest.raises(KeyboardInterrupt):
        stages.sample(s, "crop_paste", 0)
    monkeypatch.setattr(images, "write_mask", written)
    folder = s.folder("crop_paste", 0)
    assert not folder.stage_file("sample").exists()
    before = {f: f.stat().st_mtime_ns for f in sorted((folder.path / "masks").glob("*.png"))[:4]}
    (speed,) = (m for m in stages.sample(s, "crop_paste", 0)["metrics"] if m["metric"] == "pairs_per_second")
    assert speed["value"] is None and speed["protocol"]["why_withheld"] == "drawn in more than one go"
    assert {f: f.stat().st_mtime_ns for f in before} == before, "complete groups are kept"
    other = study.open_category(tiny_parameters.model_copy(update={"runs_root": str(tmp_path / "undisturbed")}))
    (speed,) = (m for m in stages.sample(other, "crop_paste", 0)["metrics"] if m["metric"] == "pairs_per_second")
    assert speed["value"] > 0 and "why_withheld" not in speed["protocol"]
    whole = other.folder("crop_paste", 0).path
    for file in sorted(whole.rglob("*.png")) + [whole / "samples.csv"]:
        assert (folder.path / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_the_split_is_made_once_and_again_when_the_data_changed(tiny_parameters, tiny_mini, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(tiny_mini, root)
    asked = tiny_parameters.model_copy(update={"data_root": str(root)})
    first = prepare.manifest(asked)
    file = asked.dataset_folder() / "split_p0.csv"
    stamp = file.stat().st_mtime_ns
    assert prepare.manifest(asked).equals(first) and file.stat().st_mtime_ns == stamp
    s = study.open_category(asked)
    removed = root / first[(first["side"] == "test") & (first["defect"] == s.defects[0])].iloc[-1]["image"]
    removed.unlink()
    for mask in root.glob(f"{s.category}/ground_truth/{s.defects[0]}/{removed.stem}*"):
        mask.unlink()
    assert len(prepare.manifest(asked)) == len(first) - 1


def test_a_second_data_root_does_not_replace_the_runs_of_the_first(tiny_parameters, tiny_mini, tmp_path):
    prepare.manifest(tiny_parameters)
    mark = tiny_parameters.dataset_folder() / "split_p0.json"
    before = mark.read_bytes()
    category = sorted(tiny_mini.iterdir())[0]
    for other in (tmp_path / "other", category):
        if other != category:
            shutil.copytree(category, other / "part")
        asked = tiny_parameters.model_copy(update={"data_root": str(other)})
        with pytest.raises(ValueError, match=f"smoke/mini holds the runs on {tiny_mini}, .* DEFECTLIB_RUNS=/path"):
            prepare.manifest(asked)
        assert mark.read_bytes() == before
    moved = tmp_path / "moved"
    shutil.copytree(tiny_mini, moved)
    assert len(prepare.manifest(tiny_parameters.model_copy(update={"data_root": str(moved)})))


def test_a_defect_without_a_mask_is_withheld_and_the_others_are_drawn(tiny_parameters, monkeypatch):
    affine = sources.SOURCES["affine"]

    def fussy(rng, shots, normal, refused=None):
        if shots[0].defect == s.defects[0]:
            raise NoMask("none of 32 masks could be used: all black 32 x", Counter({"all black": 32}))
        refused["too dark"] += 1
        return affine(rng, shots, normal, refused)

    monkeypatch.setitem(sources.SOURCES, "affine", fussy)
    s = study.open_category(tiny_parameters.model_copy(update={"methods": ["defectsynth"]}))
    name, n = "defectsynth_no_hmi", s.settings.sample.n_per_defect
    record = stages.sample(s, name, 0)
    withheld = {m["defect"]: m["protocol"]["why_withheld"] for m in record["metrics"] if "why_withheld" in str(m)}
    assert list(withheld) == [s.defects[0]] and f"0 of {n} requests got a mask: none of 32" in withheld[s.defects[0]]
    refused = next(m for m in record["metrics"] if m["metric"] == "masks_refused")
    reasons = refused["protocol"]["reasons"]
    assert reasons["all black"] == 32 * n and reasons["too dark"] == n and reasons[stages.GAVE_UP] == n
    assert refused["value"] == sum(reasons.values())
    assert {item.defect for item in sampling.load(s.folder(name, 0).path)} == {s.defects[1]}
    rows = stages.quality(s, name, 0)["metrics"]
    assert {m["metric"] for m in rows if m["defect"] == s.defects[0]} == {m["metric"] for m in rows}
    assert all(m["value"] is None for m in rows if m["defect"] == s.defects[0])
    scores = evaluation.downstream(s, name, 0)["metrics"]
    assert all(m["value"] is None and "some defects" in m["protocol"]["why_withheld"] for m in scores)
    report = pd.read_csv(s.folder(name, 0).path / "samples.csv")
    assert len(report) == n


def test_a_pairs_threshold_and_its_drawings_are_reported(tiny_parameters):
    s = study.open_category(tiny_parameters.model_copy(update={"methods": ["dualanodiff"]}))
    record = stages.sample(s, "dualanodiff", 0)
    report = pd.read_csv(s.folder("dualanodiff", 0).path / "samples.csv")
    assert {"threshold", "threshold_by", "drawing", "flaw", "redrawn_for"} <= set(report)
    rows = [m for m in record["metrics"] if m["metric"] == "pairs_redrawn"]
    assert [m["defect"] for m in rows] == list(s.defects)
    for m, (_, own) in zip(rows, report.groupby("defect", sort=False), strict=True):
        assert m["value"] == (own["drawing"] - 1).sum() == sum(m["protocol"]["reasons"].values())
        assert sum(m["protocol"]["kept_with"].values()) == own["flaw"].notna().sum() == len(sampling.problems(own))
    folder = s.folder("dualanodiff", 0).path
    assert len(list((folder / "parts").glob("*.png"))) == len(report)
    assert all(item.notes["threshold"] for item in sampling.load(folder))


def test_a_shots_mask_that_comes_back_is_counted_as_a_copy():
    real, other = torch.zeros(1, 64, 64, dtype=torch.bool), torch.zeros(1, 64, 64, dtype=torch.bool)
    real[0, 5:9, 10:50], other[0, 5:9, 2:42] = True, True
    assert all(stages.copied(mask, [real]) for mask in (real, real.flip(-1), real.flip(-2), real.flip(-2, -1)))
    assert not stages.copied(other, [real]) and not stages.copied(torch.zeros_like(real), [real])


def test_compensation_runs_on_an_object(tiny_parameters):
    """Of the shipped categories the gear has a background; notebooks are tested on brick, which fills the frame."""
    s = study.open_category(tiny_parameters.model_copy(update={"category": "gear", "methods": ["dualanodiff"]}))
    assert "dualanodiff_compensated" in s.variants
    record = stages.sample(s, "dualanodiff_compensated", 0)
    drawn = sampling.load(s.folder("dualanodiff_compensated", 0).path)
    assert record["metrics"] and len(drawn) == s.n_per_defect("dualanodiff") * len(s.defects)


def test_one_fit_may_serve_all_categories(tiny_parameters, tmp_path, monkeypatch):
    asked = tiny_parameters.model_copy(update={"methods": ["symmetry_aware"]})
    first, second = (
        study.open_category(asked.model_copy(update={"category": c})) for c in prepare.categories(tiny_parameters)
    )
    name, kind, trained = "symmetry_aware_all_categories", first.method_of("symmetry_aware"), []
    real = kind.fit
    monkeypatch.setattr(
        kind, "fit", lambda self, shots, *a, **b: (trained.append(shots), real(self, shots, *a, **b))[1]
    )
    record = stages.sample(second, name, 0)
    assert stages.fit(first, name, 0)["key"] == second.folder(name, 0).record("fit")["inputs"]["fit"]
    shots = trained.pop()
    assert {shot.category for shot in shots} == {first.category, second.category}, "once, on the shots of both"
    both = [f"{s.category}/{d}" for s in (first, second) for d in s.defects]
    assert list(first.load(name, 0).areas) == list(second.load(name, 0).areas) == both
    assert not second.folder(name, 0).model.exists() and stages.sample(second, name, 0) == record
    drawn = pd.read_csv(second.folder(name, 0).path / "samples.csv")
    assert set(drawn["defect"]) == set(second.defects)
    assert first.folder(name, 0).record("fit")["key"] != stages.fit(first, "symmetry_aware", 0)["key"]
    few = asked.model_copy(update={"category": second.category, "defects": [second.defects[1]]})
    lone = study.open_category(few.model_copy(update={"runs_root": str(tmp_path / "lone")}))
    stages.sample(lone, name, 0)
    own = [f"{lone.category}/{lone.defects[0]}", *both[: len(first.defects)]]
    assert list(lone.load(name, 0).areas) == own, "outside the grid: a fit of its own"


def test_names_that_are_numbers_stay_names(tiny_mini, tiny_parameters, tmp_path):
    root = shutil.copytree(tiny_mini / "brick", tmp_path / "data" / "01")
    for side in ("test", "ground_truth"):
        known = sorted(folder for folder in (root / side).iterdir() if folder.name != "good")
        for folder, name in zip(known, ("01", "1")):
            folder.rename(root / side / name)
        for folder in known[2:]:
            shutil.rmtree(folder)
    asked = tiny_parameters.model_copy(update={"dataset": "folder", "data_root": str(root.parent)})
    s = study.open_category(asked)
    assert (s.category, s.defects) == ("01", ("01", "1"))
    rows = stages.quality(s, "crop_paste", 0)["metrics"]
    seen = {m["defect"]: m["protocol"]["n_generated"] for m in rows if m["metric"] == "tiny-kid"}
    assert seen == dict.fromkeys(s.defects, s.n_per_defect("crop_paste"))
    drawn = sampling.load(s.folder("crop_paste", 0).path)
    assert {(sample.category, sample.defect) for sample in drawn} == {("01", "01"), ("01", "1")}
