"""Samples in MVTec AD's layout: what this package reads back."""

import pandas as pd
import pytest
import torch

from defectlib import cli, images, sampling, stages, study
from defectlib.data import audit, layouts
from defectlib.export import export


@pytest.fixture
def drawn(tiny_parameters):
    parameters = tiny_parameters.model_copy(update={"methods": ["crop_paste"]})
    s = study.open_category(parameters)
    stages.sample(s, "crop_paste", 0)
    return s


def test_a_run_reads_back_as_a_data_set(drawn, tmp_path):
    counts = export(drawn.parameters, "crop_paste", 0, tmp_path / "out")
    assert counts["written"].tolist() == [drawn.n_per_defect("crop_paste")] * len(drawn.defects)
    table = layouts.index("folder", tmp_path / "out")
    assert set(table["defect"]) == {"good", *drawn.defects} and set(table["category"]) == {drawn.category}
    assert not audit.spoils(audit.audit("folder", tmp_path / "out"))
    sample = sampling.load(drawn.folder("crop_paste", 0).path)[0]
    name = f"{sample.seed:06d}"
    target = tmp_path / "out" / drawn.category
    assert torch.equal(images.read_image(target / "test" / sample.defect / f"{name}.png"), sample.image)
    mask = images.read_mask(target / "ground_truth" / sample.defect / f"{name}_mask.png")
    assert torch.equal(mask, sample.mask)
    assert "crop_paste, seed 0, profile smoke" in (tmp_path / "out" / "README.md").read_text()
    assert len(list((target / "train" / "good").iterdir())) == len(drawn.normals(0))


def test_methods_that_the_run_did_not_ask_for_refuse_nothing(drawn, tmp_path):
    """Of one shot no method interpolates masks; the samples of one that does not are there all the same."""
    folder = drawn.parameters.dataset_folder()
    split = pd.read_csv(folder / "split_p0.csv", dtype=str, keep_default_na=False)
    shots = split[(split["side"] == "shot") & (split["defect"] == drawn.defects[0])]
    split.loc[shots.index[1:], "side"] = "unused"
    split.to_csv(folder / "split_p0.csv", index=False)
    every = drawn.parameters.model_copy(update={"methods": None})
    study._category_rows.cache_clear()
    with pytest.raises(ValueError, match="has one shot, and the mask source"):
        study.open_category(every)
    assert export(every, "crop_paste", 0, tmp_path / "out")["written"].sum() > 0


def test_flawed_pairs_are_left_out_and_counted(drawn, tmp_path):
    run = drawn.folder("crop_paste", 0).path
    first = sampling.load(run)[0]
    images.write_mask(sampling.mask_file(run, first.seed), first.mask, {"flaw": "invented"})
    counts = export(drawn.parameters, "crop_paste", 0, tmp_path / "out")
    assert counts["left_out"].sum() == 1 and sorted(counts["why"]) == [*[""] * (len(counts) - 1), "1 invented"]
    assert "1 invented" in (tmp_path / "out" / "README.md").read_text()
    told = pd.read_csv(tmp_path / "out" / drawn.category / "samples.csv").set_index("seed")["exported"]
    assert not told[first.seed] and told.sum() == counts["written"].sum()


def test_nothing_is_overwritten_and_what_is_missing_is_named(drawn, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="full is not empty"):
        export(drawn.parameters, "crop_paste", 0, tmp_path / "full")
    with pytest.raises(ValueError, match="no samples of defectsynth with seed 0; it has: crop_paste seed 0"):
        export(drawn.parameters, "defectsynth", 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    words = ["export", "--profile", "smoke", "--runs", str(tmp_path / "nowhere"), "--method", "x", "--to", "y"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and "it has: none" in capsys.readouterr().err


def test_a_failed_export_leaves_nothing(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "load", lambda folder: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        export(drawn.parameters, "crop_paste", 0, tmp_path / "new" / "out")
    assert not list((tmp_path / "new").iterdir())
