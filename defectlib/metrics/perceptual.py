"""LPIPS between embeddings, and IC-LPIPS with its protocols as data.

Embeddings are those of :class:`defectlib.metrics.features.Perceptual`: their squared Euclidean distance is LPIPS, so
every image is passed through a network once, however many pairs it is part of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2**18


@dataclass(frozen=True)
class Protocol:
    """One of the computations that papers call IC-LPIPS.

    ``trunk`` is the network, ``size`` the side images are resized to, ``cap`` the most images a cluster keeps,
    ``singles`` what a cluster of fewer than two images counts as, and ``references`` the real images that clusters form
    around.
    """

    name: str
    trunk: str
    size: int
    cap: int
    singles: Literal["dropped", "zero"]
    references: Literal["first third", "shots", "real"]


# The three released scripts. AnomalyDiffusion: the few-shot third as references; DFMGAN (metrics/lpips.py): every real
# image; SeaS: the images of its instance folder. DFMGAN and SeaS fill clusters in file order up to the cap; here, as in
# AnomalyDiffusion, the images of a full cluster are drawn at random, from a seed.
PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("anomalydiffusion", trunk="vgg", size=256, cap=50, singles="dropped", references="first third"),
        Protocol("dfmgan", trunk="alex", size=256, cap=200, singles="zero", references="real"),
        Protocol("seas", trunk="vgg", size=256, cap=140, singles="zero", references="shots"),
    )
}


def vectors(values: Tensor, what: str) -> Tensor:
    """Pass floats (N, D) through, or raise ValueError naming ``what``."""
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"{what} must be floats (N, D), got {values.dtype} {tuple(values.shape)}")
    return values


def lpips_distances(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS between every embedding of ``a`` (N, D) and of ``b`` (M, D): float32 (N, M), exactly 0 for equal images."""
    vectors(a, "embeddings"), vectors(b, "embeddings")
    distances = torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, a.shape[1], BLOCK):
        left, right = a[:, start : start + BLOCK], b[:, start : start + BLOCK]
        for j in range(len(b)):
            distances[:, j] += (left - right[j]).square_().sum(1)
    return distances.float()


def lpips_pairwise(embeddings: Tensor) -> Tensor:
    """LPIPS between all pairs of a set: float32 (N, N), symmetric, zero diagonal."""
    return lpips_distances(embeddings, embeddings)


def lpips_to_nearest(embeddings_generated: Tensor, embeddings_real: Tensor) -> tuple[Tensor, Tensor]:
    """LPIPS of each generated image to its nearest real one: distances (N,) and which one it is (N,)."""
    nearest = lpips_distances(embeddings_generated, embeddings_real).min(dim=1)
    return nearest.values, nearest.indices


def mean_pairwise(embeddings: Tensor) -> float:
    """Mean LPIPS over all pairs of n >= 2 embeddings, without forming the pairs.

    The mean squared distance over pairs is 2 / (n - 1) times the squared distances to the mean, summed.
    """
    if len(embeddings) < 2:
        raise ValueError(f"a mean over pairs needs two images, got {len(embeddings)}")
    total = 0.0
    for start in range(0, embeddings.shape[1], BLOCK):
        block = embeddings[:, start : start + BLOCK].double()
        total += (block - block.mean(0)).square_().sum().item()
    return 2 * total / (len(embeddings) - 1)


def ic_lpips(
    embeddings_generated: Tensor,
    embeddings_references: Tensor,
    protocol: Protocol,
    seed: int = 0,
    nearest: Tensor | None = None,
) -> dict[str, Any]:
    """Intra-cluster LPIPS (Ojha et al., 2021): each image joins its nearest reference; mean distance within clusters.

    The pairs come from embeddings made once an image; memory is bounded by one cluster at a time.

    Args:
        embeddings_generated: (N, D).
        embeddings_references: (R, D).
        protocol: Cap of a cluster and what a cluster of fewer than two images counts as.
        seed: Of the images that stay in a cluster above the cap.
        nearest: Each image's nearest reference (N,), where it is known already.

    Returns:
        ``value``, ``clusters`` (their sizes before the cap, one a reference), ``capped`` (was anything drawn at
        random), and ``why_withheld`` where no cluster has two images.
    """
    if nearest is None:
        nearest = lpips_to_nearest(embeddings_generated, embeddings_references)[1]
    sizes = np.bincount(nearest.numpy(), minlength=len(embeddings_references)).tolist()
    found = {"clusters": sizes, "capped": max(sizes) > protocol.cap}
    scores = []
    for places in clusters(nearest, len(embeddings_references), protocol, seed):
        if len(places) >= 2:
            scores.append(mean_pairwise(embeddings_generated[torch.from_numpy(places)]))
        elif protocol.singles == "zero":
            scores.append(0.0)
    if max(sizes) < 2:
        return found | {"value": None, "why_withheld": "IC-LPIPS: no cluster has two images"}
    return found | {"value": float(np.mean(scores))}


def clusters(nearest: Tensor, n_references: int, protocol: Protocol, seed: int = 0) -> list[NDArray]:
    """The places of each reference's images; of more than ``protocol.cap``, so many are drawn by ``seed``."""
    found = []
    for k in range(n_references):
        places = np.flatnonzero(nearest.numpy() == k)
        if len(places) > protocol.cap:
            places = np.sort(np.random.default_rng([seed, k]).choice(places, protocol.cap, replace=False))
        found.append(places)
    return found
