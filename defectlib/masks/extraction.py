"""A mask from the anomaly part that a dual-branch system draws: where the part departs from its grey ground."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from defectlib.masks import shape

FLOOR = 0.12
"""Least departure from the ground, in the image's unit of [-1, 1], that counts: 15 of 255 grey levels."""
TINT = 0.2
"""Most that a drawn part's ground may be off mid-grey: 25 of 255 grey levels. What diffusion draws misses its mean."""
SPECK = 0.1
"""Components smaller than this share of the largest are dropped."""


class Extracted(NamedTuple):
    """A mask bool (1, H, W), the threshold it was cut at, what set it, and how far off mid-grey the ground was."""

    mask: Tensor
    threshold: float
    by: Literal["otsu", "floor", "border"]
    tint: float


def extract(part: Tensor, floor: float = FLOOR, speck: float = SPECK, tint: float = TINT) -> Extracted:
    """The defect's pixels in an anomaly part.

    The ground is mid-grey in what a model learns from, and in what it draws a little lighter or darker: it is read off
    the border, as the median of each channel. The departure from it is the largest absolute value over the channels.
    Otsu's threshold splits it; where the part holds no defect Otsu would split the noise of the grey, so the threshold
    is never below ``floor``.

    Args:
        part: Float (3, H, W) in [-1, 1], 0 where there is no defect.
        floor: Least departure that counts.
        speck: Components smaller than this share of the largest are dropped.
        tint: Most that the ground may be off mid-grey to count as ground; 0 for what must be grey, a part of a shot.

    Returns:
        An empty mask where nothing departs by more than ``floor``. A full one, set by the "border", where the border is
        no ground: it is further off mid-grey than ``tint``, or most of it departs from its own median. Nothing is left
        that a defect could stand out from, and Otsu would cut up the picture.
    """
    tone = ground(part)
    off = float(tone.abs().max())
    departure = (part - tone).abs().amax(0)
    if off > tint or _border(departure[None]).median() > floor:
        return Extracted(torch.ones(1, *departure.shape, dtype=torch.bool), floor, "border", off)
    departure = departure.numpy()
    otsu = float(threshold_otsu(departure)) if np.ptp(departure) else 0.0
    found = shape.without_specks(torch.from_numpy(departure > max(otsu, floor))[None], speck)
    return Extracted(found, max(otsu, floor), "otsu" if otsu > floor else "floor", off)


def ground(part: Tensor) -> Tensor:
    """The tone (3, 1, 1) of a part's ground: the median of its border, by channel."""
    return _border(part).median(1).values[:, None, None]


def _border(image: Tensor) -> Tensor:
    """The outermost pixels (C, 2W + 2H - 4) of an image (C, H, W)."""
    return torch.cat([image[:, [0, -1]].flatten(1), image[:, 1:-1, [0, -1]].flatten(1)], 1)
