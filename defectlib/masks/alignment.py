"""Where a real defect lies best on a generated one: DefectSynth's alignment (Eqs. 5, 6), searched in full by FFT.

The released code tries 25 shifts of at most 8 px and 6 angles at 512 x 512; for masks farther apart than that it finds
nothing. Here every shift and a fine grid of angles are searched on the latent grid, with masks as coverage in [0, 1],
so that a crack thinner than a latent cell still counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

ANGLES = 120
"""Steps of a full turn: at 3 degrees the end of a defect as long as the frame misses its best place by one cell."""
TIE = 1e-4
"""Overlaps within this share of the largest are equal: single-precision transforms do not tell them apart."""


class Motion(NamedTuple):
    """A turn about a centre, then a shift, in cells of the grid it was found on.

    Attributes:
        dy: Rows down.
        dx: Columns to the right.
        angle: Degrees in (-180, 180], clockwise as seen on the screen.
        overlap: Eq. 5's sum, in cells.
        centre: Row and column of the real mask's centroid. The paper leaves the centre of rotation open.
    """

    dy: int
    dx: int
    angle: float
    overlap: float
    centre: tuple[float, float]


def coverage(mask: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Share of each cell that is defect: bool (1, H, W) -> float32 (1, h, w) in [0, 1]; nothing thin gets lost."""
    return F.adaptive_avg_pool2d(mask.float(), size)


# Eq. 5: t*, theta* = argmax sum_ij M_r^{t, theta}(ij) M_g(ij), over all shifts t at once by the correlation theorem.
def align(real: Tensor, generated: Tensor, angles: int = ANGLES) -> Motion:
    """The motion that lays the real mask on the generated one with the largest overlap.

    Both grids are padded with zeros, so nothing wraps around. A turned coverage is scaled to the sum that it had, so
    that no angle wins by interpolation alone. Among equal overlaps the smallest motion wins (mean square over the
    mask's cells), then the smallest angle's index, dy and dx.

    Args:
        real: M_r, coverage float (1, h, w) in [0, 1], or bool.
        generated: M_g, the same.
        angles: Steps of a full turn to try, at least 1; the first is 0.

    Returns:
        The motion; its angle is a multiple of 360 / ``angles`` degrees.

    Raises:
        ValueError: A mask is empty, or the sizes differ.
    """
    if real.shape != generated.shape:
        raise ValueError(f"the real mask is {tuple(real.shape)} but the generated one is {tuple(generated.shape)}")
    if not (real.any() and generated.any()):
        raise ValueError("an empty mask cannot be aligned; leave the pair out")
    weights, target = real[0].float(), generated[0].float()
    cells = weights.nonzero().float()
    mass = weights[weights > 0]
    centre = (mass[:, None] * cells).sum(0) / mass.sum()
    gyration = (mass * (cells - centre).square().sum(1)).sum() / mass.sum()
    # The real mask is turned on a canvas of its own, wide enough for every angle, and the generated one is cut out.
    reach = math.ceil((cells - centre).norm(dim=1).max().item()) + 1
    base = centre.round().long()
    line = torch.arange(-reach, reach + 1).float()
    turns = torch.arange(angles) * (2 * math.pi / angles)
    rows, columns = _sources(line + base[0], line + base[1], turns, centre)
    turned = _sample(weights[None].expand(angles, 1, -1, -1), rows, columns, "zeros")[:, 0]
    turned = turned * (mass.sum() / turned.sum((1, 2), keepdim=True).clamp_min(1e-12))
    filled = target.nonzero()
    first, last = filled.amin(0), filled.amax(0) + 1
    target = target[first[0] : last[0], first[1] : last[1]]
    side = len(line)
    shape = [next_fast_len(side + length - 1, real=True) for length in target.shape]
    product = torch.fft.rfft2(turned, shape).conj() * torch.fft.rfft2(target, shape)
    overlaps = torch.fft.irfft2(product, shape)
    best = overlaps >= overlaps.max() * (1 - TIE)
    index = best.nonzero()
    # Entry s is the shift s, or s - length beyond the target's own extent: the circle holds all of both, once.
    shift = index[:, 1:] - torch.where(index[:, 1:] >= torch.tensor(target.shape), torch.tensor(shape), 0)
    shift = shift + first - (base - reach)
    motion = shift.double().square().sum(1) + 4 * (turns[index[:, 0]] / 2).sin().square().double() * gyration
    winner = int(motion.argmin())
    angle = 360 / angles * int(index[winner, 0])
    return Motion(
        *(int(value) for value in shift[winner]),
        angle if angle <= 180 else angle - 360,
        float(overlaps[tuple(index[winner])]),
        (float(centre[0]), float(centre[1])),
    )


# Eq. 6: z_r' = R_theta*(T_t*(z_r)).
def apply(latents: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """Latents moved by a motion, bilinearly.

    A turn about the mask's centroid and then the shift is the same as Eq. 6's shift and then the turn, about where the
    centroid has come to lie. What comes from outside the frame repeats the border's values: zeros would be a colour of
    their own to a latent. The second result says where that happened.

    Args:
        latents: z_r, float (C, h, w), on the grid that the motion was found on.
        motion: From :func:`align`.

    Returns:
        z_r', float (C, h, w), and bool (1, h, w): True where the value comes from inside the frame.
    """
    height, width = latents.shape[1:]
    centre = torch.tensor(motion.centre)
    turn = torch.tensor([math.radians(motion.angle)])
    rows, columns = _sources(
        torch.arange(height).float() - motion.dy, torch.arange(width).float() - motion.dx, turn, centre
    )
    rows, columns = rows.to(latents.device), columns.to(latents.device)
    moved = _sample(latents[None], rows, columns, "border")[0]
    slack = 0.5 + 1e-4
    inside = (rows >= -slack) & (rows <= height - 1 + slack) & (columns >= -slack) & (columns <= width - 1 + slack)
    return moved, inside


def _sources(rows: Tensor, columns: Tensor, turns: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Where the cells (rows x columns) of the turned grids come from: two (angles, h, w), in cells."""
    y, x = (rows - centre[0])[None, :, None], (columns - centre[1])[None, None, :]
    cos, sin = turns.cos()[:, None, None], turns.sin()[:, None, None]
    return centre[0] + y * cos - x * sin, centre[1] + x * cos + y * sin


def _sample(grids: Tensor, rows: Tensor, columns: Tensor, outside: str) -> Tensor:
    """Bilinear values (N, C, h, w) of grids (N, C, H, W) at rows and columns (N, h, w)."""
    height, width = grids.shape[2:]
    at = torch.stack([columns * (2 / max(width - 1, 1)) - 1, rows * (2 / max(height - 1, 1)) - 1], -1)
    return F.grid_sample(grids, at.to(grids.dtype), "bilinear", outside, align_corners=True)
