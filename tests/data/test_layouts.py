import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from defectlib.data import inpaint, layouts, readers


def counts(table):
    return table.groupby(["category", "defect", "role"]).size().to_dict()


def test_mvtec_layout(plate):
    table = layouts.index("mvtec_ad", plate)
    assert list(table.columns) == layouts.COLUMNS
    assert counts(table) == {
        ("plate", "crack", "test"): 6, ("plate", "stain", "test"): 6,
        ("plate", "good", "train"): 6, ("plate", "good", "test"): 3,
    }  # fmt: skip
    first = table.iloc[0]
    assert (first.defect, first.id, first["mask"]) == ("crack", "000", "plate/ground_truth/crack/000_mask.png")
    assert first.group == first.image == "plate/test/crack/000.png"
    assert not table.duplicated(["category", "defect", "id"]).any()
    assert (table.loc[table["defect"] == "good", "mask"] == "").all()


def test_a_root_that_is_one_category(plate):
    table = layouts.index("folder", plate / "plate")
    assert set(table["category"]) == {"plate"} and len(table) == 21
    assert table["image"].iloc[0] == "test/crack/000.png"


def test_mvtec_3d_layout_with_class_ids(trees, tmp_path):
    for part in ("train", "validation"):
        trees.image(tmp_path / "bagel" / part / "good/rgb/000.png")
    for i in range(2):
        trees.pair(
            tmp_path / f"bagel/test/hole/rgb/{i:03d}.png", tmp_path / f"bagel/test/hole/gt/{i:03d}.png", i, value=3
        )
    trees.pair(tmp_path / "bagel/test/good/rgb/000.png", tmp_path / "bagel/test/good/gt/000.png")
    table = layouts.index("mvtec_3d", tmp_path)
    assert counts(table) == {("bagel", "good", "test"): 1, ("bagel", "good", "train"): 2, ("bagel", "hole", "test"): 2}
    hole = table[table["defect"] == "hole"].iloc[1]
    assert hole["mask"] == "bagel/test/hole/gt/001.png"
    assert layouts.read_mask(hole, tmp_path).sum() == 30  # class id 3 is defect: the threshold is 0
    good = table[(table["defect"] == "good") & (table["role"] == "test")].iloc[0]
    assert not layouts.read_mask(good, tmp_path).any()


def test_btad_layout(trees, tmp_path, draw_blob, write_image):
    trees.image(tmp_path / "01/train/ok/0000.bmp")
    trees.image(tmp_path / "01/test/ok/0001.bmp")
    trees.image(tmp_path / "01/test/ko/0000.bmp", draw_blob(0))
    write_image(tmp_path / "01/ground_truth/ko/0000.png", draw_blob(0))
    table = layouts.index("btad", tmp_path)
    assert counts(table) == {("01", "good", "train"): 1, ("01", "good", "test"): 1, ("01", "ko", "test"): 1}
    assert layouts.read_mask(table[table["defect"] == "ko"].iloc[0], tmp_path).sum() == 30


def test_gdxray_layout_reads_bilevel_masks(trees, tmp_path, draw_blob):
    for i in range(3):
        trees.image(tmp_path / f"Welds/W0001/W0001_{i:04d}.png", draw_blob(i))
    trees.image(tmp_path / "Welds/W0003/W0003_0001.png")
    (tmp_path / "Welds/W0002").mkdir()
    for i in (1, 2):
        Image.fromarray(draw_blob(i) > 0).save(tmp_path / f"Welds/W0002/W0002_{i:04d}.png")
    table = layouts.index("gdxray", tmp_path)
    assert list(table["id"]) == ["W0001_0000", "W0001_0001", "W0001_0002"]
    assert list(table["mask"])[:2] == ["", "Welds/W0002/W0002_0001.png"]
    assert layouts.read_mask(table.iloc[1], tmp_path).sum() == 30


def test_ksdd2_layout_tells_normals_by_their_empty_mask(trees, tmp_path, draw_blob, write_image):
    for role, number, mask in (
        ("train", 10000, draw_blob(0) * 0),
        ("train", 10001, draw_blob(1)),
        ("test", 20000, draw_blob(2)),
    ):
        trees.image(tmp_path / role / f"{number}.png", mask)
        write_image(tmp_path / role / f"{number}_GT.png", mask)
    trees.image(tmp_path / "train" / "10002.png", draw_blob(3))
    table = layouts.index("ksdd2", tmp_path)
    assert counts(table) == {
        ("ksdd2", "defect", "train"): 2,  # one has lost its mask: it is no normal
        ("ksdd2", "defect", "test"): 1,
        ("ksdd2", "good", "train"): 1,
    }
    assert table[table["defect"] == "good"]["mask"].item() == ""
    assert (table.loc[table["defect"] == "defect", "mask"] == "").sum() == 1


def test_deepcrack_takes_21_photographs_and_paints_their_cracks_over(trees, tmp_path):
    for photo in range(25):
        for piece in range(2):
            role = "train" if photo % 2 else "test"
            name = f"7Q3A{photo:04d}-{piece}"
            trees.pair(tmp_path / f"{role}_img/{name}.jpg", tmp_path / f"{role}_lab/{name}.png", photo)
    table = layouts.index("deepcrack", tmp_path)
    cracks, normals = table[table["defect"] == "crack"], table[table["defect"] == "good"]
    assert len(cracks) == len(normals) == 21 and cracks["group"].nunique() == 21
    assert set(normals["derive"]) == {"inpaint"} and set(cracks["group"]) == set(normals["group"])
    assert table.equals(layouts.index("deepcrack", tmp_path)), "the choice does not move"
    row = normals.iloc[0]
    mask = layouts.read_mask(cracks[cracks["id"] == row.id].iloc[0], tmp_path)
    painted, crack = (
        layouts.read_image(row, tmp_path),
        layouts.read_image(cracks[cracks["id"] == row.id].iloc[0], tmp_path),
    )
    assert crack[:, mask[0]].mean() < -0.6, "the crack is dark"
    surface = painted[:, ~mask[0]].median()
    assert (painted[:, mask[0]] - surface).abs().mean() < 0.15, "what was painted looks like the surface"
    assert not layouts.read_mask(row, tmp_path).any()
    assert layouts.read_image(row, tmp_path, 16).shape == (3, 16, 16)


def test_magnetic_tile_layout_groups_exposures(trees, tmp_path):
    def tile(kind, number, exposure, index):
        stem = tmp_path / f"MT_{kind}/Imgs/exp{exposure}_num_{number}"
        trees.pair(stem.with_suffix(".jpg"), stem.with_suffix(".png"), index, value=0 if kind == "Free" else 255)

    tile("Crack", 1000, 1, 0)
    tile("Crack", 1020, 2, 3)  # next exposure of the same tile, though the mask moved
    tile("Free", 1040, 3, 0)  # and one in which the crack does not show
    tile("Crack", 2500, 1, 0)  # the tile taken again later: same mask, not far
    tile("Crack", 90000, 1, 0)  # same mask by chance, far away
    table = layouts.index("magnetic_tile", tmp_path)
    assert set(table["category"]) == {"magnetic_tile"} and set(table["defect"]) == {"crack", "good"}
    group = table.set_index("id")["group"]
    same = {"exp1_num_1000", "exp2_num_1020", "exp3_num_1040", "exp1_num_2500"}
    assert group[list(same)].nunique() == 1 and group["exp1_num_90000"] not in set(group[list(same)])


def test_numbers_in_names_sort_as_numbers():
    assert sorted(["img10", "img2", "a", "10", "9"], key=layouts.natural) == ["9", "10", "a", "img2", "img10"]


def test_two_files_of_one_stem_keep_different_ids(trees, plate):
    trees.image(plate / "plate/train/good/000.jpg")
    ids = set(layouts.index("folder", plate).query("defect == 'good'")["id"])
    assert {"train_000.png", "train_000.jpg", "train_001"} <= ids


@pytest.mark.parametrize("box", ["", "8,4,24,20"])
def test_image_and_mask_of_a_row_are_cut_alike(plate, box):
    row = layouts.index("folder", plate).assign(box=box).iloc[0]
    image, mask = layouts.read_image(row, plate), layouts.read_mask(row, plate)
    assert image.shape[1:] == mask.shape[1:] == ((16, 16) if box else (32, 40))
    assert image[:, mask[0]].max() < -0.7 and image[:, ~mask[0]].min() > -0.4
    assert layouts.read_image(row, plate, 24).shape == (3, 24, 24)
    assert layouts.read_mask(row, plate, 24).shape == (1, 24, 24)


def test_errors_say_how_to_obtain_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="mvtec.com/company/research/datasets/mvtec-ad,"):
        layouts.index("mvtec_ad", tmp_path / "missing")
    with pytest.raises(
        FileNotFoundError, match="nothing in the layout of KolektorSDD2; it should hold train and test,"
    ):
        layouts.index("ksdd2", tmp_path)
    assert {entry.reader for entry in layouts.DATASETS.values()} == set(readers.EXPECTED)
    with pytest.raises(ValueError, match="no data set 'mvtec'; known: mini, mvtec_ad"):
        layouts.index("mvtec", tmp_path)


def test_a_loop_of_links_is_refused_with_its_path(plate):
    (plate / "plate/test/loop").symlink_to(plate / "plate")
    with pytest.raises(FileNotFoundError, match=r"plate/test/loop: symlink loop; repair or remove it"):
        layouts.index("folder", plate)


def test_counts_name_what_is_missing(plate):
    table = layouts.counts("mini", plate).set_index("what")
    assert table.loc["good/train"].tolist() == ["plate", 60, 6]
    assert table.loc["defect crack"].tolist() == ["plate", 24, 6]
    total = layouts.counts("mvtec_ad", plate).set_index("what")["found"]
    assert total.to_dict() == {"good/train": 6, "good/test": 3, "defect": 12}


def test_every_entry_is_complete():
    for name, entry in layouts.DATASETS.items():
        assert entry.name == name and entry.title and entry.licence and entry.citation and entry.obtain
        assert entry.unit in ("image", "tiles", "auto") and entry.normals in ("images", "crops", "inpaint")
    assert [n for n, d in layouts.DATASETS.items() if d.redistributable] == ["mini"]


def test_painting_over_changes_the_widened_mask_only():
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.normal(0.2, 0.05, (3, 48, 48)).astype(np.float32)).clamp(-1, 1)
    mask = torch.zeros(1, 48, 48, dtype=torch.bool)
    mask[:, 20:23, 5:40] = True
    image[:, mask[0]] = -1
    painted = inpaint.remove_defect(image, mask, margin=2)
    near = torch.from_numpy(inpaint.dilate(mask[0].numpy(), 2))
    assert torch.equal(painted[:, ~near], image[:, ~near])
    assert abs(painted[:, mask[0]].mean() - 0.2) < 0.02
    assert 0.6 < painted[:, mask[0]].std() / 0.05 < 1.4, "the grain of the surface is kept"
    assert torch.equal(inpaint.remove_defect(image, torch.zeros_like(mask)), image)
    with pytest.raises(ValueError, match="covers the whole image"):
        inpaint.remove_defect(image, torch.ones_like(mask))


def test_importing_the_package_of_data_loads_nothing_heavy():
    code = "import sys, defectlib.data; print([m for m in ('torch', 'pandas', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


REAL = {
    ("gdxray", "gdxray"): {("weld", "defect"): 11},
    ("magnetic_tile", "magnetic_tile"): {
        ("magnetic_tile", "blowhole"): 115, ("magnetic_tile", "break"): 85, ("magnetic_tile", "crack"): 57,
        ("magnetic_tile", "fray"): 32, ("magnetic_tile", "uneven"): 103, ("magnetic_tile", "good"): 952,
    },
    ("mvtec_3d", "mvtec_3d_tire"): {
        ("tire", "contamination"): 28, ("tire", "cut"): 27, ("tire", "hole"): 27, ("tire", "combined"): 5,
        ("tire", "good"): 105,
    },
}  # fmt: skip


@pytest.mark.parametrize("key", REAL, ids=lambda key: key[0])
def test_counts_of_real_data(key, shared):
    name, folder = key
    table = layouts.index(name, shared / folder)
    assert table.groupby(["category", "defect"]).size().to_dict() == REAL[key]
    assert not table.duplicated(["category", "defect", "id"]).any()


def test_groups_of_magnetic_tile(shared):
    table = layouts.index("magnetic_tile", shared / "magnetic_tile")
    sizes = table.groupby("group").size()
    # About six exposures of some 225 tiles; runs of frames that touch are joined.
    assert 180 <= len(sizes) <= 230 and sizes.max() <= 24 and sizes.median() == 6


def test_class_ids_of_real_tires(shared):
    table = layouts.index("mvtec_3d", shared / "mvtec_3d_tire")
    masked: pd.DataFrame = table[table["mask"] != ""]
    assert all(layouts.read_mask(row, shared / "mvtec_3d_tire").any() for row in masked.itertuples())
