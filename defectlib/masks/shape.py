"""What a mask looks like in numbers: area, pieces, elongation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label
from torch import Tensor

_EIGHT = np.ones((3, 3))


class Shape(NamedTuple):
    """Shape statistics of one mask."""

    area: float
    components: int
    elongation: float


def describe(mask: Tensor) -> Shape:
    """Statistics of a mask, bool (1, H, W).

    Returns:
        area: Share of the image, in [0, 1].
        components: Pieces, 8-connected.
        elongation: Ratio of the principal axes of the largest piece, from the second moments of its pixels as unit
            squares: 1 for a disc or a square, 10 for a bar of 10 x 1. NaN for an empty mask.
    """
    values = mask[0].numpy()
    pieces, n = label(values, _EIGHT)
    if n == 0:
        return Shape(0.0, 0, float("nan"))
    largest = np.argmax(np.bincount(pieces.ravel())[1:]) + 1
    points = np.argwhere(pieces == largest).astype(float)
    spread = np.cov(points.T, bias=True) if len(points) > 1 else np.zeros((2, 2))
    small, large = np.linalg.eigvalsh(spread + np.eye(2) / 12)
    return Shape(float(values.mean()), int(n), float(np.sqrt(large / small)))


def without_specks(mask: Tensor, share: float) -> Tensor:
    """A mask, bool (1, H, W), without the 8-connected pieces that are smaller than ``share`` of its largest piece."""
    pieces, n = label(mask[0].numpy(), _EIGHT)
    if n < 2:
        return mask
    sizes = np.bincount(pieces.ravel())[1:]
    return torch.from_numpy(np.isin(pieces, 1 + np.flatnonzero(sizes >= share * sizes.max())))[None]


def usable(mask: Tensor) -> bool:
    """Whether a mask says where a defect is: it is neither empty nor full."""
    return bool(mask.any()) and not bool(mask.all())
