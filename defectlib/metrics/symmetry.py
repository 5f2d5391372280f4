"""The premise of the symmetry-aware paper as a number: defects are local, asymmetric, on globally regular structure.

Every image is compared with itself under its own best symmetry: mirrored, turned, or moved by a period, whichever
correlates most with it. What is left is its residual. Where the premise holds it is larger inside the defect than
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage
from skimage.transform import rotate
from torch import Tensor

from defectlib.images import to_uint8

ANGLES = (30, 36, 40, 45, 60, 72, 90, 120, 180)
"""Turns of what has 2 to 6, 8, 9, 10 or 12 like parts; of other numbers the even ones have the half turn, the odd ones
none."""
OVERLAP = 0.6
"""Least share of the image on which it is compared with its own copy."""
PERIOD = 1 / 16
"""Least length of a period, as a share of the side. It must be a peak besides: smooth images resemble themselves moved
by a little, the less the farther."""


class Symmetry(NamedTuple):
    """The best symmetry of an image.

    Attributes:
        kind: "mirror", "turn" or "period".
        correlation: Of the image with its copy, in [-1, 1], over their overlap.
        residual: |image - copy| in grey levels of 255, mean over channels, (H, W); NaN where there is no copy.
        covered: Where the copy of the mask lies, bool (H, W).
        shift: By which the copy is moved, rows and columns in px: the period itself where that is the kind.
    """

    kind: str
    correlation: float
    residual: NDArray[np.float64]
    covered: NDArray[np.bool_]
    shift: tuple[int, int]

    def picture(self) -> Tensor:
        """The residual as (1, H, W) in [0, 1]: 1 is 128 grey levels or more, 0.5 where there is no copy."""
        return torch.from_numpy(self.residual).div(128).nan_to_num(0.5).clamp(0, 1).float()[None]


def correlations(fixed: NDArray, moving: NDArray, there: NDArray) -> tuple[NDArray, NDArray]:
    """Normalised cross-correlation of one image with another at every shift, over their overlap (Padfield, 2012).

    Args:
        fixed: (H, W).
        moving: (H, W).
        there: Where ``moving`` has values, bool (H, W).

    Returns:
        Correlation and overlapping pixels, (2 H - 1, 2 W - 1); index (H - 1, W - 1) is no shift, and one more row
        means that ``moving`` is moved down by one.
    """
    h, w = fixed.shape
    size = [fft.next_fast_len(n, real=True) for n in (2 * h - 1, 2 * w - 1)]

    def spectrum(x: NDArray) -> NDArray:
        return fft.rfft2(x, size)

    def product(a: NDArray, b: NDArray) -> NDArray:
        full = fft.irfft2(a * np.conj(b), size)
        return np.roll(full, (h - 1, w - 1), (0, 1))[: 2 * h - 1, : 2 * w - 1]

    centre = fixed.mean()
    f, m, weight = fixed - centre, np.where(there, moving - centre, 0.0), there.astype(float)
    ones, of_f, of_ff = spectrum(np.ones_like(f)), spectrum(f), spectrum(f**2)
    of_weight, of_m, of_mm = spectrum(weight), spectrum(m), spectrum(m**2)
    n = np.maximum(np.round(product(ones, of_weight)), 1e-9)
    sum_f, sum_m = product(of_f, of_weight), product(ones, of_m)
    covariance = product(of_f, of_m) - sum_f * sum_m / n
    spread = (product(of_ff, of_weight) - sum_f**2 / n) * (product(ones, of_mm) - sum_m**2 / n)
    return covariance / np.sqrt(np.maximum(spread, max(1e-6 * spread.max(), 1e-9))), n


def _copies(image: NDArray, mask: NDArray) -> Iterator[tuple[str, NDArray, NDArray, NDArray]]:
    """What an image (H, W, 3) is compared with: kind, copy, where it has values, and its mask."""
    everywhere = np.ones(mask.shape, bool)
    yield "period", image, everywhere, mask
    for axis in (0, 1):
        yield "mirror", np.flip(image, axis), everywhere, np.flip(mask, axis)
    for angle in ANGLES:
        valid = rotate(everywhere.astype(float), angle, order=0, cval=0.0) > 0.5
        turned = rotate(image, angle, order=1, cval=0.0, preserve_range=True)
        yield "turn", turned, valid, rotate(mask.astype(float), angle, order=0) > 0.5


def best_symmetry(image: Tensor, mask: Tensor) -> Symmetry:
    """The symmetry under which an image (3, H, W) in [-1, 1] resembles itself most; ``mask`` bool (1, H, W).

    The whole image is looked at, its defect too: what is asked is how regular it is as it stands.
    """
    picture, defect = to_uint8(image).astype(float), mask[0].numpy()
    h, w = defect.shape
    grey, best = picture.mean(-1), None
    for kind, copy, there, covered in _copies(picture, defect):
        found, overlap = correlations(grey, copy.mean(-1), there)
        asked = overlap >= OVERLAP * h * w
        if kind == "period":
            rows, columns = np.ogrid[1 - h : h, 1 - w : w]
            asked &= np.hypot(rows, columns) >= PERIOD * min(h, w)
            asked &= found >= ndimage.maximum_filter(found, 3)
        found = np.where(asked, found, -1.0)
        at = np.unravel_index(found.argmax(), found.shape)
        if best is None or found[at] > best[1]:
            best = kind, float(found[at]), copy, there, covered, (at[0] - h + 1, at[1] - w + 1)
    kind, value, copy, there, covered, shift = best
    shift = tuple(map(int, shift))
    valid = ndimage.shift(there.astype(float), shift, order=0) > 0.5
    moved = ndimage.shift(copy, (*shift, 0), order=0)
    residual = np.where(valid, np.abs(picture - moved).mean(-1), np.nan)
    return Symmetry(kind, value, residual, ndimage.shift(covered.astype(float), shift, order=0) > 0.5, shift)


def asymmetry(images: Sequence[Tensor], masks: Sequence[Tensor]) -> pd.DataFrame:
    """The residual inside the mask and outside of it and of its copy, a row an image.

    Returns:
        Columns kind, correlation, inside, outside (mean grey levels of 255, NaN where there is no such pixel) and
        ratio, inf where nothing is left outside.
    """
    rows = []
    for image, mask in zip(images, masks, strict=True):
        found, defect = best_symmetry(image, mask), mask[0].numpy()
        known = ~np.isnan(found.residual)
        inside, outside = (found.residual[known & where] for where in (defect, ~defect & ~found.covered))
        means = [np.float64(part.mean()) if len(part) else np.nan for part in (inside, outside)]
        with np.errstate(divide="ignore", invalid="ignore"):
            rows.append([found.kind, found.correlation, *means, np.divide(*means)])
    return pd.DataFrame(rows, columns=["kind", "correlation", "inside", "outside", "ratio"])
