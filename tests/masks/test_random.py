from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from defectlib.masks import random


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[[cell == "#" for cell in row] for row in rows]])


def sides(mask: torch.Tensor) -> np.ndarray:
    """Long and short side of a filled bar from its second moments: a bar of length L has variance (L^2 - 1) / 12."""
    points = np.argwhere(mask[0].numpy()).astype(float)
    return np.sqrt(12 * np.linalg.eigvalsh(np.cov(points.T, bias=True)) + 1)[::-1]


BAR = torch.zeros(1, 240, 240, dtype=torch.bool)
BAR[0, 100:120, 20:220] = True
LINE = torch.zeros(1, 96, 96, dtype=torch.bool)
LINE[0, 40, 10:90] = True


def test_perlin_area_lies_in_the_range_and_is_spread_over_it():
    ratios = [random.perlin(rng(seed), 64, (0.05, 0.25)).float().mean().item() for seed in range(60)]
    assert min(ratios) >= 0.05 - 1e-3 and max(ratios) <= 0.25 + 1e-3
    assert min(ratios) < 0.09 and max(ratios) > 0.21


def test_perlin_is_a_function_of_the_generator_and_comes_in_patches():
    first, again, other = random.perlin(rng(1), 64), random.perlin(rng(1), 64), random.perlin(rng(2), 64)
    assert first.dtype == torch.bool and first.shape == (1, 64, 64)
    assert torch.equal(first, again) and not torch.equal(first, other)
    mask = random.perlin(rng(3), 64, (0.1, 0.1), scales=(4,))
    shuffled = rng(0).permutation(mask.numpy().ravel()).reshape(64, 64)
    assert label(mask[0].numpy())[1] < 0.1 * label(shuffled)[1]


def test_gradient_noise_is_zero_on_the_lattice_and_hand_worked_between():
    angles = np.zeros((3, 3))
    points = np.array([[0.0, 1.0], [1.0, 1.0]])
    assert np.allclose(random._gradient_noise(points, points.T, angles), 0)
    # All gradients point along x: at x = 1/2 the corners give +1/2 and -1/2, at x = 1/4 fade(1/4) = 53/512.
    assert random._gradient_noise(np.array([0.5]), np.array([0.5]), angles) == pytest.approx(0)
    assert random._gradient_noise(np.array([0.5]), np.array([0.25]), angles) == pytest.approx(0.25 - 53 / 512)


def test_perlin_keeps_its_area_inside_what_is_allowed():
    allowed = torch.zeros(1, 64, 64, dtype=torch.bool)
    allowed[:, 40:, 40:] = True
    for seed in range(20):
        mask = random.perlin(rng(seed), 64, (0.05, 0.1), allowed=allowed)
        assert 0.05 * 4096 - 1 <= mask.sum() <= 0.1 * 4096 + 1 and not (mask & ~allowed).any()
    assert torch.equal(random.perlin(rng(), 64, (0.5, 0.5), allowed=allowed), allowed), "filled, not spilled"
    with pytest.raises(ValueError, match="no pixel is allowed"):
        random.perlin(rng(), 64, allowed=allowed & ~allowed)


@pytest.mark.parametrize("area", [(0.0, 0.1), (0.3, 0.2), (0.5, 1.0)])
def test_perlin_refuses_impossible_areas(area):
    with pytest.raises(ValueError, match="area"):
        random.perlin(rng(), 32, area)


def test_affine_keeps_height_and_width_of_a_bar():
    """The composite generator that AdaBLDM released turned a 20 x 200 bar into 207 x 18."""
    untouched = random.affine(BAR, rng(), rotate=0, scale=(1, 1), flip=True)
    assert untouched.shape == (1, 20, 200) and untouched.all()
    for seed in range(12):
        assert sides(random.affine(BAR, rng(seed), scale=(1, 1))) == pytest.approx([200, 20], abs=1.2)
        drawn = np.array(sides(random.affine(BAR, rng(seed))))
        assert drawn[0] / drawn[1] == pytest.approx(10, rel=0.06) and 0.84 * 200 < drawn[0] < 1.16 * 200


def test_affine_without_a_transform_returns_the_box():
    mask = picture(["......", "..##..", "..#...", "......"])
    same = random.affine(mask, rng(), rotate=0, scale=(1, 1), flip=False)
    assert torch.equal(same, picture(["##", "#."]))
    seen = {tuple(random.affine(mask, rng(s), rotate=0, scale=(1, 1)).flatten().tolist()) for s in range(40)}
    assert len(seen) == 4, "two independent mirrors"


@pytest.mark.parametrize("scale", [0.85, 1.0, 1.15])
def test_affine_keeps_the_area_times_the_square_of_the_scale(scale):
    for seed in range(6):
        area = random.affine(BAR, rng(seed), scale=(scale, scale)).sum().item()
        assert area == pytest.approx(4000 * scale**2, rel=0.06)


@pytest.mark.parametrize("scale", [0.85, 1.0, 1.15])
def test_a_line_of_one_pixel_survives_in_one_piece(scale):
    for seed in range(40):
        line = random.affine(LINE, rng(seed), scale=(scale, scale))
        assert label(line[0].numpy(), np.ones((3, 3)))[1] == 1
        assert np.hypot(line.shape[1] - 1, line.shape[2] - 1) == pytest.approx(80 * scale, abs=3)
        assert line.sum().item() <= 2 * 80 * scale + 2


def test_affine_of_one_pixel_is_not_empty():
    dot = torch.zeros(1, 9, 9, dtype=torch.bool)
    dot[0, 4, 4] = True
    assert all(random.affine(dot, rng(seed), scale=(0.3, 0.3)).any() for seed in range(10))


def test_affine_refuses_empty_masks_and_bad_ranges():
    with pytest.raises(ValueError, match="empty mask"):
        random.affine(torch.zeros(1, 4, 4, dtype=torch.bool), rng())
    with pytest.raises(ValueError, match="scale"):
        random.affine(BAR, rng(), scale=(1.2, 0.8))


def test_affine_crop_is_exact_without_a_transform_and_draws_affines_mask():
    image = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.zeros(1, 12, 16, dtype=torch.bool)
    mask[0, 3:7, 5:14] = True
    patch, drawn, alpha = random.affine_crop(image, mask, rng(), rotate=0, scale=(1, 1), flip=False)
    assert drawn.all() and drawn.shape == (1, 4, 9) and torch.equal(alpha, torch.ones(1, 4, 9))
    assert torch.allclose(patch, image[:, 3:7, 5:14], atol=1e-6)
    for seed in range(5):
        assert torch.equal(random.affine_crop(image, mask, rng(seed))[1], random.affine(mask, rng(seed)))


def test_affine_crop_moves_image_and_mask_together():
    """The image is the mask itself, bright on dark: after any transform the patch is bright where its mask is set."""
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 20:30, 10:50] = True
    mask[0, 30:44, 10:18] = True
    image = torch.where(mask, 1.0, -1.0).expand(3, -1, -1).contiguous()
    for seed in range(10):
        patch, drawn, alpha = random.affine_crop(image, mask, rng(seed))
        assert patch.dtype == torch.float32 and patch.shape == (3, *drawn.shape[1:]) and alpha.shape == drawn.shape
        assert ((patch[0] > 0) == drawn[0]).float().mean() > 0.97
        assert drawn[0].any(0).all() and drawn[0].any(1).all(), "cropped to its box"


def test_affine_crop_refuses_sizes_that_differ():
    with pytest.raises(ValueError, match="but its image is"):
        random.affine_crop(torch.zeros(3, 8, 8), torch.ones(1, 8, 9, dtype=torch.bool), rng())


FOREGROUND = picture([".##.", "####", "###.", "...."])
CORNER = picture(["##", "#."])


def test_legal_corners_counted_by_hand():
    # The L of three fits at (0,1), (1,0), (1,1); at (1,2) its foot (2,2) is object too. Elsewhere it hangs over.
    assert random.Places(FOREGROUND).corners(CORNER).tolist() == [[0, 1], [1, 0], [1, 1], [1, 2]]
    for too_large in (torch.ones(1, 3, 3, dtype=torch.bool), torch.ones(1, 5, 1, dtype=torch.bool)):
        assert random.place(too_large, random.Places(FOREGROUND), rng()) is None


def test_only_the_masks_own_pixels_must_fit():
    ring = picture(["###", "#.#", "###"])
    assert random.place(ring, random.Places(ring), rng()) == (0, 0)


def test_an_empty_rim_of_the_patch_may_hang_over():
    rimmed = torch.nn.functional.pad(CORNER, (2, 1, 1, 3))
    expected = (random.Places(FOREGROUND).corners(CORNER) - [1, 2]).tolist()
    assert random.Places(FOREGROUND).corners(rimmed).tolist() == expected


def test_place_is_uniform_over_the_legal_corners():
    counts = Counter(random.place(CORNER, random.Places(FOREGROUND), rng(seed)) for seed in range(2000))
    assert set(counts) == {(0, 1), (1, 0), (1, 1), (1, 2)}
    # Standard deviation of a count is sqrt(2000 * 1/4 * 3/4) = 19.4.
    assert all(abs(count - 500) < 80 for count in counts.values())


def test_place_agrees_with_trying_every_corner():
    source = rng(7)
    allowed = torch.from_numpy(source.random((1, 20, 24)) < 0.9)
    patch = torch.from_numpy(source.random((1, 3, 4)) < 0.6)
    patch[0, 0, 0] = patch[0, 2, 3] = True
    legal = [[y, x] for y in range(18) for x in range(21) if bool((allowed[:, y : y + 3, x : x + 4] | ~patch).all())]
    assert legal and random.Places(allowed).corners(patch).tolist() == legal


def test_place_refuses_an_empty_patch():
    with pytest.raises(ValueError, match="empty patch"):
        random.place(torch.zeros(1, 2, 2, dtype=torch.bool), random.Places(FOREGROUND), rng())


def test_what_fits_nowhere_is_cut_and_never_empty():
    """A ring's middle is not in it."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    radius = ((rows - 32) ** 2 + (columns - 32) ** 2).float().sqrt()
    ring, blob = ((radius >= 20) & (radius < 24))[None], (radius < 6)[None]
    corner = random.centred(blob, ring)
    assert (random.at(blob, corner, (64, 64)) & ring).any()
    everywhere = torch.ones(1, 64, 64, dtype=torch.bool)
    assert random.centred(blob[:, 26:39, 26:39], everywhere) in {(25, 25), (25, 26), (26, 25), (26, 26)}


def test_large_frames_count_as_exactly_as_small_ones():
    """Single precision counts tens of thousands of pixels to less than a half."""
    generator = np.random.default_rng(0)
    allowed = torch.from_numpy(generator.random((1, 300, 280)) < 0.9995)
    patch = torch.from_numpy(generator.random((1, 60, 50)) < 0.8)
    legal = {
        (y, x) for y, x in generator.integers(0, [241, 231], (400, 2))
        if bool((allowed[:, y : y + 60, x : x + 50] | ~patch).all())
    }  # fmt: skip
    found = set(map(tuple, random.Places(allowed).corners(patch).tolist()))
    assert legal <= found and all((allowed[:, y : y + 60, x : x + 50] | ~patch).all() for y, x in found)


def test_depths_choose_among_legal_corners():
    whole, square = torch.ones(1, 5, 5, dtype=torch.bool), torch.ones(1, 3, 3, dtype=torch.bool)
    depth = np.zeros((5, 5))
    depth[1:4, 1:4] = 1.0
    places = random.Places(whole, depth)
    corners = places.corners(square)
    by_hand = [depth[y : y + 3, x : x + 3].mean() for y, x in corners]
    assert np.allclose(places.depths(square, corners), by_hand, atol=1e-6)
    assert {random.place(square, places, rng(seed), [1.0]) for seed in range(20)} == {(1, 1)}
    assert (1, 1) not in {random.place(square, places, rng(seed), [4 / 9]) for seed in range(20)}


def test_each_depth_has_its_share_however_many_places_are_as_deep():
    own = np.array([0.1] * 90 + [0.5] * 10)
    chances = random.chances(own, [0.1, 0.5])
    assert chances.sum() == pytest.approx(1) and chances[:90].sum() == pytest.approx(0.5, abs=1e-6)
    assert random.chances(own, [0.52])[90:].sum() == pytest.approx(1, abs=1e-6)
    assert random.chances(own, [0.9])[90:].sum() == pytest.approx(1, abs=1e-6), "the nearest where none is near"


def test_what_fits_nowhere_is_drawn_again_and_then_laid_about_the_middle():
    drawn, refused = [], Counter()

    def draw():
        drawn.append(1)
        return (torch.ones(1, 4, 4, dtype=torch.bool),)

    places = random.Places(FOREGROUND)
    _, corner = random.settle(draw, FOREGROUND, rng(), places=places, refused=refused, attempts=3)
    assert len(drawn) == 3 and refused == {"fits nowhere whole": 3}
    assert corner == random.centred(torch.ones(1, 4, 4, dtype=torch.bool), FOREGROUND)
    with pytest.raises(ValueError, match="no pixel is allowed: the foreground of the normal image is empty"):
        random.settle(draw, ~FOREGROUND & FOREGROUND, rng(), places=places)
