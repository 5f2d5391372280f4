"""Symmetry found by correlation: closed forms, and a spot that breaks it."""

import numpy as np
import pytest
import torch

from defectlib.metrics import symmetry

SIDE = 48


def smooth(seed, h=SIDE, w=SIDE):
    """A smooth random field, (h, w) in about [-1, 1]."""
    noise = torch.randn(1, 1, h // 4, w // 4, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (h, w), mode="bicubic")[0, 0].clamp(-2, 2) / 2


def spotted(field, at=(10, 8)):
    """A grey image of a field with a bright spot, and the spot's mask."""
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, at[0] : at[0] + 5, at[1] : at[1] + 5] = True
    image = field.clamp(-0.6, 0.6)[None].expand(3, -1, -1)
    return torch.where(mask, 0.95, image), mask


def mirrored():
    half = smooth(0, SIDE, SIDE // 2)
    return torch.cat([half, half.flip(-1)], 1)


def periodic():
    tile = smooth(1, SIDE // 4, SIDE // 4)
    return tile.repeat(4, 4)


def turned():
    field = smooth(2)
    return sum(torch.rot90(field, k) for k in range(4)) / 3


@pytest.mark.parametrize(("field", "kind"), [(mirrored, "mirror"), (periodic, "period"), (turned, "turn")])
def test_the_symmetry_is_found_and_the_spot_breaks_it(field, kind):
    image, mask = spotted(field())
    found = symmetry.best_symmetry(image)
    assert found.kind == kind and found.correlation > 0.85
    row = symmetry.asymmetry([image], [mask]).iloc[0]
    assert row["inside"] > 40 and row["outside"] < 3, "the spot's own copy is not counted as outside"
    assert row["ratio"] > 10 and np.isnan(row["on_normals"])


@pytest.mark.parametrize("axis", [15, 45, 90, 97.5])
def test_a_mirror_about_any_axis_is_found(axis):
    """A field and its own mirror image about an axis through the middle, at this angle."""
    field = smooth(0)[None].double()
    image = ((field + symmetry._turned(field, [(True, 2 * axis)])[0]) / 2).float().expand(3, -1, -1)
    found = symmetry.best_symmetry(image)
    assert found.kind == "mirror" and found.correlation > 0.95
    assert (found.angle - 2 * axis) % 360 == 0 and max(map(abs, found.shift)) <= 1


def test_turns_and_mirrors_by_hand():
    picture = torch.arange(6.0).view(1, 2, 3)
    same, half, mirror = symmetry._turned(picture, [(False, 0.0), (False, 180.0), (True, 0.0)])[:, 0]
    assert torch.allclose(same, picture[0]) and torch.allclose(half, picture[0].flip(0, 1), atol=1e-5)
    assert torch.allclose(mirror, picture[0].flip(1), atol=1e-5)
    square = torch.arange(9.0).view(1, 3, 3)
    assert torch.allclose(symmetry._turned(square, [(False, 90.0)])[0, 0], square[0].rot90(-1), atol=1e-5)


def test_any_mask_on_an_object_stands_out_of_even_ground():
    """A rough disc on even ground with nothing wrong: the ratio is far above 1, beyond normal images it is not."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    disc = (rows - 24) ** 2 + (columns - 24) ** 2 < 18**2
    plain = [
        torch.where(disc, 0.3 * smooth(seed, 4 * SIDE, 4 * SIDE)[::4, ::4], -0.8).expand(3, -1, -1)
        for seed in range(10)
    ]
    mask = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    mask[0, 18:26, 14:30] = True
    normals = [symmetry.best_symmetry(image) for image in plain[:8]]
    sound, wrong = plain[8], torch.where(mask, 0.95, plain[9])
    found = symmetry.asymmetry([sound, wrong], [mask, mask], normals)
    assert (found["ratio"] > 1.5).all() and found["on_normals"].nunique() == 1
    assert found["beyond"].to_numpy() == pytest.approx((found["ratio"] / found["on_normals"]).to_numpy())
    assert 0.7 < found["beyond"][0] < 1.3 < 2 < found["beyond"][1]


def test_the_summary_by_hand():
    found = symmetry.pd.DataFrame({
        "kind": ["mirror"] * 9 + ["turn", "turn"], "correlation": 0.5, "inside": 2.0, "outside": 1.0, "ratio": 2.0,
        "on_normals": 1.0, "beyond": [1.0, 2, 3, 4, 5, 6, 7, 8, 9, np.inf, 4.0], "category": "nut",
        "defect": ["a"] * 9 + ["b"] * 2,
    })  # fmt: skip
    table = symmetry.summary(found, ["category", "defect"]).loc["nut"]
    assert table["images"].tolist() == [9, 2] and table["symmetries"].tolist() == ["mirror 9", "turn 2"]
    assert table.loc["a", "beyond"] == 5 and 1 < table.loc["a", "low"] < 5 < table.loc["a", "high"] < 9
    assert table.loc["b", ["low", "high"]].isna().all(), "two images have no interval"


def test_a_large_image_is_looked_at_smaller():
    """The same in four times as many pixels: nearly the same numbers, and a picture of its own size."""
    image, mask = spotted(mirrored())
    small = (
        image.repeat_interleave(4, -1).repeat_interleave(4, -2),
        mask.repeat_interleave(4, -1).repeat_interleave(4, -2),
    )
    rows = [symmetry.asymmetry([i], [m]).iloc[0] for i, m in ((image, mask), small)]
    assert rows[0]["kind"] == rows[1]["kind"] and rows[0]["inside"] == pytest.approx(rows[1]["inside"], rel=0.15)
    found = symmetry.best_symmetry(small[0])
    assert found.residual.shape == (128, 128) and found.picture().shape == (1, 192, 192)


@pytest.mark.parametrize("seed", [3, 4, 6, 7])
def test_a_smooth_image_moved_by_a_little_is_no_period(seed):
    """Shading correlates more with itself moved by 3 px than under any symmetry; that is no peak."""
    field = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    shading = torch.nn.functional.interpolate(field, (SIDE, SIDE), mode="bicubic")[0, 0] / 3
    found = symmetry.best_symmetry(spotted(0.5 * periodic() + 0.8 * shading)[0])
    assert found.kind != "period" or np.hypot(*found.shift) >= 12


def test_a_period_is_told_in_px():
    found = symmetry.best_symmetry(spotted(periodic())[0])
    assert found.kind == "period" and any(found.shift) and all(step % 12 == 0 for step in found.shift)


def test_a_field_without_symmetry_has_none():
    found = symmetry.best_symmetry(spotted(smooth(5))[0])
    assert found.correlation < 0.7


def test_correlations_against_numpy():
    rng = np.random.default_rng(0)
    fixed, moving = rng.normal(size=(2, 9, 7))
    there = rng.random((9, 7)) < 0.8
    found, overlap = symmetry.correlations(fixed, moving, there)
    for dy, dx in ((0, 0), (2, -1), (-3, 2)):
        pairs = [
            (fixed[y + dy, x + dx], moving[y, x])
            for y in range(9) for x in range(7) if there[y, x] and 0 <= y + dy < 9 and 0 <= x + dx < 7
        ]  # fmt: skip
        assert overlap[8 + dy, 6 + dx] == pytest.approx(len(pairs))
        assert found[8 + dy, 6 + dx] == pytest.approx(np.corrcoef(*zip(*pairs))[0, 1], abs=1e-6)
    both, _ = symmetry.correlations(fixed, np.stack([moving, fixed]), np.stack([there, ~there]))
    assert np.allclose(both[0], found)


def test_an_even_image_has_no_residual():
    row = symmetry.asymmetry([torch.zeros(3, 16, 16)], [torch.zeros(1, 16, 16, dtype=torch.bool)]).iloc[0]
    assert row["outside"] == 0 and np.isnan(row["inside"]) and np.isnan(row["ratio"])


def test_what_has_no_copy_is_told():
    residual = np.full((4, 4), 9.0)
    residual[:, 2:] = np.nan
    found = symmetry.Symmetry("mirror", 1.0, residual, True, 0.0, (0, -2), (8, 8))
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    assert np.isnan(found.copied(mask))
    mask[:, :, 2:8] = True  # columns 1 to 3 of the residual's four, one of which has a copy
    assert found.copied(mask) == pytest.approx(1 / 3)
