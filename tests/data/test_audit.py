import os
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from defectlib.data import audit, layouts


def found(table, problem):
    return table[table["problem"] == problem]


def files(table, problem):
    return set(found(table, problem)["file"])


def snapshot(root):
    return {
        p: (p.read_bytes() if p.is_file() else None, p.lstat().st_mtime_ns)
        for p in root.rglob("*")
        if not p.is_symlink()
    }


@pytest.fixture
def damaged(plate, write_image, draw_blob, trees):
    """The small tree with one of everything that can be wrong."""
    base = plate / "plate"
    test, truth = base / "test", base / "ground_truth"
    whole = (test / "crack/000.png").read_bytes()
    (test / "crack/000.png").write_bytes(whole[: len(whole) // 2])
    (test / "crack/001.png").write_bytes(b"")
    (truth / "crack/002_mask.png").unlink()
    (test / "crack/003.png").unlink()
    write_image(truth / "crack/004_mask.png", draw_blob(4)[:, :30])
    (truth / "crack/005_mask.png").write_bytes(b"not a picture")
    write_image(truth / "stain/000_mask.png", draw_blob(0) * 0)
    write_image(truth / "stain/001_mask.png", draw_blob(0) * 0 + 255)
    grey = draw_blob(2)
    grey[grey > 0] = np.linspace(5, 255, (grey > 0).sum()).astype(np.uint8)
    write_image(truth / "stain/002_mask.png", grey)
    classes = draw_blob(3)
    classes[:, :18][classes[:, :18] > 0] = 200
    write_image(truth / "stain/003_mask.png", classes)
    shutil.copy(base / "train/good/000.png", base / "test/good/001.png")
    write_image(base / "train/good/001.png", np.full((32, 40), 30000, np.uint16))
    Image.open(base / "train/good/002.png").quantize(8).save(base / "train/good/002.png")
    Image.open(base / "train/good/003.png").convert("RGBA").save(base / "train/good/003.png")
    exif = Image.Exif()
    exif[audit.ORIENTATION] = 6
    Image.open(base / "train/good/004.png").save(base / "train/good/rotated.jpg", exif=exif)
    trees.pair(test / "scratch/first.png", truth / "scratch/first_mask.png")
    (base / "test/loop").symlink_to(base)
    (base / "train/good/gone.png").symlink_to(base / "nowhere.png")
    trees.image(base / "test/crack/more/000.png")
    trees.image(plate / "bare/test/dent/000.png")
    return plate


def test_everything_that_is_wrong_is_found_and_nothing_is_changed(damaged):
    before = snapshot(damaged)
    table = audit.audit("folder", damaged)
    assert snapshot(damaged) == before
    p = "plate/"
    expected = {
        "corrupt or truncated file": {p + "test/crack/000.png", p + "ground_truth/crack/005_mask.png"},
        "zero-byte file": {p + "test/crack/001.png"},
        "image without mask": {p + "test/crack/002.png", "bare/test/dent/000.png"},
        "mask without image": {p + "ground_truth/crack/003_mask.png"},
        "mask and image differ in size": {p + "ground_truth/crack/004_mask.png"},
        "empty mask": {p + "ground_truth/stain/000_mask.png"},
        "full mask": {p + "ground_truth/stain/001_mask.png"},
        "grey mask": {p + "ground_truth/stain/002_mask.png"},
        "class-id mask": {p + "ground_truth/stain/003_mask.png"},
        "byte-identical images": {p + "train/good/000.png"},
        "16-bit image": {p + "train/good/001.png"},
        "palette file": {p + "train/good/002.png"},
        "image with alpha": {p + "train/good/003.png"},
        "EXIF-rotated image": {p + "train/good/rotated.jpg"},
        "names that are not numbers": {p + "train/good/rotated.jpg", p + "test/scratch/first.png"},
        "defect with fewer than two masks": {p + "test/crack", p + "test/scratch", "bare/test/dent"},
        "symlink loop": {p + "test/loop"},
        "broken link": {p + "train/good/gone.png"},
        "file that the layout does not read": {p + "test/crack/more/000.png"},
        "category without normals": {"bare/test/dent"},
        "category without a usable defect mask": {"bare/test/dent"},
    }
    assert {problem: files(table, problem) for problem in set(table["problem"])} == expected
    assert audit.spoils(table)
    assert list(table.columns) == ["severity", "problem", "category", "file", "remedy"]
    rank = table["severity"].map({"error": 0, "warning": 1, "note": 2})
    assert rank.is_monotonic_increasing, "errors first"
    assert table["remedy"].str.match(r"^[A-Z].*\.$").all()
    with pytest.raises(FileNotFoundError):
        layouts.index("folder", damaged)


def test_severity_says_what_spoils_a_run(damaged):
    table = audit.audit("folder", damaged)
    errors = set(table.loc[table["severity"] == "error", "problem"])
    assert errors == {
        "corrupt or truncated file", "zero-byte file", "mask and image differ in size", "symlink loop", "broken link",
        "category without normals", "category without a usable defect mask",
    }  # fmt: skip


def test_remedies_carry_the_numbers(damaged):
    table = audit.audit("folder", damaged).set_index("problem")["remedy"]
    assert "image 40 x 32, mask 30 x 32" in table["mask and image differ in size"]
    assert "the same as plate/test/good/001.png" in table["byte-identical images"]
    assert "Values above 127 count as defect" in table["grey mask"]
    assert "largest value is 0" in table["empty mask"]


def test_a_sound_folder_has_no_findings(plate):
    table = audit.audit("folder", plate)
    assert table.empty and not audit.spoils(table)


def test_masks_with_low_class_ids_spoil_a_run_with_the_reason(plate):
    for mask in (plate / "plate/ground_truth").rglob("*.png"):
        Image.fromarray(np.asarray(Image.open(mask)) // 255 * 2).save(mask)
    table = audit.audit("folder", plate)
    assert audit.spoils(table)
    line = found(table, "category without a usable defect mask").iloc[0]
    assert "defect means values above 127" in line["remedy"]
    assert len(found(table, "empty mask")) == 12 and "its largest value is 2" in table["remedy"].str.cat()
    assert not audit.spoils(audit.audit("mvtec_3d", plate)), "where class ids are expected they count"


def test_folders_that_cannot_be_listed(plate, monkeypatch):
    # Tests may run as root, who can list everything: the refusal is simulated where the folder is listed.
    scandir = os.scandir

    def refuse(path="."):
        if str(path).endswith(os.path.join("test", "crack")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    table = audit.audit("folder", plate)
    assert files(table, "unreadable folder") == {"plate/test/crack"} and audit.spoils(table)
    with pytest.raises(FileNotFoundError, match=r"plate/test/crack: unreadable folder"):
        layouts.index("folder", plate)


def test_notes_are_one_line_a_defect_with_a_count(plate):
    for mask in sorted((plate / "plate/ground_truth/crack").glob("*.png")):
        values = np.asarray(Image.open(mask)).copy()
        values[values > 0] = np.linspace(100, 255, 30).astype(np.uint8)
        Image.fromarray(values).save(mask)
    lines = found(audit.audit("folder", plate), "grey mask")
    assert len(lines) == 1 and "(6 files, this one first)" in lines["remedy"].item()


def test_nothing_to_look_at(tmp_path):
    missing = audit.audit("mvtec_ad", tmp_path / "none")
    assert missing["problem"].tolist() == ["no such folder"] and "register at" in missing["remedy"].item()
    empty = audit.audit("ksdd2", tmp_path)
    assert empty["problem"].tolist() == ["nothing in this layout"] and audit.spoils(empty)
    assert empty["remedy"].item() == (
        "It should hold train and test, with images <number>.png and masks <number>_GT.png."
    )
    with pytest.raises(ValueError, match="no data set 'x'"):
        audit.audit("x", tmp_path)


def test_a_normal_image_with_a_defect_mask(trees, tmp_path, draw_blob):
    for i, kind in enumerate(("Free", "Crack", "Crack")):
        stem = tmp_path / f"MT_{kind}/Imgs/exp1_num_{1000 * i}"
        trees.pair(stem.with_suffix(".jpg"), stem.with_suffix(".png"), i)
    table = audit.audit("magnetic_tile", tmp_path)
    assert files(table, "normal image with a defect mask") == {"MT_Free/Imgs/exp1_num_0.png"}
    counted = found(table, "count differs from the release")["remedy"]
    assert set(counted.str.extract(r": (\w+: \d+ found)")[0]) == {"good: 1 found", "defect: 2 found"}


def test_empty_masks_of_ksdd2_are_normals(trees, tmp_path, draw_blob, write_image):
    for i in range(4):
        mask = draw_blob(i) * (i % 2)
        trees.image(tmp_path / f"train/{i}.png", mask)
        write_image(tmp_path / f"train/{i}_GT.png", mask)
    trees.image(tmp_path / "train/4.png", draw_blob(4))
    table = audit.audit("ksdd2", tmp_path)
    assert found(table, "empty mask").empty and not audit.spoils(table)
    assert files(table, "image without mask") == {"train/4.png"}


@pytest.mark.parametrize(
    ("name", "folder"), [("gdxray", "gdxray"), ("magnetic_tile", "magnetic_tile"), ("mvtec_3d", "mvtec_3d_tire")]
)
def test_real_data_can_be_run(name, folder, shared):
    table: pd.DataFrame = audit.audit(name, shared / folder)
    assert not audit.spoils(table)
    if name == "gdxray":
        assert files(table, "image without mask") == {"Welding/W0001/W0001_0000.png"}
        assert files(table, "byte-identical images") == {"Welding/W0001/W0001_0001.png"}
    if name == "magnetic_tile":
        names = ("exp3_num_45042", "exp4_num_124690", "exp4_num_352527", "exp4_num_45057")
        assert files(table, "empty mask") == {f"MT_Uneven/Imgs/{n}.png" for n in names}
        assert len(found(table, "grey mask")) == 5
    if name == "mvtec_3d":
        assert not found(table, "class-id mask").empty
