import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_fill_holes, label

from defectlib.masks import interpolation, points
from defectlib.masks.interpolation import (
    branch,
    flaws,
    hmi_image,
    interpolate,
    mask_iou,
    redraw,
    slerp,
    threshold,
    weights,
)
from defectlib.types import Shot


def box(size, y, x, height, width):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, y : y + height, x : x + width] = True
    return mask


def disc(size, y, x, radius):
    rows, columns = np.mgrid[0:size, 0:size]
    return torch.from_numpy(np.hypot(rows - y, columns - x) < radius)[None]


def curve(size, seed, length=60):
    """A wandering line of one pixel."""
    rng = np.random.default_rng(seed)
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.05, 2 * length))
    path = np.cumsum(0.5 * np.stack([np.sin(heading), np.cos(heading)], 1), 0)
    at = np.rint(path - path.min(0) + rng.uniform(0, size - 1 - np.ptp(path, axis=0))).astype(int)
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, at[:, 0], at[:, 1]] = True
    return mask


def centroid(mask):
    return np.argwhere(mask[0].numpy()).mean(0)


def rows(mask):
    return ["".join(".#"[value] for value in row) for row in mask[0].int().tolist()]


# weights, branch, slerp, threshold


def test_weights_by_hand():
    assert weights(3).tolist() == [0.25, 0.5, 0.75]
    assert len(weights()) == 10 and weights().min() > 0 and weights().max() < 1


def test_branch_goes_by_the_mean_area_ratio():
    # 0.04 and 0.06 have the mean 0.05, 0.04 and 0.0676 have 0.0538.
    small, middle, large = box(50, 0, 0, 10, 10), box(50, 0, 0, 10, 15), box(50, 0, 0, 13, 13)
    assert branch([small, middle]) == "image" and branch([small, large]) == "latent"
    assert branch([small], tau=0.04) == "latent", "at the threshold itself"


def test_slerp_by_hand():
    x, y = torch.zeros(2, 1, 1), torch.zeros(2, 1, 1)
    x[0], y[1] = 1.0, 1.0
    assert slerp(x, y, 0.5).flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert slerp(x, y, 1 / 3).flatten().tolist() == pytest.approx([math.cos(math.pi / 6), 0.5])
    assert slerp(x, 3 * y, 0.5).flatten().tolist() == pytest.approx([math.sqrt(0.5), 3 * math.sqrt(0.5)])


def test_slerp_keeps_the_norm_of_noise_where_the_straight_line_does_not():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 4, 16, 16, generator=generator)
    half = slerp(a, b, 0.5)
    assert half.dtype == torch.float32 and half.square().mean().item() == pytest.approx(1, abs=0.1)
    assert ((a + b) / 2).square().mean().item() < 0.6
    assert torch.equal(slerp(a, b, 0.3)[1], slerp(a[1], b[1], 0.3)), "each sample along its own arc"
    assert torch.allclose(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)


def test_slerp_without_an_arc_takes_the_straight_line():
    a = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(slerp(a, a, 0.3), a, atol=1e-6)
    assert torch.allclose(slerp(a, 2 * a, 0.5), 1.5 * a, atol=1e-6)
    assert torch.allclose(slerp(a, torch.zeros_like(a), 0.25), 0.75 * a, atol=1e-6)
    assert slerp(a, -a, 0.5).abs().max() < 1e-6 and slerp(0 * a, 0 * a, 0.5).abs().max() == 0


def test_threshold_by_hand():
    # Grey 0.25, 0.6 and 1 on black.
    image = torch.full((3, 1, 4), -1.0)
    image[:, 0, 1], image[:, 0, 2], image[:, 0, 3] = -0.5, 0.2, 1.0
    assert threshold(image).tolist() == [[[False, False, True, True]]]
    assert threshold(torch.tensor([1.0, 1.0, -1.0])[:, None, None]).all(), "the mean of the channels"


# pairing


def test_raster_resamples_the_shorter_list_linearly():
    # Three points onto five: every second one lies half way between two.
    short, long = np.array([[0, 0], [0, 2], [0, 4]]), np.array([[9, c] for c in range(5)])
    pairs = points.raster(short, long)
    assert pairs.first.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4]] and pairs.second.tolist() == long.tolist()


def test_raster_fills_gaps_above_two_pixels():
    pairs = points.raster(np.array([[0, 0], [0, 2], [0, 6]]), np.array([[5, 0], [5, 2], [5, 4]]))
    assert pairs.first[3:].tolist() == [[0, 3], [0, 4], [0, 5]]
    assert pairs.second[3:].tolist() == [[5, 2.5], [5, 3], [5, 3.5]]


def test_raster_by_hand():
    first, second = box(9, 0, 0, 1, 4), box(9, 4, 4, 1, 4)
    frame = interpolate(first, second, 0.5, form="raster")
    assert torch.equal(frame.masks[0], box(9, 2, 2, 1, 4)) and frame.refused == ("",)


@pytest.mark.parametrize("form", ["raster", "transport"])
def test_a_moved_copy_moves_in_a_straight_line(form):
    mask = disc(64, 16, 18, 7.3)
    moved = mask.roll((20, 28), (1, 2))
    frames = interpolate(mask, moved, [0.25, 0.5], form)
    assert torch.equal(frames.masks[0], mask.roll((5, 7), (1, 2)))
    assert torch.equal(frames.masks[1], mask.roll((10, 14), (1, 2)))


@pytest.mark.parametrize("form", ["raster", "transport"])
def test_weights_zero_and_one_give_the_masks_themselves(form):
    first, second = curve(48, 0, 30), disc(48, 20, 30, 9)
    frames = interpolate(first, second, [0, 1], form)
    assert torch.equal(frames.masks[0], first) and torch.equal(frames.masks[1], second)


def test_transport_turns_a_bar_where_raster_smears_it():
    """From lying to standing: half way it is a bar of the same size at 45 degrees."""
    lying, standing = box(96, 46, 20, 3, 55), box(96, 20, 46, 55, 3)
    half = interpolate(lying, standing, 0.5).masks[0]
    spread = np.linalg.eigvalsh(np.cov(np.argwhere(half[0].numpy()).T, bias=True))
    assert np.sqrt(12 * spread) == pytest.approx([3, 55], abs=1.5)
    assert half.sum().item() == pytest.approx(165, rel=0.15)


def test_transport_changes_size_by_area():
    # Areas 78.5 and 1963: half way 1021, a radius of 18.
    frames = interpolate(disc(128, 30, 30, 5), disc(128, 90, 90, 25), [0.5])
    assert frames.masks.sum().item() == pytest.approx(1021, rel=0.05) and frames.refused == ("",)
    assert centroid(frames.masks[0]) == pytest.approx([60, 60], abs=1)


def test_between_a_disc_and_a_line_there_is_no_fat_oval():
    """Interpolated entry by entry the stretch gives an oval of 2.7 times the area."""
    frames = interpolate(disc(256, 60, 60, 11.3), box(256, 200, 28, 2, 200), [0.5])
    assert frames.masks.sum().item() == pytest.approx(400, rel=0.35)


def test_a_turned_grid_leaves_no_holes():
    half = interpolate(box(96, 30, 10, 35, 60), box(96, 10, 30, 60, 35), 0.5).masks[0, 0].numpy()
    assert np.array_equal(binary_fill_holes(half), half) and half.sum() == pytest.approx(2100, rel=0.05)


def test_what_turns_at_the_border_stays_inside():
    """A bar in the corner, along two borders: half way it would reach out of the frame."""
    frames = interpolate(box(64, 0, 0, 3, 40), box(64, 0, 0, 40, 3), [0.25, 0.5, 0.75])
    assert frames.masks.sum((1, 2, 3)).min() > 0.9 * 120


def test_transport_is_the_same_from_either_side():
    first, second = box(64, 10, 8, 20, 7), disc(64, 40, 44, 9)
    there, back = interpolate(first, second, [0.25]), interpolate(second, first, [0.75])
    assert torch.equal(there.masks, back.masks)


def test_a_division_is_torn_not_drawn_out():
    one, two = disc(96, 48, 48, 12), disc(96, 20, 48, 8) | disc(96, 76, 48, 8)
    late = interpolate(one, two, 0.8)
    assert label(late.masks[0, 0].numpy(), np.ones((3, 3)))[1] == 2 and late.refused == ("",)


# what must work


def pairs_of(kind, seed):
    rng = np.random.default_rng(seed)
    if kind == "cracks":
        return curve(96, 2 * seed), curve(96, 2 * seed + 1, 40)
    if kind == "pieces":
        y = rng.integers(14, 80, 4)
        return tuple(
            disc(96, y[2 * i], 20, rng.uniform(3, 8)) | disc(96, y[2 * i + 1], 72, rng.uniform(3, 8)) for i in (0, 1)
        )
    if kind == "borders":
        return box(96, 0, rng.integers(0, 60), 6, 30), box(96, rng.integers(0, 60), 0, 30, 6)
    return disc(96, *rng.integers(6, 90, 2), 1.2), disc(96, 48, 48, rng.uniform(20, 40))


@pytest.mark.parametrize("kind", ["pieces", "borders", "sizes"])
def test_every_frame_is_kept(kind):
    for seed in range(6):
        frames = interpolate(*pairs_of(kind, seed))
        assert not any(frames.refused), (kind, seed, frames.refused)
        assert len(frames.kept) == 10


def test_cracks_of_one_pixel_stay_whole_and_thin():
    for seed in range(6):
        first, second = pairs_of("cracks", seed)
        frames = interpolate(first, second)
        assert not any(frames.refused), (seed, frames.refused)
        for mask in frames.masks[:, 0].numpy():
            assert label(mask, np.ones((3, 3)))[1] == 1
            # No pixel's 3 x 3 neighbourhood is full: nowhere is the line three pixels wide.
            thick = torch.nn.functional.avg_pool2d(torch.from_numpy(mask).float()[None, None], 3, 1) > 0.99
            assert thick.sum() <= 3


def test_without_pairing_pieces_the_papers_order_keeps_no_frame_of_two():
    first, second = (disc(96, y, 20, 6) | disc(96, z, 72, 6) for y, z in ((20, 76), (70, 24)))
    printed = interpolate(first, second, form="raster", by_piece=False)
    assert len(printed.kept) == 0 and all("pieces instead of 2" in r or "its area" in r for r in printed.refused)
    assert len(interpolate(first, second, form="raster").kept) == 10


def test_refusals_say_why():
    assert interpolation.refusal(box(8, 0, 0, 2, 2), 9 / 64, (1, 1)).startswith("its area is 0.44 times")
    assert interpolation.refusal(box(8, 0, 0, 2, 2), 1.9 / 64, (1, 1)).startswith("its area is 2.11 times")
    torn = box(8, 0, 0, 2, 2) | box(8, 5, 5, 2, 2)
    assert interpolation.refusal(torn, 8 / 64, (1, 1)) == "it has 2 pieces instead of 1"
    assert interpolation.refusal(torn, 8 / 64, (1, 3)) == ""
    assert interpolation.refusal(torn, 8 / 64, (5, 3)) == "it has 2 pieces instead of 3 to 5"
    assert interpolation.refusal(torn, 8 / 64, (1, 2)) == "", "the endpoints do not agree"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((box(8, 0, 0, 2, 2), box(9, 0, 0, 2, 2)), "resize one"),
        ((box(8, 0, 0, 2, 2), box(8, 0, 0, 0, 0)), "empty mask"),
        ((box(8, 0, 0, 2, 2), box(8, 0, 0, 2, 2), 1.5), "weights in"),
        ((box(8, 0, 0, 2, 2), box(8, 0, 0, 2, 2), 0.5, "spline"), "form must be"),
    ],
)
def test_interpolate_refuses(arguments, match):
    with pytest.raises(ValueError, match=match):
        interpolate(*arguments)


# how good masks are, and how many were not


def test_mask_iou_counts_shape_not_place():
    bar = box(64, 10, 10, 5, 21)
    assert mask_iou(box(64, 30, 40, 21, 5), [bar]) == pytest.approx(1, abs=0.02), "moved and turned"
    # Half the length inside the whole: 50 of 105 px.
    assert mask_iou(box(64, 30, 30, 5, 10), [bar]) == pytest.approx(50 / 105, abs=0.02)
    assert mask_iou(disc(64, 30, 30, 6), [bar]) < 0.6 and mask_iou(box(64, 0, 0, 0, 0), [bar]) == 0
    assert mask_iou(bar, [disc(64, 30, 30, 6), bar]) == pytest.approx(1), "the best of the real ones"


def test_flaws_by_hand():
    allowed = box(20, 0, 0, 20, 10)
    areas = (0.04, 0.1)
    assert flaws(box(20, 2, 2, 5, 5), allowed, areas) == ()
    assert flaws(box(20, 0, 0, 0, 0), allowed, areas) == ("empty",)
    assert flaws(box(20, 2, 6, 5, 5), allowed, areas) == ("outside the foreground",)
    # 8 px are 0.02, half the smallest; 7 px are less. 81 px are more than 0.2, twice the largest.
    assert flaws(box(20, 2, 2, 2, 4), allowed, areas) == ()
    assert flaws(box(20, 2, 2, 1, 7), allowed, areas) == ("area outside the real range",)
    assert flaws(box(20, 2, 2, 9, 9), box(20, 0, 0, 1, 1), areas) == (
        "outside the foreground", "area outside the real range",
    )  # fmt: skip


def test_redraw_counts_what_it_refuses():
    draws = iter(["torn", box(8, 0, 0, 0, 0), box(8, 1, 1, 2, 2)])
    mask, counts = redraw(
        lambda rng: next(draws), np.random.default_rng(0), lambda mask: [] if mask.any() else ["empty"], "nut/crack"
    )
    assert torch.equal(mask, box(8, 1, 1, 2, 2)) and counts == Counter(torn=1, empty=1)


def test_redraw_gives_up_and_says_what_was_wrong():
    with pytest.raises(ValueError, match=r"none of 5 masks drawn for nut/crack could be used: empty 5 x"):
        redraw(lambda rng: box(8, 0, 0, 0, 0), np.random.default_rng(0), lambda mask: ["empty"], "nut/crack", 5)


def shot(mask, name):
    return Shot(torch.zeros(3, *mask.shape[1:]), mask, "plate", "scratch", name)


def test_hmi_image_draws_between_the_shots():
    shots = [shot(box(64, 10, 10, 4, 20), "a"), shot(box(64, 40, 30, 4, 20), "b"), shot(box(64, 20, 30, 20, 4), "c")]
    normal = torch.zeros(3, 64, 64)
    drawn = [hmi_image(np.random.default_rng(seed), shots, normal) for seed in range(8)]
    assert all(mask.dtype == torch.bool and mask.shape == (1, 64, 64) for mask in drawn)
    assert all(40 <= mask.sum() <= 160 for mask in drawn)
    assert len({mask.numpy().tobytes() for mask in drawn}) >= 6
    assert torch.equal(drawn[3], hmi_image(np.random.default_rng(3), shots, normal)), "a function of its generator"


def test_hmi_image_lies_on_the_object():
    object_ = disc(64, 20, 20, 15)
    normal = torch.where(object_, 0.6, -0.6).expand(3, -1, -1).contiguous()
    shots = [shot(box(64, 15, 14, 3, 9), "a"), shot(box(64, 22, 18, 3, 9), "b")]
    assert (hmi_image(np.random.default_rng(0), shots, normal) & ~disc(64, 20, 20, 17)).sum() == 0
    away = [shot(box(64, 50, 40, 3, 9), "a"), shot(box(64, 55, 45, 3, 9), "b")]
    moved = hmi_image(np.random.default_rng(0), away, normal)
    assert moved.sum() > 20 and (moved & ~disc(64, 20, 20, 17)).sum() == 0, "the shots' object lay elsewhere"


def test_refused_draws_are_counted(monkeypatch):
    verdicts = iter(["area", "pieces", ""])
    monkeypatch.setattr("defectlib.masks.interpolation.flaws", lambda *_: [v for v in [next(verdicts)] if v])
    shots, refused = [shot(box(64, 10, 10, 4, 20), "a"), shot(box(64, 40, 30, 4, 20), "b")], Counter()
    hmi_image(np.random.default_rng(0), shots, torch.zeros(3, 64, 64), refused)
    assert refused == {"area": 1, "pieces": 1}


def test_hmi_image_of_one_shot_says_what_to_do():
    with pytest.raises(ValueError, match="needs two masks of plate/scratch and there is one.*'affine'"):
        hmi_image(np.random.default_rng(0), [shot(box(16, 2, 2, 3, 3), "a")], torch.zeros(3, 16, 16))


def test_a_mask_outside_the_foreground_is_moved_the_shortest_way_in():
    allowed = box(32, 4, 4, 20, 20)
    inside, over, away = box(32, 6, 6, 4, 4), box(32, 10, 20, 4, 4), box(32, 27, 27, 4, 4)
    assert torch.equal(interpolation.settled(inside, allowed), inside)
    assert torch.equal(interpolation.settled(over, allowed), over), "all of it is inside"
    assert torch.equal(interpolation.settled(box(32, 10, 22, 4, 4), allowed), over), "two columns to the left"
    assert torch.equal(interpolation.settled(away, allowed), box(32, 20, 20, 4, 4))
    assert torch.equal(interpolation.settled(away, torch.zeros_like(allowed)), away), "there is no way in"
