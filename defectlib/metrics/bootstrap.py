"""Error bars over images: how far a number would move if other images of the same kind had been drawn.

Each draw says how often every image was taken, and a measure is computed from these counts, so that the pairs of an
image with its own copies, which would make a set look less varied than it is, are left out. An interval holds the
percentiles of the draws' deviations from their own mean, around the value as it was measured. It does not cover the few
shots that were learned from: that takes other splits. Below ``LEAST`` images it is too narrow, and there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from defectlib.metrics.neighbours import NAMES, distances
from defectlib.metrics.perceptual import Protocol, lpips_pairwise

DRAWS, LEVEL, LEAST = 1000, 0.95, 8


def counts(n: int, seed: int, draws: int = DRAWS) -> NDArray[np.float64]:
    """How often each of ``n`` images is taken in each draw with replacement: (draws, n), rows sum to n."""
    return np.random.default_rng([seed, n]).multinomial(n, np.full(n, 1 / n), draws).astype(float)


def interval(value: float, drawn: NDArray) -> tuple[float, float]:
    """The 95 % interval around ``value`` from a measure's draws; NaN, where a draw left nothing, is passed over."""
    off = drawn[~np.isnan(drawn)]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(off - off.mean(), [tail, 1 - tail])
    return value + float(low), value + float(high)


def of_share(value: float, n: int, drawn: NDArray) -> tuple[float, float]:
    """The interval of a share of ``n`` images: its draws' or Wilson's, whichever is wider, within [0, 1].

    Draws of a share that is 0 or 1 have no width.
    """
    wilson = binomtest(round(value * n), n).proportion_ci(LEVEL, method="wilson")
    low, high = interval(value, drawn)
    return max(0.0, min(low, float(wilson.low))), min(1.0, max(high, float(wilson.high)))


def told(n: int, bounds: Callable[[], tuple[float, float]], over: str = "samples") -> dict[str, Any]:
    """Bounds over ``n`` images as a protocol holds them; nothing of too few, or where no draw differs."""
    if n < LEAST:
        return {}
    low, high = bounds()
    return {"ci95": [low, high], "ci95_over": over} if low < high else {}


def mean(values: Tensor | NDArray, taken: NDArray) -> NDArray:
    """The mean of values (n,) in each draw."""
    return taken @ np.asarray(values, dtype=float) / taken.sum(1)


def median(values: Tensor | NDArray, taken: NDArray) -> NDArray:
    """The median of values (n,) in each draw."""
    values = np.asarray(values, dtype=float)
    return np.array([np.median(np.repeat(values, times.astype(int))) for times in taken])


def kid(real: Tensor, generated: Tensor, taken_real: NDArray, taken: NDArray) -> NDArray:
    """KID of all images in each draw, both sets drawn anew: the unbiased squared MMD over pairs of different images.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        taken_real: (draws, N), from :func:`counts`.
        taken: (draws, M).
    """
    x, y = (features.double().numpy() for features in (real, generated))
    across = ((taken_real @ _kernel(x, y)) * taken).sum(1) / (taken_real.sum(1) * taken.sum(1))
    return _over_pairs(_kernel(x, x), taken_real) + _over_pairs(_kernel(y, y), taken) - 2 * across


def inception_score(logits: Tensor, taken: NDArray) -> NDArray:
    """IS in one split in each draw: exp of (mean negative entropy of an image's classes + entropy of their mean)."""
    p = logits.double().softmax(1)
    own = torch.xlogy(p, p).sum(1).numpy()
    mixed = torch.from_numpy(taken / taken.sum(1, keepdims=True)) @ p
    return np.exp(mean(own, taken) - torch.xlogy(mixed, mixed).sum(1).numpy())


def ic_lpips(embeddings: Tensor, clusters: Sequence[NDArray], protocol: Protocol, taken: NDArray) -> NDArray:
    """IC-LPIPS in each draw, the clusters staying as they are; NaN where no cluster has two images.

    Args:
        embeddings: (N, D).
        clusters: The places of each cluster's images, see :func:`~defectlib.metrics.perceptual.clusters`.
        protocol: What a cluster of fewer than two images counts as.
        taken: (draws, N).
    """
    lonely = 0.0 if protocol.singles == "zero" else np.nan
    scores = np.full((len(clusters), len(taken)), lonely)
    for score, places in zip(scores, clusters):
        if len(places) > 1:
            found = _over_pairs(lpips_pairwise(embeddings[torch.from_numpy(places)]).numpy(), taken[:, places])
            score[:] = np.where(np.isnan(found), lonely, found)
    there = ~np.isnan(scores)
    with np.errstate(invalid="ignore"):
        return np.nansum(scores, 0) / there.sum(0)


def neighbours(
    real: Tensor, generated: Tensor, taken_real: NDArray, taken: NDArray, k: int
) -> dict[str, NDArray[np.float64]]:
    """Precision, recall, density and coverage in each draw, both sets drawn anew.

    Balls reach to the neighbour whose number is to k as the different images of a draw are to all: among fewer images
    the k-th neighbour lies farther off.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        taken_real: (draws, N), from :func:`counts`.
        taken: (draws, M).
        k: See :func:`defectlib.metrics.neighbours.values`.
    """
    real, generated = real.double(), generated.double()
    between, own_real, own = (distances(a, b).numpy() for a, b in ((real, generated), (real,) * 2, (generated,) * 2))
    n, m = between.shape
    drawn = {name: np.zeros(len(taken)) for name in NAMES}
    for i, (times_real, times) in enumerate(zip(taken_real, taken)):
        some_real, some = np.flatnonzero(times_real), np.flatnonzero(times)
        reach_real, reach = (
            _radii(every[np.ix_(part, part)], max(1, round(k * len(part) / len(every))))
            for every, part in ((own_real, some_real), (own, some))
        )
        apart, of_real, of_drawn = between[np.ix_(some_real, some)], times_real[some_real], times[some]
        inside = apart <= reach_real[:, None]
        drawn["precision"][i] = inside.any(0) @ of_drawn / m
        drawn["recall"][i] = of_real @ (apart <= reach).any(1) / n
        drawn["density"][i] = of_real @ inside @ of_drawn / (m * k)
        drawn["coverage"][i] = of_real @ inside.any(1) / n
    return drawn


def _radii(apart: NDArray, k: int) -> NDArray:
    """The distance of each point to its k-th neighbour, from all distances (n, n), or to the last there is."""
    k = min(k, len(apart) - 1)
    return np.partition(apart, k, axis=1)[:, k]


def _kernel(x: NDArray, y: NDArray) -> NDArray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _over_pairs(values: NDArray, taken: NDArray) -> NDArray:
    """The mean of values (n, n) over the pairs of different images in each draw; NaN where there is no pair."""
    values = values - np.diag(np.diag(values))
    pairs = taken.sum(1) ** 2 - (taken**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((taken @ values) * taken).sum(1) / pairs
