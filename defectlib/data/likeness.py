"""Is it the same picture, under another exposure, format or a small shift? Correlation of fine structures.

Pictures are compared band-passed, brought to one local contrast, and without what all of them share (the camera's and
the lamp's fixed pattern).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

SIDE, SHIFT = 64, 4
"""Pictures are compared at SIDE x SIDE, over shifts of up to SHIFT px each way."""
FEW = 8
"""From so many pictures on, what all share can be told."""


def structure(picture: Image.Image) -> NDArray[np.float32]:
    """The fine structure of a picture, float32 (SIDE, SIDE), of zero mean."""
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    band = gaussian_filter(grey, 1) - gaussian_filter(grey, 6)
    band /= np.sqrt(gaussian_filter(band**2, 8)) + 1.0  # a grey level of contrast: flat areas stay flat
    return band - band.mean()


def likeness(first: NDArray, second: NDArray, shift: int = SHIFT) -> NDArray[np.float32]:
    """The largest correlation of every structure of one list (n, SIDE, SIDE) with every one of another (m, ...).

    What all of them share is taken out first, if there are enough to tell it.

    Returns:
        (n, m), in [-1, 1]; 0 where a picture has no structure.
    """
    both = _normalised(np.concatenate([first, second]))
    one, other = both[: len(first)], both[len(first) :]
    flat, best = one.reshape(len(one), -1), np.full((len(one), len(other)), -1.0, np.float32)
    for dy in range(-shift, shift + 1):
        for dx in range(-shift, shift + 1):
            moved = np.roll(other, (dy, dx), axis=(1, 2)).reshape(len(other), -1)
            np.maximum(best, flat @ moved.T, out=best)
    return best


def among(structures: NDArray, shift: int = SHIFT) -> NDArray[np.float32]:
    """:func:`likeness` of one list (n, SIDE, SIDE) with itself, (n, n), at half the cost.

    A shift and its opposite give the same correlations.
    """
    all_of = _normalised(structures)
    flat, best = all_of.reshape(len(all_of), -1), np.full((len(all_of),) * 2, -1.0, np.float32)
    for dy in range(shift + 1):
        for dx in range(-shift if dy else 0, shift + 1):
            found = flat @ np.roll(all_of, (dy, dx), axis=(1, 2)).reshape(len(all_of), -1).T
            np.maximum(best, np.maximum(found, found.T), out=best)
    return best


def _normalised(structures: NDArray) -> NDArray[np.float32]:
    if len(structures) >= FEW:
        structures = structures - structures.mean(0)
    size = np.linalg.norm(structures.reshape(len(structures), -1), axis=1)
    return (structures / np.maximum(size, 1e-6)[:, None, None]).astype(np.float32)
