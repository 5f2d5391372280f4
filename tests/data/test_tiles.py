import numpy as np
import pytest
import torch
from PIL import Image

from defectlib.data import boxes, layouts, splits, tiles
from defectlib.data.components import clusters, components


def mask_of(shape, *spots):
    mask = np.zeros(shape, bool)
    for y, x, h, w in spots:
        mask[y : y + h, x : x + w] = True
    return mask


def share(mask, box):
    x0, y0, x1, y1 = box
    return mask[y0:y1, x0:x1].mean()


def test_pieces_and_the_gaps_between_them():
    found = components(mask_of((40, 100), (10, 10, 4, 4), (10, 20, 4, 4), (30, 90, 2, 2)))
    assert list(found.areas) == [16, 16, 4]
    gaps = {(i, j): d for i, j, d in found.links}
    assert gaps[0, 1] == pytest.approx(7, abs=1)  # columns 14 .. 19 lie between
    assert [c.pieces for c in clusters(found, 5)] == [(0,), (1,), (2,)]
    assert [c.pieces for c in clusters(found, 12)] == [(0, 1), (2,)]
    assert clusters(found, 12)[0].box == (10, 10, 14, 24) and clusters(found, 12)[0].area == 32
    assert [c.pieces for c in clusters(found, 200)] == [(0, 1, 2)]


def weld(root, spots, shape=(96, 400), n=3, mode="1"):
    """A tree in GDXray's layout: strips with the given defect spots, one more px down in each next image."""
    for folder in ("W0001", "W0002"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        rng = np.random.default_rng(i)
        mask = mask_of(shape, *((y + i, x, h, w) for y, x, h, w in spots))
        image = np.where(mask, 40, rng.integers(110, 130, shape)).astype(np.uint8)
        Image.fromarray(image).save(root / f"W0001/W0001_{i + 1:04d}.png")
        Image.fromarray(mask).convert(mode).save(root / f"W0002/W0002_{i + 1:04d}.png")
    return root


def test_auto_side_gives_the_median_defect_four_cells(tmp_path):
    root = weld(tmp_path, [(20, 40, 10, 10)])
    side = tiles.auto_side(layouts.index("gdxray", root), root)
    # 100 px: side <= 64 * sqrt(100 / (4 * 16)) = 80.
    # Room for a normal tile and its margins: the strip right of the defect is 96 px high, 95 / 1.25 = 76.
    assert side == 72
    assert tiles.auto_side(layouts.index("gdxray", root), root, size=128) == 72
    assert tiles.auto_side(layouts.index("gdxray", root), root, cells=9) == 48  # 64 * sqrt(100 / 144) = 53
    assert tiles.auto_side(layouts.index("gdxray", root), root, cells=400) == 32


def test_cut_keeps_the_defect_inside_and_the_boxes_inside_the_image(tmp_path):
    root = weld(tmp_path, [(20, 40, 10, 10), (60, 300, 8, 12)])
    index = layouts.index("gdxray", root)
    table = tiles.cut(index, root, 48, seed=0)
    assert list(table.columns) == layouts.COLUMNS
    defects, normals = table[table["defect"] == "defect"], table[table["defect"] == "good"]
    assert len(defects) == 6 and set(defects["id"]) >= {"W0001_0001_t0", "W0001_0001_t1"}
    for row in defects.itertuples():
        x0, y0, x1, y1 = layouts.parse_box(row.box)
        assert (x1 - x0, y1 - y0) == (48, 48) and x0 >= 0 and y0 >= 0 and x1 <= 400 and y1 <= 96
        assert layouts.read_mask(row, root).sum() in (100, 96), "one whole defect a tile"
    assert set(table["group"]) == set(index["group"])
    assert {"W0001_0001_n0"} <= set(normals["id"]) and (normals["mask"] == "").all()


def test_normal_crops_stay_clear_of_the_widened_mask(tmp_path):
    root = weld(tmp_path, [(20, 40, 10, 10), (60, 300, 8, 12)])
    index = layouts.index("gdxray", root)
    masks = {row.image: layouts.read_mask(row, root)[0] for row in index.itertuples()}
    normals = tiles.cut(index, root, 48, seed=0).query("defect == 'good'")
    assert len(normals) >= 9
    for row in normals.itertuples():
        x0, y0, x1, y1 = layouts.parse_box(row.box)
        # An eighth of 48 px on each side.
        assert not masks[row.image][y0:y1, max(0, x0 - 6) : x1 + 6].any()
        assert not masks[row.image][max(0, y0 - 6) : y1 + 6, x0:x1].any()
        assert not layouts.read_mask(row, root).any()


def test_cut_depends_on_the_seed_and_on_the_row_alone(tmp_path):
    root = weld(tmp_path, [(20, 40, 10, 10)])
    index = layouts.index("gdxray", root)
    table = tiles.cut(index, root, 48, seed=0)
    assert table.equals(tiles.cut(index, root, 48, seed=0))
    assert not table["box"].equals(tiles.cut(index, root, 48, seed=1)["box"])
    alone = tiles.cut(index.iloc[[1]], root, 48, seed=0)
    assert alone["box"].tolist() == table[table["image"] == index["image"].iloc[1]]["box"].tolist()


def test_tiles_of_one_image_never_part(tmp_path):
    root = weld(tmp_path, [(20, 40, 10, 10), (60, 300, 8, 12)], n=6)
    table = splits.split(tiles.cut(layouts.index("gdxray", root), root, 48, seed=0), root, "first_third")
    splits.check(table)
    side = table.assign(test=table["side"] == "test").groupby("image")["test"]
    assert (side.nunique() == 1).all() and side.first().sum() == 4  # six parents: two shots, four tested
    assert set(table["side"]) == {"shot", "train", "test"}


def test_a_defect_larger_than_the_tile_shows_its_boundary():
    mask = mask_of((200, 200), (0, 0, 200, 120))
    made = boxes.defect_boxes(mask, 40, np.random.default_rng(0), 4)
    assert len(made) == 4
    for box in made:
        assert 0.1 < share(mask, box) <= boxes.MAX_SHARE, "defect and surface both show"
        assert box[0] < 120 < box[2], "on the inner boundary, not on the image's border"
    assert len({box for box in made}) == 4


def test_a_long_thin_crack_is_followed():
    mask = mask_of((64, 600), (30, 20, 2, 560))
    made = boxes.defect_boxes(mask, 64, np.random.default_rng(0), 4)
    assert len(made) == 4 and all(share(mask, box) >= 1 / 256 for box in made)


def test_specks_get_no_tile_and_too_little_defect_neither():
    mask = mask_of((200, 400), (50, 50, 20, 20), (150, 350, 2, 2))
    assert len(boxes.defect_boxes(mask, 64, np.random.default_rng(0), 4)) == 1
    assert boxes.defect_boxes(mask_of((200, 200), (50, 50, 2, 2)), 64, np.random.default_rng(0), 4) == []


def test_images_smaller_than_the_side_give_their_shorter_side():
    made = boxes.defect_boxes(mask_of((40, 90), (10, 60, 8, 8)), 64, np.random.default_rng(0), 4)
    assert len(made) == 1 and made[0][2] - made[0][0] == made[0][3] - made[0][1] == 40
    assert made[0][1] == 0 and made[0][0] <= 60 and made[0][2] >= 68


def test_surface_boxes_stay_on_the_surface():
    legal = mask_of((100, 100), (0, 50, 100, 50))
    made = boxes.surface_boxes(legal, 30, np.random.default_rng(0), 5)
    assert made and all(share(legal, box) >= 0.9 for box in made)
    assert boxes.surface_boxes(legal, 60, np.random.default_rng(0), 5, whole=True) == []
    assert len(boxes.surface_boxes(np.ones((30, 30), bool), 64, np.random.default_rng(0), 3)) == 1


def test_normals_are_cut_inside_the_foreground(plate):
    def right_half(image):
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
        mask[..., 20:] = True
        return mask

    table = tiles.cut(layouts.index("folder", plate), plate, 16, seed=0, foreground=right_half)
    normals = table[table["defect"] == "good"]
    assert len(normals) == 9 and set(normals["role"]) == {"train", "test"}
    assert all(layouts.parse_box(box)[0] >= 18 for box in normals["box"])  # 0.9 of 16 columns lie right of 20


def test_masks_that_hold_too_little_defect_are_refused_with_a_remedy(tmp_path):
    root = weld(tmp_path, [(20, 40, 2, 2)])
    with pytest.raises(ValueError, match="no tile of 90 px holds enough of the defect weld/defect; try a smaller side"):
        tiles.cut(layouts.index("gdxray", root), root, 90, seed=0)


def test_without_any_mask_no_side_can_be_chosen(plate):
    index = layouts.index("folder", plate)
    with pytest.raises(ValueError, match="no mask shows a defect"):
        tiles.auto_side(index[index["defect"] == "good"], plate)


@pytest.mark.parametrize(
    ("name", "folder"), [("gdxray", "gdxray"), ("magnetic_tile", "magnetic_tile"), ("mvtec_3d", "mvtec_3d_tire")]
)
def test_real_defects_cover_four_latent_cells(name, folder, shared):
    root = shared / folder
    table = tiles.cut(layouts.index(name, root), root, "auto", seed=0)
    defects = table[table["defect"] != "good"]
    for _, rows in defects.groupby("defect"):
        few = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, 40).round().astype(int))]
        cells = [layouts.read_mask(row, root, 64).sum().item() / 16 for row in few.itertuples()]
        assert np.median(cells) >= 4 and min(cells) >= 1
    assert (table["defect"] == "good").sum() >= 60
