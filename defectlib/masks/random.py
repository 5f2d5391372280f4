"""Random masks: Perlin noise, turned and scaled copies of real masks, and places where a mask may lie.

Every function takes one numpy generator and draws from nothing else. Masks are bool (1, H, W), True is defect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import map_coordinates
from torch import Tensor

# Points along each side of a pixel when coverage is measured.
_SUBPIXELS = 6
ATTEMPTS = 8
"""Drawings of a moved mask until one fits whole."""
NEARNESS = 0.05
"""How near in depth a place is that counts as one of a shot's; 1 is the object's deepest."""


def perlin(
    rng: np.random.Generator,
    size: int,
    area: tuple[float, float] = (0.01, 0.20),
    scales: tuple[int, ...] = (2, 4, 8, 16),
    rotate: float = 90.0,
    allowed: Tensor | None = None,
) -> Tensor:
    """A mask of thresholded Perlin noise, in the manner of DRAEM (Zavrtanik et al. 2021, section 3.1).

    DRAEM thresholds at 0.5 and takes whatever area comes out; here the threshold is the noise's own quantile, so that
    the area ratio is uniform in ``area``.

    Args:
        rng: Source of scales, gradients, rotation and area.
        size: Side in px.
        area: Smallest and largest share of the image to cover.
        scales: Cells along a side to choose from, for each axis by itself.
        rotate: The lattice is turned by up to this many degrees either way.
        allowed: Where pixels may be set, bool (1, size, size); anywhere if None. Where it is smaller than the area
            drawn, it is filled.

    Returns:
        bool (1, size, size) with at least one pixel set.

    Raises:
        ValueError: ``area`` is not 0 < low <= high < 1, or ``allowed`` is empty.
    """
    low, high = area
    if not 0 < low <= high < 1:
        raise ValueError(f"area must satisfy 0 < low <= high < 1, got ({low}, {high})")
    cells = rng.choice(scales, 2)
    turn = np.deg2rad(rng.uniform(-rotate, rotate))
    gradients = rng.uniform(0, 2 * np.pi, tuple(2 * cells + 3))
    target = max(1, round(rng.uniform(low, high) * size * size))
    line = (np.arange(size) + 0.5) / size - 0.5
    y, x = line[:, None], line[None, :]
    # A turned unit square reaches at most 0.71 from its middle: the lattice is twice as wide as the image.
    rows = (y * np.cos(turn) + x * np.sin(turn) + 1) * cells[0]
    columns = (x * np.cos(turn) - y * np.sin(turn) + 1) * cells[1]
    noise = _gradient_noise(rows, columns, gradients)
    if allowed is not None:
        if not allowed.any():
            raise ValueError("no pixel is allowed: the foreground of the normal image is empty")
        noise[~allowed[0].numpy()] = -np.inf
        target = min(target, int(allowed.sum()))
    mask = np.zeros(size * size, bool)
    mask[np.argsort(-noise, axis=None, kind="stable")[:target]] = True
    return torch.from_numpy(mask.reshape(1, size, size))


def _gradient_noise(rows: NDArray, columns: NDArray, angles: NDArray) -> NDArray:
    """Perlin's gradient noise at lattice coordinates, with his quintic fade (Perlin 2002)."""
    i, j = np.floor(rows).astype(int), np.floor(columns).astype(int)
    fy, fx = rows - i, columns - j

    def corner(down: int, right: int) -> NDArray:
        angle = angles[i + down, j + right]
        return (fy - down) * np.sin(angle) + (fx - right) * np.cos(angle)

    sy, sx = (f * f * f * (f * (6 * f - 15) + 10) for f in (fy, fx))
    top = corner(0, 0) + sx * (corner(0, 1) - corner(0, 0))
    bottom = corner(1, 0) + sx * (corner(1, 1) - corner(1, 0))
    return top + sy * (bottom - top)


def affine(
    mask: Tensor,
    rng: np.random.Generator,
    rotate: float = 360.0,
    scale: tuple[float, float] = (0.85, 1.15),
    flip: bool = True,
) -> Tensor:
    """A mask flipped, turned and scaled about its own centroid, cropped to its box.

    The ranges are those of AdaBLDM's composite generator; height and width stay what they were, times the scale (its
    released code exchanges the two). A pixel is set where at least half of it is covered, or ``scale / 2`` when it
    shrinks, so that a line of one pixel survives.

    Args:
        mask: bool (1, H, W), not empty.
        rng: Source of flip, angle and scale.
        rotate: The angle is uniform in [0, rotate) degrees.
        scale: The scale is uniform in this range, the same for both axes.
        flip: Mirror each axis with probability one half.

    Returns:
        bool (1, h, w), cropped to the defect.

    Raises:
        ValueError: The mask is empty or a range is impossible.
    """
    return _warp(None, mask, rng, rotate, scale, flip)[1]


def affine_crop(
    image: Tensor,
    mask: Tensor,
    rng: np.random.Generator,
    rotate: float = 360.0,
    scale: tuple[float, float] = (0.85, 1.15),
    flip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The defect of an image cut out, with the same transform applied to image and mask: what Crop-Paste pastes.

    Args:
        image: float32 (3, H, W) in [-1, 1].
        mask: bool (1, H, W), not empty.
        rng: As in :func:`affine`, which draws the same mask from an equal generator.
        rotate: As in :func:`affine`.
        scale: As in :func:`affine`.
        flip: As in :func:`affine`.

    Returns:
        Patch float32 (3, h, w) in [-1, 1], its mask bool (1, h, w), and the coverage float32 (1, h, w) in [0, 1] that
        the mask was thresholded from, for soft edges.

    Raises:
        ValueError: The mask is empty, differs in size from the image, or a range is impossible.
    """
    if image.shape[1:] != mask.shape[1:]:
        raise ValueError(f"the mask is {tuple(mask.shape[1:])} but its image is {tuple(image.shape[1:])}")
    return _warp(image, mask, rng, rotate, scale, flip)


def _warp(
    image: Tensor | None,
    mask: Tensor,
    rng: np.random.Generator,
    rotate: float,
    scale: tuple[float, float],
    flip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values = mask[0].numpy()
    if not values.any():
        raise ValueError("an empty mask cannot be transformed; leave the pair out or correct the mask")
    low, high = scale
    if not 0 < low <= high or rotate < 0:
        raise ValueError(f"scale must satisfy 0 < low <= high and rotate >= 0, got {scale} and {rotate}")
    mirror = rng.choice([1.0, -1.0], 2) if flip else np.ones(2)
    angle, zoom = np.deg2rad(rng.uniform(0, rotate)), rng.uniform(low, high)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    ys, xs = np.nonzero(values)
    # About the lattice's origin instead of the centroid: after the crop only a fraction of a pixel tells them apart,
    # and mirrors and quarter turns map pixels on pixels exactly.
    forward = zoom * turn @ np.diag(mirror)
    moved = forward @ np.stack([ys, xs]).astype(float)
    reach = zoom * np.sqrt(0.5) + 1
    top = np.floor(moved.min(axis=1) - reach).astype(int)
    bottom = np.ceil(moved.max(axis=1) + reach).astype(int)
    backward = np.linalg.inv(forward)
    height, width = bottom - top + 1

    def source(subpixels: int) -> NDArray:
        """Where each point of the result lies in the original, (2, height * k, width * k)."""
        offsets = (np.arange(subpixels) + 0.5) / subpixels - 0.5
        rows = (np.arange(height)[:, None] + offsets).ravel() + top[0]
        columns = (np.arange(width)[:, None] + offsets).ravel() + top[1]
        return backward[:, :1, None] * rows[:, None] + backward[:, 1:, None] * columns

    k = _SUBPIXELS
    # A pixel is a square, so its value at the sub-pixels measures area. A nudge keeps points off the squares' edges.
    framed = np.pad(values, 1)
    nearest = np.floor(source(k) + (1.5 + 1e-7)).astype(np.intp)
    for axis, side in zip(nearest, framed.shape):
        np.clip(axis, 0, side - 1, out=axis)
    cover = framed[tuple(nearest)].reshape(height, k, width, k).mean(axis=(1, 3))
    drawn = cover >= 0.5 * min(1.0, zoom) - 1e-6
    if not drawn.any():
        drawn = cover >= cover.max()
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    patch = torch.zeros(0)
    if image is not None:
        at = source(1)
        channels = [map_coordinates(plane.numpy(), at, order=1, mode="nearest")[box] for plane in image]
        patch = torch.from_numpy(np.stack(channels).astype(np.float32)).clamp(-1, 1)
    return patch, torch.from_numpy(drawn[box].copy())[None], torch.from_numpy(cover[box].astype(np.float32))[None]


class Places:
    """Where masks may lie inside one foreground, bool (1, H, W); its spectrum is computed once for all masks.

    One FFT correlation counts, for every corner at once, a mask's pixels that would fall outside; a second one, where
    the depth (H, W) inside the object is given, sums the depths under it.
    """

    def __init__(self, foreground: Tensor, depth: NDArray[np.float64] | None = None) -> None:
        outside = ~foreground[0].numpy()
        self._shape = outside.shape
        # A corner at which the mask stays in the frame reads no pixel twice, so the circular form needs no padding.
        self._outside = fft.rfft2(outside.astype(np.float32)) if outside.any() else None
        self._depth = None if depth is None else fft.rfft2(depth.astype(np.float32))

    def corners(self, mask: Tensor) -> NDArray[np.int64]:
        """All corners (k, 2) as (y, x), in reading order, at which the whole mask, bool (1, h, w), lies inside.

        A corner is negative only where the mask's own empty rim hangs over the frame.

        Raises:
            ValueError: The mask is empty.
        """
        tight, rim = _tight(mask)
        free = np.subtract(self._shape, tight.shape) + 1
        if free.min() < 1:
            return np.empty((0, 2), np.int64)
        if self._outside is None:
            return np.indices(free).reshape(2, -1).T - rim
        return np.argwhere(self._under(self._outside, tight)[: free[0], : free[1]] < 0.5) - rim

    def depths(self, mask: Tensor, corners: NDArray[np.int64]) -> NDArray[np.float64]:
        """The mean depth under the mask at each of its corners (k, 2)."""
        tight, rim = _tight(mask)
        return self._under(self._depth, tight)[tuple((corners + rim).T)] / tight.sum()

    def _under(self, spectrum: NDArray, tight: NDArray[np.bool_]) -> NDArray:
        """What lies under a mask, summed, for every corner at which it may stand."""
        return fft.irfft2(spectrum * fft.rfft2(tight.astype(np.float32), self._shape).conj(), self._shape)


def _tight(mask: Tensor) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """A mask without its empty rim, and the corner of what is left."""
    values = mask[0].numpy()
    if not values.any():
        raise ValueError("an empty patch mask can be placed anywhere and shows nothing; leave the pair out")
    rows, columns = np.flatnonzero(values.any(axis=1)), np.flatnonzero(values.any(axis=0))
    tight = values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return tight, np.array([rows[0], columns[0]])


def place(
    patch_mask: Tensor, places: Places, rng: np.random.Generator, depths: Sequence[float] | None = None
) -> tuple[int, int] | None:
    """A corner (y, x) for a patch such that its whole mask lies inside the foreground, or None if it fits nowhere.

    Args:
        patch_mask: bool (1, h, w), not empty.
        places: Of the foreground.
        rng: Source of the choice.
        depths: How deep inside the object defects lie, of whom one is followed, see :func:`chances`; ``places`` must
            know the object's depth. None makes every corner as likely as the next.
    """
    corners = places.corners(patch_mask)
    if len(corners) == 0:
        return None
    likely = None if depths is None else chances(places.depths(patch_mask, corners), depths)
    return tuple(int(value) for value in corners[rng.choice(len(corners), p=likely)])


def chances(own: NDArray[np.float64], depths: Sequence[float]) -> NDArray[np.float64]:
    """How likely each of some places (k,), of these depths, is, if one of ``depths`` is followed, each as often.

    A depth is followed within :data:`NEARNESS`, or at the places nearest to it where none is as near. Deep or shallow
    places are no likelier for being many: each depth's share is parted among the places that it has.
    """
    bins = np.floor(own / NEARNESS).astype(int)
    crowd = np.bincount(bins - bins.min())[bins - bins.min()]
    total = np.zeros(len(own))
    for depth in depths:
        apart = np.abs(own - depth)
        near = np.exp(-((np.maximum(apart - apart.min(), 0) / NEARNESS) ** 2) / 2) / crowd
        total += near / near.sum()
    return total / total.sum()


def settle(
    draw: Callable[[], tuple[Tensor, ...]],
    allowed: Tensor,
    rng: np.random.Generator,
    *,
    places: Places,
    depths: Sequence[float] | None = None,
    refused: Counter[str] | None = None,
    attempts: int = ATTEMPTS,
) -> tuple[tuple[Tensor, ...], tuple[int, int]]:
    """What is drawn until its mask fits whole, and its corner; after some drawings about the middle.

    Args:
        draw: Draws a patch; its mask, bool (1, h, w), comes last.
        allowed: Where the mask may lie, bool (1, H, W).
        rng: Source of the place.
        places: Of ``allowed``.
        depths: As in :func:`place`.
        refused: Counts what was drawn in vain.
        attempts: Drawings at most.

    Raises:
        ValueError: No pixel is allowed.
    """
    if not allowed.any():
        raise ValueError("no pixel is allowed: the foreground of the normal image is empty")
    for _ in range(attempts):
        drawn = draw()
        corner = place(drawn[-1], places, rng, depths)
        if corner is not None:
            return drawn, corner
        if refused is not None:
            refused["fits nowhere whole"] += 1
    return drawn, centred(drawn[-1], allowed)


def centred(patch_mask: Tensor, foreground: Tensor) -> tuple[int, int]:
    """The corner at which a patch lies about the foreground's middle, for one that fits nowhere whole.

    The mask's pixel nearest its own middle falls on the foreground's pixel nearest that one's, which in a ring is not
    its middle: so what is cut to the foreground is never empty.
    """
    corner = []
    for pixels, sign in ((foreground[0], 1), (patch_mask[0], -1)):
        at = torch.nonzero(pixels).float()
        corner.append(sign * at[(at - at.mean(0)).square().sum(1).argmin()].long())
    return tuple((corner[0] + corner[1]).tolist())


def windows(patch: tuple[int, int], corner: tuple[int, int], frame: tuple[int, int]) -> tuple[tuple, tuple]:
    """Index of the frame and of the patch (both (C, H, W)) where they overlap; what hangs over the frame is cut."""
    inside, outside = [slice(None)], [slice(None)]
    for at, side, limit in zip(corner, patch, frame):
        low, high = max(0, -at), min(side, limit - at)
        inside.append(slice(low, max(low, high)))
        outside.append(slice(at + low, at + max(low, high)))
    return tuple(outside), tuple(inside)


def at(patch_mask: Tensor, corner: tuple[int, int], frame: tuple[int, int]) -> Tensor:
    """A patch mask (1, h, w) laid into an empty frame (1, H, W) at a corner (y, x)."""
    outside, inside = windows(tuple(patch_mask.shape[1:]), corner, frame)
    placed = torch.zeros(1, *frame, dtype=torch.bool)
    placed[outside] = patch_mask[inside]
    return placed
