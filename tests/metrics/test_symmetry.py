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
    found = symmetry.best_symmetry(image, mask)
    assert found.kind == kind and found.correlation > 0.85
    row = symmetry.asymmetry([image], [mask]).iloc[0]
    assert row["inside"] > 40 and row["outside"] < 3 and row["ratio"] > 10
    assert found.covered.sum() <= 36, "the spot's copy, where it lies in the image, is not counted as outside"


@pytest.mark.parametrize("seed", [3, 4, 6, 7])
def test_a_smooth_image_moved_by_a_little_is_no_period(seed):
    """Shading correlates more with itself moved by 3 px than under any symmetry; that is no peak."""
    field = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    shading = torch.nn.functional.interpolate(field, (SIDE, SIDE), mode="bicubic")[0, 0] / 3
    found = symmetry.best_symmetry(*spotted(0.5 * periodic() + 0.8 * shading))
    assert found.kind != "period" or np.hypot(*found.shift) >= 12


def test_a_period_is_told_in_px():
    found = symmetry.best_symmetry(*spotted(periodic()))
    assert found.kind == "period" and any(found.shift) and all(step % 12 == 0 for step in found.shift)


def test_a_field_without_symmetry_has_none():
    found = symmetry.best_symmetry(*spotted(smooth(5)))
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


def test_an_even_image_has_no_residual():
    row = symmetry.asymmetry([torch.zeros(3, 16, 16)], [torch.zeros(1, 16, 16, dtype=torch.bool)]).iloc[0]
    assert row["outside"] == 0 and np.isnan(row["inside"]) and np.isnan(row["ratio"])
