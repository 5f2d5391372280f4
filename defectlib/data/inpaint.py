"""A defect-free counterpart of a defect image: the defect is painted over from its surroundings.

DefectSynth "synthesized paired defect-free counterparts" of 21 DeepCrack images and does not say how; this is ours, and
rows that use it say ``derive="inpaint"``. Brightness is spread inwards from the rim; grain is mirrored across the rim,
so that the painted band is not smoother than the surface around it.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

MARGIN = 5
GRAIN = 4.0


def dilate(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Bool (H, W): everything within ``pixels`` of the mask."""
    if not mask.any() or pixels <= 0:
        return mask.copy()
    return ndimage.distance_transform_edt(~mask) <= pixels


def remove_defect(image: Tensor, mask: Tensor, margin: int = MARGIN) -> Tensor:
    """Paint over a defect.

    Args:
        image: float32 (3, H, W) in [-1, 1].
        mask: bool (1, H, W), the defect.
        margin: The mask is widened by this many px first, because hand-drawn masks cut the defect's rim.

    Returns:
        float32 (3, H, W) in [-1, 1], equal to ``image`` outside the widened mask.

    Raises:
        ValueError: The widened mask leaves nothing to paint from.
    """
    hole = dilate(mask[0].numpy(), margin)
    if not hole.any():
        return image.clone()
    if hole.all():
        raise ValueError("the defect covers the whole image: there is no surface to paint it over with")
    pixels = image.numpy().astype(np.float64)
    depth, (rows, columns) = ndimage.distance_transform_edt(hole, return_indices=True)
    smooth = _spread(pixels, ~hole, max(GRAIN, float(depth.max())))
    # The grain of the pixel as far outside the nearest rim as this one lies inside.
    height, width = hole.shape
    y, x = np.nonzero(hole)
    mirror_y = np.clip(2 * rows[y, x] - y, 0, height - 1)
    mirror_x = np.clip(2 * columns[y, x] - x, 0, width - 1)
    taken = hole[mirror_y, mirror_x]
    mirror_y[taken], mirror_x[taken] = rows[y, x][taken], columns[y, x][taken]
    grain = pixels - _spread(pixels, ~hole, GRAIN)
    result = pixels.copy()
    result[:, y, x] = np.clip(smooth[:, y, x] + grain[:, mirror_y, mirror_x], -1, 1)
    return torch.from_numpy(result.astype(np.float32))


def _spread(pixels: np.ndarray, valid: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian mean (3, H, W) over the valid pixels alone (normalised convolution)."""
    weight = ndimage.gaussian_filter(valid.astype(np.float64), sigma)
    sums = np.stack([ndimage.gaussian_filter(channel * valid, sigma) for channel in pixels])
    return sums / np.maximum(weight, 1e-6)
