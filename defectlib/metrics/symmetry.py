"""The premise of the symmetry-aware paper as a number: defects are local, asymmetric, on globally regular structure.

Stated by the paper (its abstract) is the premise; the number is our reading. Every image is compared with itself under
its own best symmetry: mirrored about any axis, turned, or moved by a period, whichever correlates most with it. What is
left is its residual. Where the premise holds it is larger inside the defect than elsewhere, and larger than under the
same mask on normal images: on an object any mask has a larger residual than the even ground around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import fft, ndimage
from torch import Tensor
from torch.nn import functional

from defectlib.metrics import bootstrap

ANGLES = tuple(360 / parts for parts in range(2, 13))
"""Turns of what has 2 to 12 like parts."""
AXES = tuple(range(0, 360, 15))
"""By how much a mirrored copy is turned: twice the angle of the axis that it is mirrored about, which lie 7.5 apart."""
OVERLAP = 0.6
"""Least share of the image on which it is compared with its own copy."""
PERIOD = 1 / 16
"""Least length of a period, as a share of the side. It must be a peak besides: smooth images resemble themselves moved
by a little, the less the farther."""
LARGEST = 128
"""Larger images are looked at in this many px a side."""
COPIES = [("period", False, 0.0), *(("mirror", True, angle) for angle in AXES), *(("turn", False, a) for a in ANGLES)]


class Symmetry(NamedTuple):
    """The best symmetry of an image, looked at in (h, w) px: its own, or fewer.

    Attributes:
        kind: "mirror", "turn" or "period".
        correlation: Of the image with its copy, in [-1, 1], over their overlap.
        residual: |image - copy| in grey levels of 255, mean over channels, (h, w); NaN where there is no copy.
        flipped: Whether the copy is mirrored left to right, before it is turned.
        angle: By which it is turned clockwise, in degrees.
        shift: By which it is then moved, rows and columns in px: the period itself where that is the kind.
        size: (H, W) of the image.
    """

    kind: str
    correlation: float
    residual: NDArray[np.float64]
    flipped: bool
    angle: float
    shift: tuple[int, int]
    size: tuple[int, int]

    def picture(self) -> Tensor:
        """The residual as (1, H, W) in [0, 1]: 1 is 128 grey levels or more, 0.5 where there is no copy."""
        shown = torch.from_numpy(self.residual).div(128).nan_to_num(0.5).clamp(0, 1).float()
        return functional.interpolate(shown[None, None], self.size)[0]

    def copied(self, mask: Tensor) -> float:
        """The share of a mask's pixels, bool (1, H, W), with a copy: the others tell nothing; NaN if it is empty."""
        inside = self._looked_at(mask)[0].numpy() > 0
        return float((~np.isnan(self.residual))[inside].mean()) if inside.any() else math.nan

    def _looked_at(self, mask: Tensor) -> Tensor:
        """A mask (1, H, W) in the (1, h, w) px of the residual."""
        return functional.adaptive_max_pool2d(mask.float(), self.residual.shape)

    def under(self, mask: Tensor) -> tuple[float, float]:
        """The mean residual inside a mask bool (1, H, W), and outside of it and its copy; NaN where there is none."""
        defect = self._looked_at(mask)
        copy = _turned(defect.double(), [(self.flipped, self.angle)])[0, 0].numpy()
        covered = ndimage.shift(copy, self.shift, order=0) > 0.5
        inside, known = defect[0].numpy() > 0, ~np.isnan(self.residual)
        parts = [self.residual[known & where] for where in (inside, ~inside & ~covered)]
        return tuple(float(part.mean()) if len(part) else math.nan for part in parts)


def correlations(fixed: NDArray, moving: NDArray, there: NDArray) -> tuple[NDArray, NDArray]:
    """Normalised cross-correlation of one image with others at every shift, over their overlap (Padfield, 2012).

    Args:
        fixed: (H, W).
        moving: (..., H, W).
        there: Where ``moving`` has values, bool (..., H, W).

    Returns:
        Correlation and overlapping pixels, (..., 2 H - 1, 2 W - 1); index (H - 1, W - 1) is no shift, and one more row
        means that ``moving`` is moved down by one.
    """
    h, w = fixed.shape
    size = [fft.next_fast_len(n, real=True) for n in (2 * h - 1, 2 * w - 1)]

    def spectrum(x: NDArray) -> NDArray:
        return fft.rfft2(x, size)

    def product(a: NDArray, b: NDArray) -> NDArray:
        full = fft.irfft2(a * np.conj(b), size)
        return np.roll(full, (h - 1, w - 1), (-2, -1))[..., : 2 * h - 1, : 2 * w - 1]

    centre = fixed.mean()
    f, m, weight = fixed - centre, np.where(there, moving - centre, 0.0), there.astype(float)
    ones, of_f, of_ff = spectrum(np.ones_like(f)), spectrum(f), spectrum(f**2)
    of_weight, of_m, of_mm = spectrum(weight), spectrum(m), spectrum(m**2)
    n = np.maximum(np.round(product(ones, of_weight)), 1e-9)
    sum_f, sum_m = product(of_f, of_weight), product(ones, of_m)
    covariance = product(of_f, of_m) - sum_f * sum_m / n
    spread = (product(of_ff, of_weight) - sum_f**2 / n) * (product(ones, of_mm) - sum_m**2 / n)
    least = np.maximum(1e-6 * spread.max((-2, -1), keepdims=True), 1e-9)
    return covariance / np.sqrt(np.maximum(spread, least)), n


def _turned(planes: Tensor, turns: Sequence[tuple[bool, float]]) -> Tensor:
    """Planes (C, H, W) mirrored left to right where a turn says so, then turned clockwise by degrees: (K, C, H, W)."""
    h, w = planes.shape[-2:]
    taken = []
    for flipped, degrees in turns:  # where each pixel is taken from
        c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        side = -1 if flipped else 1
        taken.append([[side * c, side * s * h / w, 0.0], [-s * w / h, c, 0.0]])
    size = (len(turns), *planes.shape)
    grid = functional.affine_grid(torch.tensor(taken, dtype=planes.dtype), size, align_corners=False)
    return functional.grid_sample(planes.expand(size), grid, align_corners=False)


def best_symmetry(image: Tensor) -> Symmetry:
    """The symmetry under which an image (3, H, W) in [-1, 1] resembles itself most.

    The whole image is looked at, its defect too: what is asked is how regular it is as it stands.
    """
    least = [min(LARGEST, side) for side in image.shape[-2:]]
    picture = functional.adaptive_avg_pool2d(127.5 * (image.double() + 1), least)
    h, w = least
    turns = [(flipped, angle) for _, flipped, angle in COPIES]
    grey = picture.mean(0, keepdim=True)
    copies, there = (_turned(x, turns)[:, 0].numpy() for x in (grey, torch.ones_like(grey)))
    found, overlap = correlations(grey[0].numpy(), copies, there > 0.999)
    asked = overlap >= OVERLAP * h * w
    rows, columns = np.ogrid[1 - h : h, 1 - w : w]
    asked[0] &= np.hypot(rows, columns) >= PERIOD * min(h, w)
    asked[0] &= found[0] >= ndimage.maximum_filter(found[0], 3)
    found = np.where(asked, found, -1.0)
    k, *at = np.unravel_index(found.argmax(), found.shape)
    shift = (int(at[0]) - h + 1, int(at[1]) - w + 1)
    copy = _turned(picture, turns[k : k + 1])[0].numpy()
    valid = ndimage.shift((there[k] > 0.999).astype(float), shift, order=0) > 0.5
    apart = np.abs(picture.numpy() - ndimage.shift(copy, (0, *shift), order=0)).mean(0)
    residual = np.where(valid, apart, np.nan)
    return Symmetry(COPIES[k][0], float(found[k, at[0], at[1]]), residual, *turns[k], shift, tuple(image.shape[-2:]))


def asymmetry(images: Sequence[Tensor], masks: Sequence[Tensor], normals: Sequence[Symmetry] = ()) -> pd.DataFrame:
    """The residual inside the mask and outside of it, and what the same mask has on normal images; a row an image.

    Args:
        images: (3, H, W) in [-1, 1].
        masks: bool (1, H, W).
        normals: The best symmetries of some normal images of the category.

    Returns:
        Columns kind, correlation, inside, outside (mean grey levels of 255, NaN where there is no such pixel), ratio of
        the two (inf where nothing is left outside), on_normals (the median ratio of the same mask on the normals) and
        beyond, ratio over on_normals: above 1 there is more than what lies there anyway.
    """
    rows = []
    for image, mask in zip(images, masks, strict=True):
        found = best_symmetry(image)
        inside, outside = found.under(mask)
        usual = [_quotient(*normal.under(mask)) for normal in normals]
        usual = float(np.median(usual)) if usual else math.nan
        ratio = _quotient(inside, outside)
        rows.append([found.kind, found.correlation, inside, outside, ratio, usual, _quotient(ratio, usual)])
    columns = ["kind", "correlation", "inside", "outside", "ratio", "on_normals", "beyond"]
    return pd.DataFrame(rows, columns=columns)


def summary(found: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """What :func:`asymmetry` found, over the images of each group.

    Args:
        found: Its rows, with the columns ``by``.
        by: What tells groups apart.

    Returns:
        A row a group: how many images, the kinds of their symmetries, medians, and the 95 % interval of the median of
        beyond over the images (low, high; NaN below ``bootstrap.LEAST`` of them).
    """
    rows = {}
    for key, own in found.groupby(list(by), sort=False):
        beyond = own["beyond"][np.isfinite(own["beyond"])].to_numpy()
        low = high = math.nan
        if (n := len(beyond)) >= bootstrap.LEAST:
            drawn = bootstrap.median(beyond, bootstrap.counts(n, seed=0))
            low, high = bootstrap.interval(float(np.median(beyond)), drawn)
        of_kind = own["kind"].value_counts()
        kinds = ", ".join(f"{kind} {times}" for kind, times in of_kind.items())
        medians = own[["correlation", "inside", "outside", "ratio", "on_normals", "beyond"]].median()
        rows[key] = {"images": len(own), "symmetries": kinds, **medians, "low": low, "high": high}
    return pd.DataFrame(rows.values(), index=pd.MultiIndex.from_tuples(rows, names=by))


def _quotient(a: float, b: float) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(np.float64(a), b))
