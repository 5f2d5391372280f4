"""Where the object is, found without labels, and AdaBLDM's trimap of defect, object and background.

AdaBLDM finds the foreground with an ImageNet network and k-means (its ``foreground_predictor/``). This finder is
classical and needs no weights, but asks the same questions: the border is background, what differs from it is object,
and a surface that fills the frame has no background. The thresholds were set on ``mini`` and looked at on magnetic
tiles and MVTec 3D-AD's tire. A plain surface with one strong defect and nothing else looks like an object to it.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

from defectlib.types import Shot

DEFECT, OBJECT, BACKGROUND = 1.0, 0.5, 0.0

BORDER = 0.035
"""Width of the border that is taken for background, as a share of the side."""
BLUR = 0.006
"""Standard deviation of the smoothing before colours are compared, as a share of the side."""
QUANTUM = 1 / 127.5
"""One step of an 8-bit image: a border without any noise still gets this much scatter."""
ROUGH = 0.15
"""A plain background's largest 90th percentile of the border's distances; image values span 2."""
CONTRAST = 1.8
"""The object's median distance is at least this many times that percentile."""
TOUCH = 0.25
"""At most this share of the border may look like object."""
SHARE = (0.02, 0.90)
"""An object covers a share of the image in this range; otherwise the surface fills the frame."""
HOLE = 0.004
"""Holes of the object smaller than this share of the image are filled: glints and pores, not bores."""
PART = 0.10
"""Parts smaller than this share of the largest part are dropped."""


def know(image: Tensor, given: Tensor) -> None:
    """Say what is object in an image, bool (1, H, W), in this process: :func:`foreground` then finds nothing by itself.

    Raises:
        ValueError: The sizes differ, or there is no object.
    """
    if given.shape[1:] != image.shape[1:]:
        raise ValueError(f"the foreground is {tuple(given.shape[1:])} but its image is {tuple(image.shape[1:])}")
    if not given.any():
        raise ValueError("the foreground is empty")
    _known[_name(image)] = given


def forget(image: Tensor) -> None:
    """Take back what :func:`know` was told of an image."""
    if _known:
        _known.pop(_name(image), None)


_known: dict[bytes, Tensor] = {}


def _name(image: Tensor) -> bytes:
    return hashlib.sha256(image.contiguous().numpy()).digest()


def foreground(image: Tensor) -> Tensor:
    """The object's pixels, bool (1, H, W); all True where the surface fills the frame.

    What :func:`know` was told of the image stands before what is found. Else a plane is fitted to the border's colours,
    each pixel's distance from it, in units of the border's own scatter, is split by Otsu's threshold, small holes are
    filled and small parts dropped. The image is one surface if its border is not plain, if what was split off hardly
    differs from the border, or if it covers nearly nothing or everything.

    Args:
        image: float32 (3, H, W) in [-1, 1].
    """
    if _known and (given := _known.get(_name(image))) is not None:
        return given
    pixels = image.numpy().transpose(1, 2, 0).astype(float)
    whole = torch.ones(1, *image.shape[1:], dtype=torch.bool)
    border = _border(pixels.shape[:2])
    difference, scatter = _difference(pixels, border)
    plain = np.linalg.norm(difference, axis=-1)
    rough = max(np.quantile(plain[border], 0.9), QUANTUM)
    if rough > ROUGH:
        return whole
    distance = np.linalg.norm(difference @ np.linalg.cholesky(np.linalg.inv(scatter)), axis=-1)
    floor = max(np.quantile(distance[border], 0.9), 1.0)
    # On a logarithmic scale dark and bright parts of one object fall on the same side.
    found = _tidy(distance > floor * np.expm1(threshold_otsu(np.log1p(distance / floor))))
    if not SHARE[0] <= found.mean() <= SHARE[1] or found[border].mean() > TOUCH:
        return whole
    if np.median(plain[found]) < CONTRAST * rough:
        return whole
    return torch.from_numpy(found)[None]


def trimap(mask: Tensor, foreground: Tensor) -> Tensor:
    """AdaBLDM's G: 1 on the defect, else 0.5 on the object, else 0; float32 (1, H, W).

    Args:
        mask: bool (1, H, W), True is defect.
        foreground: bool (1, H, W), True is object.

    Raises:
        ValueError: The two differ in size.
    """
    if mask.shape != foreground.shape:
        raise ValueError(f"the mask is {tuple(mask.shape)} but the foreground is {tuple(foreground.shape)}")
    return torch.where(mask, DEFECT, torch.where(foreground, OBJECT, BACKGROUND)).float()


def depth(foreground: Tensor) -> NDArray[np.float64]:
    """How far inside the object each pixel lies, (H, W): 0 outside, 1 where it is farthest from the background.

    The frame is no background; where the surface fills it, all is 1.
    """
    inside = foreground[0].numpy()
    if inside.all():
        return np.ones(inside.shape)
    distance = ndimage.distance_transform_edt(inside)
    return distance / max(distance.max(), 1)


@functools.lru_cache(maxsize=16)
def depths_of(shots: tuple[Shot, ...]) -> tuple[float, ...]:
    """How deep inside its object each shot's defect lies: the mean of :func:`depth` under its mask."""
    return tuple(float(depth(foreground(shot.image))[shot.mask[0].numpy()].mean()) for shot in shots)


def _border(shape: tuple[int, int]) -> NDArray[np.bool_]:
    width = max(2, round(BORDER * min(shape)))
    border = np.ones(shape, bool)
    border[width:-width, width:-width] = False
    return border


def _difference(pixels: NDArray, border: NDArray[np.bool_]) -> tuple[NDArray, NDArray]:
    """Difference (H, W, 3) from the background that a plane through the border's colours predicts, and its scatter.

    A darker copy of the background is its shadow: along the background's own colour, darkening counts half. The scatter
    (3, 3) is the border's covariance; a weak tint counts where the background varies in brightness only.
    """
    height, width = border.shape
    y, x = np.mgrid[0:height, 0:width] / max(height, width) - 0.5
    plane = np.stack([np.ones_like(y), y, x], -1)
    keep = border
    # Trimmed least squares: what touches the border without being background must not tilt the plane.
    for _ in range(3):
        weights, *_ = np.linalg.lstsq(plane[keep], pixels[keep], rcond=None)
        residual = np.linalg.norm(pixels - plane @ weights, axis=-1)
        keep = border & (residual <= np.quantile(residual[border], 0.85))
    difference = ndimage.gaussian_filter(pixels - plane @ weights, (BLUR * height, BLUR * width, 0), truncate=3)
    scatter = np.cov(difference[keep].T)
    scatter = scatter + (0.1 * np.trace(scatter) / 3 + QUANTUM**2) * np.eye(3)
    ground = np.clip(plane @ weights, -1, 1) + 1 + QUANTUM
    along = ground / np.linalg.norm(ground, axis=-1, keepdims=True)
    shadow = np.minimum((difference * along).sum(-1, keepdims=True), 0)
    return difference - 0.5 * shadow * along, scatter


def _tidy(found: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Drop specks and small parts, fill small holes."""
    found = ndimage.binary_opening(found, iterations=1) if min(found.shape) >= 96 else found
    labels, count = ndimage.label(found)
    if count == 0:
        return found
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    found = np.isin(labels, np.flatnonzero(sizes >= PART * sizes.max()))
    holes, _ = ndimage.label(~found)
    sizes = np.bincount(holes.ravel())
    edge = np.unique(np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]]))
    small = np.setdiff1d(np.flatnonzero(sizes < HOLE * found.size), np.append(edge, 0))
    return found | np.isin(holes, small)
