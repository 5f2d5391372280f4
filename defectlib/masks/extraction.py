"""A mask from the anomaly part that a dual-branch system draws: where the part departs from its mid-grey background."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy import ndimage
from skimage.filters import threshold_otsu
from torch import Tensor

FLOOR = 0.12
"""Least departure from mid-grey, in the image's unit of [-1, 1], that counts: 15 of 255 grey levels."""
SPECK = 0.1
"""Components smaller than this share of the largest are dropped."""


class Extracted(NamedTuple):
    """A mask bool (1, H, W), the threshold it was cut at, and what set it."""

    mask: Tensor
    threshold: float
    by: Literal["otsu", "floor", "border"]


def extract(part: Tensor, floor: float = FLOOR, speck: float = SPECK) -> Extracted:
    """The defect's pixels in an anomaly part.

    The departure is the largest absolute value over the channels. Otsu's threshold splits it; where the part holds no
    defect Otsu would split the noise of the grey, so the threshold is never below ``floor``.

    Args:
        part: Float (3, H, W) in [-1, 1], 0 where there is no defect.
        floor: Least departure that counts.
        speck: Components smaller than this share of the largest are dropped.

    Returns:
        An empty mask where nothing departs by more than ``floor``. A full one, set by the "border", where most of the
        border departs: there is no grey left that a defect could stand out from, and Otsu would cut up the picture.
    """
    departure = part.abs().amax(0).numpy()
    border = np.concatenate([departure[[0, -1]].ravel(), departure[1:-1, [0, -1]].ravel()])
    if np.median(border) > floor:
        return Extracted(torch.ones(1, *departure.shape, dtype=torch.bool), floor, "border")
    otsu = float(threshold_otsu(departure)) if np.ptp(departure) else 0.0
    found = departure > max(otsu, floor)
    labels, count = ndimage.label(found, np.ones((3, 3)))
    if count:
        sizes = np.bincount(labels.ravel())[1:]
        found = np.isin(labels, 1 + np.flatnonzero(sizes >= speck * sizes.max()))
    return Extracted(torch.from_numpy(found)[None], max(otsu, floor), "otsu" if otsu > floor else "floor")
