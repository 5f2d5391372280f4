"""Which samples look least like a real defect: each sample's distance to the nearest shot, farthest first.

What surrounds the defect is compared, not the whole image: two normals of one category lie farther apart than a good
defect from a bad one. A window of one size for all pictures of a defect keeps its scale, which stretching each defect
to its own box would lose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from defectlib.metrics.neighbours import distances
from defectlib.types import Sample, Shot

SMALLEST = 0.25
"""A window's side is at least this share of the image's: a defect of a few pixels is seen by its contrast."""


def window_side(masks: Sequence[Tensor]) -> int:
    """Side in px of the smallest square that takes every mask's bounding box, and at least :data:`SMALLEST`.

    Args:
        masks: bool (1, H, W), of one size, none empty.
    """
    sides = [max(high - low for low, high in _box(mask)) for mask in masks]
    return min(max(*sides, round(SMALLEST * min(masks[0].shape[1:]))), *masks[0].shape[1:])


def window(image: Tensor, mask: Tensor, side: int) -> Tensor:
    """The square (3, side, side) of an image (3, H, W) around its mask's bounding box, moved to lie inside the frame.

    An empty mask, bool (1, H, W), has its middle in the image's middle.
    """
    corner = []
    for (low, high), limit in zip(_box(mask), mask.shape[1:]):
        corner.append(min(max((low + high - side) // 2, 0), limit - side))
    y, x = corner
    return image[:, y : y + side, x : x + side]


def _box(mask: Tensor) -> list[tuple[int, int]]:
    """(first, last + 1) of a mask's rows and of its columns; the whole frame for an empty one."""
    hit = [np.flatnonzero(mask[0].any(axis).numpy()) for axis in (1, 0)]
    return [(int(k[0]), int(k[-1]) + 1) if len(k) else (0, side) for k, side in zip(hit, mask.shape[1:])]


def nearest_shots(
    samples: Sequence[Sample | Shot], shots: Sequence[Shot], extract: Callable[[Sequence[Tensor]], Tensor]
) -> pd.DataFrame:
    """For every sample of one defect the nearest of that defect's shots, the sample farthest from all of them first.

    Args:
        samples: What was drawn, or real pairs to compare with; of the shots' size.
        shots: The real pairs.
        extract: Images (3, side, side) in [-1, 1] to features (N, D), as :class:`defectlib.metrics.features.Extractor`.

    Returns:
        One row a sample: ``sample`` and ``shot`` (their places in the lists), and ``distance``, Euclidean, between the
        features of the windows around the two masks. The first rows are the samples drawn least like any shot.

    Raises:
        ValueError: There is no sample or no shot, or they are of different defects.
    """
    defects = sorted({item.defect for item in [*samples, *shots]})
    if not samples or not shots:
        raise ValueError(f"{len(samples)} samples and {len(shots)} shots: at least one of each is needed")
    if len(defects) > 1:
        raise ValueError(f"shots and samples of one defect are compared, got {', '.join(defects)}")
    drawn, real = _features(samples, shots, extract)
    closest = distances(drawn, real).min(1)
    table = pd.DataFrame({
        "sample": range(len(samples)), "shot": closest.indices.numpy(), "distance": closest.values.numpy(),
    })  # fmt: skip
    return table.sort_values("distance", ascending=False, kind="stable", ignore_index=True)


def shot_distance(
    samples: Sequence[Sample], shots: Sequence[Shot], extract: Callable[[Sequence[Tensor]], Tensor]
) -> tuple[Tensor, float]:
    """How far samples keep from the shots that were learned from, in the distance of the shots among themselves.

    Near 0 they are copies; at 1 they lie as far from the nearest shot as a shot from the next one.

    Args:
        samples: What was drawn, of one defect.
        shots: Two or more real pairs of that defect.
        extract: As of :func:`nearest_shots`.

    Returns:
        Each sample's distance to its nearest shot over the median of the shots' own, float64 (N,), and that median.

    Raises:
        ValueError: There is no sample, there are fewer than two shots, or all shots look the same.
    """
    if not samples or len(shots) < 2:
        raise ValueError(f"{len(samples)} samples and {len(shots)} shots: one and two are needed")
    drawn, real = _features(samples, shots, extract)
    own = distances(real, real).fill_diagonal_(torch.inf).min(1).values.median().item()
    if own == 0:
        raise ValueError(f"the shots of '{shots[0].defect}' look the same: there is no distance to compare with")
    return distances(drawn, real).min(1).values / own, own


def _features(samples: Sequence[Sample | Shot], shots: Sequence[Shot], extract: Callable) -> tuple[Tensor, Tensor]:
    """Features of the windows around the masks, float64, of samples and of shots."""
    side = window_side([shot.mask for shot in shots])
    drawn, real = (extract([window(x.image, x.mask, side) for x in items]).double() for items in (samples, shots))
    return drawn, real
