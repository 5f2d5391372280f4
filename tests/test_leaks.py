"""The leak audit: what two lists have in common, and what a run's own folder says of itself."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from defectlib import cli, leaks, prepare, stages, study
from defectlib.data import layouts, splits
from defectlib.methods import base


@pytest.fixture
def lists(tmp_path, picture):
    """Ten training pictures; the test set has two of its own, one of the same bytes, three near ones, one name."""
    train, test = tmp_path / "train" / "crack", tmp_path / "test" / "crack"
    train.mkdir(parents=True)
    test.mkdir(parents=True)
    for k in range(10):
        picture(k).save(train / f"{k:03d}.png")
    for k in (20, 21):
        picture(k).save(test / f"{k:03d}.png")
    shutil.copy(train / "000.png", test / "100.png")
    picture(1).save(test / "101.jpg", quality=70)
    ImageEnhance.Brightness(picture(2)).enhance(0.5).save(test / "102.png")
    Image.fromarray(np.roll(np.asarray(picture(3)), (3, -4), (0, 1))).save(test / "103.png")
    picture(22).save(test / "004.png")
    return train, test


def test_every_kind_of_leak_is_found_and_nothing_else(lists):
    train, test = lists
    found = leaks.between(leaks.listed(train), leaks.listed(test))
    told = [(row.found, row.train[-7:], row.test[-7:]) for row in found.itertuples()]
    assert told[0] == (leaks.BYTES, "000.png", "100.png") and told[-1] == (leaks.NAME, "004.png", "004.png")
    assert {t[1:] for t in told if t[0] == leaks.PICTURE} == {
        ("001.png", "101.jpg"), ("002.png", "102.png"), ("003.png", "103.png"),
    }  # fmt: skip
    assert len(told) == 5 and found["likeness"].iloc[0] == pytest.approx(1, abs=1e-4)


def test_lists_are_folders_or_text(lists, tmp_path, capsys):
    train, test = lists
    text = tmp_path / "test.txt"
    text.write_text("test/crack/020.png\n\ntest/crack/021.png\n")
    assert [file.name for file in leaks.listed(text)] == ["020.png", "021.png"]
    with pytest.raises(SystemExit, match="0"):
        cli.main(["leaks", "--train", str(train), "--test", str(text)])
    assert capsys.readouterr().out == "10 training files, 2 test files: 0 findings\n"
    with pytest.raises(SystemExit, match="1"):
        cli.main(["leaks", "--train", str(train), "--test", str(test)])
    assert "same name: file and folder are called alike" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["leaks", "--train", str(train)])
    text.write_text("test/crack/999.png\n")
    for source, message in ((text, "999.png, which is missing"), (tmp_path / "no", "neither a folder of images nor")):
        with pytest.raises(ValueError, match=message):
            leaks.listed(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="names no image"):
        leaks.listed(tmp_path / "empty")
    with pytest.raises(ValueError, match="0 training and 1 test files"):
        leaks.between([], [text])


def test_a_run_is_audited_from_its_folder_alone(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    stages.sample(s, "crop_paste", 0)
    folder = s.folder("crop_paste", 0).path
    found, counts = leaks.of_run(folder)
    assert not leaks.spoils(found), "a split of ours, and pasted defects on other images"
    rows = s.manifest()
    assert counts["shots"] == (rows["side"] == "shot").sum() and counts["test images"] == (rows["side"] == "test").sum()
    assert counts["samples"] == len(s.defects) * s.n_per_defect("crop_paste")
    shot, drawn = s.shots()[0], sorted((folder / "images").glob("*.png"))[0]
    stolen = prepare.data_root(tiny_parameters) / rows[rows["side"] == "shot"]["image"].iloc[0]
    shutil.copy(stolen, drawn)
    copied, _ = leaks.of_run(folder)
    assert (leaks.SAMPLE, str(drawn)) in set(zip(copied["found"], copied["test"])), shot.id
    Image.open(stolen).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(drawn)
    mirrored, _ = leaks.of_run(folder)
    assert (leaks.SAMPLE, str(drawn)) in set(zip(mirrored["found"], mirrored["test"])), "fits learn from mirrored shots"
    with monkeypatch.context() as patched:
        patched.setattr(base.get("crop_paste"), "scope", "dataset")
        _, of_all = leaks.of_run(folder)
    made = json.loads((folder / "sample.json").read_text())
    made["parameters"]["config"]["scope"] = "dataset"
    (folder / "sample.json").write_text(json.dumps(made))
    _, every = leaks.of_run(folder)
    table = prepare.manifest(tiny_parameters)
    assert every["shots"] == (table["side"] == "shot").sum() > counts["shots"], "one fit for all learned from all"
    assert of_all["shots"] == every["shots"], "whether its configuration says so, or its class"
    assert every["test images"] == counts["test images"]
    filtered = folder.parents[1] / "crop_paste_filtered" / folder.name
    shutil.copytree(folder, filtered)
    (filtered / "fit.json").unlink()
    (filtered / "sample.json").write_text(json.dumps(made | {"parameters": {}}))
    assert leaks.of_run(filtered)[1]["shots"] == every["shots"], "and so did what a filter keeps of it"
    with pytest.raises(ValueError, match="is no run: name a folder such as"):
        leaks.of_run(folder.parent)
    with pytest.raises(ValueError, match="say with --data-root where the data set lies now"):
        leaks.of_run(folder, folder)


def test_the_repeats_of_the_magnetic_tiles_are_found(shared):
    """Each tile under up to six exposures: a split that takes no heed of them leaks, ours does not."""
    root = shared / "magnetic_tile"
    index = layouts.index("magnetic_tile", root).query("defect == 'crack'")
    several = index.groupby("group")["image"].transform("size") > 1
    index = index[several].reset_index(drop=True)
    careless = leaks.between([root / i for i in index["image"][::2]], [root / i for i in index["image"][1::2]])
    groups = dict(zip((str(root / image) for image in index["image"]), index["group"]))
    right = [groups[row.train] == groups[row.test] for row in careless.itertuples()]
    tested = {groups[str(root / i)] for i in index["image"][1::2]} & {
        groups[str(root / i)] for i in index["image"][::2]
    }
    assert sum(right) > 20 and len({groups[row.test] for row in careless[right].itertuples()}) >= 0.9 * len(tested)
    table = splits.split(layouts.index("magnetic_tile", root), root, "first_third")
    own = [[root / i for i in table.query("defect != 'good' and side == @side")["image"]] for side in ("shot", "test")]
    assert not (leaks.between(*own)["found"] == leaks.BYTES).any()
    sides = table.drop_duplicates("image").set_index(table.drop_duplicates("image")["id"])["side"]
    # One broken tile under two exposures, 220 frames apart, as a person sees; their likeness is 0.86.
    assert sides["exp3_num_98116"] == sides["exp5_num_98336"]
