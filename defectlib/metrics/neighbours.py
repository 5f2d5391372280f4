"""Precision, recall, density and coverage: what samples lack in realism apart from what they lack in variety.

A real image's ball reaches to its k-th nearest real image. Precision (Kynkäänniemi et al., 2019) is the share of
samples in any real ball, recall the share of real images in any sample's ball, density (Naeem et al., 2020) the mean
number of real balls a sample lies in, over k, and coverage the share of real balls that hold a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from defectlib.metrics.perceptual import vectors

K = 3
NAMES = ("precision", "recall", "density", "coverage")
LEAST = 2 * (K + 1)
"""Fewest real and fewest generated images: with fewer a ball takes in most of a set."""


def values(real: Tensor, generated: Tensor, k: int = K) -> dict[str, Tensor]:
    """The four measures image by image; each measure is the mean.

    Args:
        real: Features (N, D), N > k.
        generated: Features (M, D), M > k.
        k: Which neighbour a ball reaches to; an image is not its own.

    Returns:
        ``precision`` and ``density`` float64 (M,), ``recall`` and ``coverage`` float64 (N,).

    Raises:
        ValueError: A set is not larger than k.
    """
    real, generated = vectors(real, "real features").double(), vectors(generated, "generated features").double()
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"{len(real)} real and {len(generated)} generated images have no neighbour number {k}")
    between = distances(real, generated)
    inside = between <= _radii(real, k)[:, None]
    return {
        "precision": inside.any(0).double(),
        "recall": (between <= _radii(generated, k)).any(1).double(),
        "density": inside.sum(0).double() / k,
        "coverage": inside.any(1).double(),
    }


def expected_coverage(n_real: int, n_generated: int, k: int = K) -> float:
    """Coverage where samples are drawn from the real distribution itself, of any shape (Naeem et al., Section 3.3).

    Of the other N - 1 real images and the M samples, the nearest k are all real with the probability that is missing.
    """
    missing = 1.0
    for i in range(1, k + 1):
        missing *= (n_real - i) / (n_real + n_generated - i)
    return 1 - missing


def _radii(points: Tensor, k: int) -> Tensor:
    # A point is the first of its own neighbours, at distance zero.
    return distances(points, points).kthvalue(k + 1, dim=1).values


def distances(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean distances (N, M) between features (N, D) and (M, D), exactly 0 for equal ones."""
    # The differences themselves: through squares, equal features would lie a rounding apart.
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")
