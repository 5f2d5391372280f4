import itertools

import numpy as np
import pytest
import torch

from defectlib.masks.alignment import Motion, align, apply, coverage


def picture(rows):
    return torch.tensor([[[cell == "#" for cell in row] for row in rows]])


def box(size, y, x, height, width):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, y : y + height, x : x + width] = True
    return mask


def moved_overlap(real, generated, dy, dx):
    """Eq. 5's sum for one shift, by slicing a frame with wide margins."""
    _, h, w = real.shape
    frame = torch.zeros(1, 3 * h, 3 * w)
    frame[:, h + dy : 2 * h + dy, w + dx : 2 * w + dx] = real
    return (frame[:, h : 2 * h, w : 2 * w] * generated).sum().item()


def test_coverage_keeps_what_is_thinner_than_a_cell():
    line = box(16, 5, 0, 1, 16)
    assert coverage(line, 4)[0].tolist() == [[0] * 4, [0.25] * 4, [0] * 4, [0] * 4]


def test_a_shift_by_hand():
    # An L of three cells, down by 3 and to the left by 2.
    real = picture(["..#...", "..##..", "......", "......", "......", "......"])
    generated = picture(["......", "......", "......", "#.....", "##....", "......"])
    assert align(real, generated) == Motion(3, -2, 0.0, pytest.approx(3), (pytest.approx(2 / 3), pytest.approx(7 / 3)))


@pytest.mark.parametrize("seed", range(6))
def test_without_turns_it_is_the_maximum_over_every_shift(seed):
    rng = np.random.default_rng(seed)
    real = torch.from_numpy((rng.random((1, 9, 7)) * (rng.random((1, 9, 7)) < 0.3)).astype(np.float32))
    generated = torch.from_numpy((rng.random((1, 9, 7)) * (rng.random((1, 9, 7)) < 0.3)).astype(np.float32))
    sums = [moved_overlap(real, generated, dy, dx) for dy, dx in itertools.product(range(-8, 9), range(-6, 7))]
    motion = align(real, generated, angles=1)
    assert motion.overlap == pytest.approx(max(sums), rel=1e-3)
    assert moved_overlap(real, generated, motion.dy, motion.dx) == pytest.approx(max(sums), rel=1e-3)


def test_opposite_corners_meet_and_nothing_wraps_around():
    motion = align(box(16, 0, 0, 2, 2), box(16, 14, 14, 2, 2))
    assert motion[:3] == (14, 14, 0.0) and motion.overlap == pytest.approx(4)
    # Round the border the left and right columns would be neighbours: three columns of overlap instead of two.
    split = box(16, 4, 0, 4, 1) | box(16, 4, 14, 4, 2)
    assert align(box(16, 4, 6, 4, 3), split, angles=1).overlap == pytest.approx(8)


@pytest.mark.parametrize(("angle", "up"), [(90.0, False), (30.0, False), (-60.0, True)])
def test_a_turned_copy_is_found(angle, up):
    real = torch.zeros(1, 64, 64)
    real[0, 30:34, 14:44] = 1
    real[0, 22:30, 14:18] = 1
    centre = tuple(real[0].nonzero().float().mean(0).tolist())
    generated, _ = apply(real, Motion(-5 if up else 4, 7, angle, 0.0, centre))
    motion = align(real, generated)
    assert motion[:3] == (-5 if up else 4, 7, angle)
    assert motion.overlap > 0.9 * generated.sum()


def test_turning_finds_what_shifting_cannot():
    bar, post = box(32, 15, 6, 2, 20), box(32, 6, 20, 20, 2)
    assert align(bar, post, angles=1).overlap == pytest.approx(4, rel=1e-3)
    turned = align(bar, post)
    assert turned.overlap == pytest.approx(40, rel=0.02) and abs(turned.angle) == 90


@pytest.mark.parametrize("seed", range(4))
def test_a_crack_of_one_pixel_is_found_at_latent_resolution(seed):
    rng = np.random.default_rng(seed)
    path = np.cumsum(np.stack([np.full(300, 0.35), np.cos(np.arange(300) / 40 + seed)], 1) * 0.8, 0)
    at = np.rint(path - path.min(0) + 110).astype(int)
    real = torch.zeros(1, 512, 512, dtype=torch.bool)
    real[0, at[:, 0], at[:, 1]] = True
    dy, dx = (8 * rng.integers(-12, 13, 2)).tolist()
    motion = align(coverage(real, 64), coverage(real.roll((dy, dx), (1, 2)), 64))
    assert motion[:3] == (dy // 8, dx // 8, 0.0)


def test_among_equal_overlaps_the_smallest_motion_wins():
    """A small box fits a large one in many places, a disc at every angle."""
    inside = align(box(32, 3, 3, 2, 2), box(32, 8, 2, 16, 16))
    assert inside[:3] == (5, 0, 0.0) and inside.overlap == pytest.approx(4, rel=1e-3)
    assert align(box(32, 10, 10, 2, 2), box(32, 8, 2, 16, 16))[:3] == (0, 0, 0.0)


def test_no_angle_gains_mass_by_interpolation():
    rng = np.random.default_rng(0)
    real = torch.from_numpy((rng.random((1, 24, 24)) < 0.1).astype(np.float32))
    whole = torch.ones(1, 24, 24)
    real[:, :8], real[:, 16:], real[..., :8], real[..., 16:] = 0, 0, 0, 0
    motion = align(real, whole)
    assert motion[:3] == (0, 0, 0.0) and motion.overlap == pytest.approx(real.sum().item(), rel=1e-3)


def test_apply_shifts_whole_cells_and_says_what_came_from_outside():
    latents = torch.arange(24.0).view(2, 3, 4)
    moved, inside = apply(latents, Motion(1, -2, 0.0, 0.0, (1.0, 1.5)))
    assert torch.allclose(moved[0], torch.tensor([[2.0, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]))
    assert torch.allclose(moved[1], moved[0] + 12)
    assert inside[0].tolist() == [[False] * 4, [True, True, False, False], [True, True, False, False]]


def test_apply_turns_clockwise_about_the_centre():
    latents = torch.zeros(1, 5, 5)
    latents[0, 2, 4] = 1.0
    moved, inside = apply(latents, Motion(0, 0, 90.0, 0.0, (2.0, 2.0)))
    assert moved[0].argmax() == 4 * 5 + 2 and moved.sum().item() == pytest.approx(1, abs=1e-5) and inside.all()
    assert not torch.allclose(moved, latents)


def test_the_motion_is_that_of_the_mask():
    """Eq. 6 moves latents as Eq. 5 moved the mask: the mask itself, moved, lies on the generated one."""
    real, generated = box(32, 4, 4, 3, 13), box(32, 12, 20, 13, 3)
    motion = align(real, generated)
    moved, _ = apply(real.float(), motion)
    assert (moved * generated).sum().item() == pytest.approx(motion.overlap, rel=0.02) and motion.overlap > 38


def test_refuses_empty_masks_and_sizes_that_differ():
    with pytest.raises(ValueError, match="empty mask"):
        align(box(8, 0, 0, 0, 0), box(8, 1, 1, 2, 2))
    with pytest.raises(ValueError, match="but the generated one is"):
        align(box(8, 1, 1, 2, 2), box(9, 1, 1, 2, 2))
