"""Quality of generated images: KID, IS, LPIPS to the nearest real image, and IC-LPIPS.

Each is a pure function from features to a number, through torch-fidelity's and lpips' own arithmetic; :func:`evaluate`
extracts the features once and returns rows with the protocol beside each number. Features of perceptual networks are
embeddings whose squared Euclidean distance is LPIPS (:class:`defectlib.metrics.features.Perceptual`).

With 5 to 30 real images these numbers move a lot: KID is unbiased and may be negative, and is never clipped; where a set
is too small for a number to mean anything the number is withheld (None) and the reason stands in its protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from defectlib import images
from defectlib.metrics import features as extractors
from defectlib.metrics.features import metric_name

MINIMUM = 4
IS_SPLITS = 10
IS_ONE_SPLIT_BELOW = 100
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
    references: Literal["shots", "real"]


# The three released scripts. AnomalyDiffusion: the few-shot third as references; DFMGAN (metrics/lpips.py): every real
# image; SeaS: the images of its instance folder. DFMGAN and SeaS fill clusters in file order up to the cap; here, as in
# AnomalyDiffusion, the images of a full cluster are drawn at random, from a seed.
PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("anomalydiffusion", trunk="vgg", size=256, cap=50, singles="dropped", references="shots"),
        Protocol("dfmgan", trunk="alex", size=256, cap=200, singles="zero", references="real"),
        Protocol("seas", trunk="vgg", size=256, cap=140, singles="zero", references="shots"),
    )
}


def _vectors(values: Tensor, what: str) -> Tensor:
    if values.ndim != 2 or not values.is_floating_point():
        raise ValueError(f"{what} must be floats (N, D), got {values.dtype} {tuple(values.shape)}")
    return values


def kid(
    features_real: Tensor,
    features_generated: Tensor,
    subset_cap: int = 1000,
    subsets: int = 100,
    seed: int = 0,
    minimum: int = MINIMUM,
) -> dict[str, Any]:
    """Kernel Inception Distance: unbiased squared MMD, polynomial kernel of degree 3 (Binkowski et al., 2018, Eq. 4).

    Args:
        features_real: (N, D).
        features_generated: (M, D).
        subset_cap: Largest subset; the size used is min(N, M, subset_cap).
        subsets: Random subsets that are averaged.
        seed: Of the subsets.
        minimum: Fewest real and fewest generated images for which a number is given.

    Returns:
        ``value``, ``sd`` (over subsets; it shows the drawing of subsets, not the uncertainty of the value),
        ``subset_size``, ``subsets``, and ``why_withheld`` where the value is None.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    n, m = len(_vectors(features_real, "real features")), len(_vectors(features_generated, "generated features"))
    size = min(n, m, subset_cap)
    found = {"value": None, "sd": None, "subset_size": size, "subsets": subsets}
    if min(n, m) < max(2, minimum):
        return found | {"why_withheld": f"KID of {n} real and {m} generated images; at least {max(2, minimum)} of each"}
    result = kid_features_to_metric(
        features_real.double(), features_generated.double(), kid_subset_size=size, kid_subsets=subsets, rng_seed=seed,
        verbose=False,
    )  # fmt: skip
    return found | {"value": result[KEY_METRIC_KID_MEAN], "sd": result[KEY_METRIC_KID_STD]}


def inception_score(logits: Tensor, splits: int | None = None, seed: int = 0, minimum: int = MINIMUM) -> dict[str, Any]:
    """Inception Score: exp of the mean divergence of an image's class distribution from the mean one (Salimans, 2016).

    Args:
        logits: (N, C).
        splits: Parts of the shuffled set whose scores are averaged; default 10, and 1 below 100 images, where parts of a
            tenth would hold next to nothing.
        seed: Of the shuffle.
        minimum: Fewest images for which a number is given.

    Returns:
        ``value``, ``sd`` (over splits; None for one split), ``splits``, and ``why_withheld`` where the value is None.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    n = len(_vectors(logits, "logits"))
    splits = (IS_SPLITS if n >= IS_ONE_SPLIT_BELOW else 1) if splits is None else splits
    if n < max(minimum, splits):
        reason = f"IS of {n} images in {splits} split(s); at least {max(minimum, splits)}"
        return {"value": None, "sd": None, "splits": splits, "why_withheld": reason}
    result = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    sd = result[KEY_METRIC_ISC_STD] if splits > 1 else None
    return {"value": result[KEY_METRIC_ISC_MEAN], "sd": sd, "splits": splits}


def lpips_distances(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS between every embedding of ``a`` (N, D) and of ``b`` (M, D): float32 (N, M), exactly 0 for equal images."""
    _vectors(a, "embeddings"), _vectors(b, "embeddings")
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
    embeddings_generated: Tensor, embeddings_references: Tensor, protocol: Protocol, seed: int = 0
) -> dict[str, Any]:
    """Intra-cluster LPIPS (Ojha et al., 2021): each image joins its nearest reference; mean distance within clusters.

    The pairs come from embeddings made once an image; memory is bounded by one cluster at a time.

    Args:
        embeddings_generated: (N, D).
        embeddings_references: (R, D).
        protocol: Cap of a cluster and what a cluster of fewer than two images counts as.
        seed: Of the images that stay in a cluster above the cap.

    Returns:
        ``value``, ``clusters`` (their sizes before the cap, one a reference), ``capped`` (was anything drawn at random),
        and ``why_withheld`` where no cluster has two images.
    """
    nearest = lpips_to_nearest(embeddings_generated, embeddings_references)[1].numpy()
    found = {"clusters": np.bincount(nearest, minlength=len(embeddings_references)).tolist()}
    found["capped"] = max(found["clusters"]) > protocol.cap
    scores = []
    for k in range(len(embeddings_references)):
        members = np.flatnonzero(nearest == k)
        if len(members) > protocol.cap:
            members = np.sort(np.random.default_rng([seed, k]).choice(members, protocol.cap, replace=False))
        if len(members) >= 2:
            scores.append(mean_pairwise(embeddings_generated[torch.from_numpy(members)]))
        elif protocol.singles == "zero":
            scores.append(0.0)
    if max(found["clusters"]) < 2:
        return found | {"value": None, "why_withheld": "IC-LPIPS: no cluster has two images"}
    return found | {"value": float(np.mean(scores))}


def subset_spread(features_real: Tensor, features_generated: Tensor, repeats: int = 20, seed: int = 0) -> pd.DataFrame:
    """KID of random halves, quarters and so on: how much it moves by itself.

    Args:
        features_real: (N, D).
        features_generated: (M, D).
        repeats: Random subsets a size.
        seed: Of the subsets.

    Returns:
        Columns ``pair`` ("real vs generated", and "real vs real" from disjoint subsets, which should be zero), ``n``
        (images a side, two or more) and ``kid``; sizes ascend.

    Raises:
        ValueError: There are fewer than four images on a side: nothing can be halved.
    """
    rows = []
    for pair, largest in (
        ("real vs generated", min(len(features_real), len(features_generated)) // 2),
        ("real vs real", len(features_real) // 2),
    ):
        if largest < 2:
            raise ValueError(f"KID of {pair} cannot be halved: four images a side are needed, there are fewer")
        sizes = sorted({largest // 2**k for k in range(8) if largest // 2**k >= 2})
        for n in sizes:
            for repeat in range(repeats):
                rng = np.random.default_rng([seed, n, repeat])
                one = rng.permutation(len(features_real))
                left, right = features_real[one[:n]], features_real[one[n : 2 * n]]
                if pair == "real vs generated":
                    right = features_generated[rng.permutation(len(features_generated))[:n]]
                rows.append((pair, n, kid(left, right, n, 1, 0, minimum=2)["value"]))
    return pd.DataFrame(rows, columns=["pair", "n", "kid"])


def evaluate(
    generated: Sequence[Tensor],
    real: Sequence[Tensor],
    refs: Sequence[Tensor],
    extractor: str = "tiny",
    perceptual: str | None = None,
    protocol: str | Protocol = "anomalydiffusion",
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    subset_cap: int = 1000,
    subsets: int = 100,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """KID, IS, LPIPS to the nearest real and IC-LPIPS of one defect's samples.

    Images go through 8 bits once, as files would; each is passed through each network once. The result depends on the sets
    of images, not on their order.

    Args:
        generated: Samples, float32 (3, H, W) in [-1, 1].
        real: Real images of the defect, for KID and LPIPS.
        refs: The shots, for protocols that cluster around shots.
        extractor: "tiny" or "inception", for KID and IS.
        perceptual: "tiny", "alex" or "vgg", for LPIPS and IC-LPIPS; default the protocol's own trunk.
        protocol: One of ``PROTOCOLS``, by name or as a record.
        seeds: Of the random subsets; the value is the mean over them.
        subset_cap: See :func:`kid`.
        subsets: See :func:`kid`.
        batch_size: Images a forward pass.

    Returns:
        Rows ``{"metric": "tiny-kid", "value", "sd", "protocol"}``. ``protocol["sd_over"]`` says what ``sd`` is over: "seeds",
        "samples" (LPIPS), or None where nothing is random. A withheld value is None, its reason ``why_withheld``.

    Raises:
        ValueError: An unknown name, an empty set, or an image of another range or type.
        FileNotFoundError: The weights of an extractor are missing.
    """
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"there is no IC-LPIPS protocol '{protocol}'; there are: {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]
    for pictures in (generated, real, refs):
        extractors.check_images(pictures)
    if not len(seeds):
        raise ValueError("at least one seed is needed")
    extract = extractors.load(extractor)
    trunk = extractors.load_perceptual(perceptual or protocol.trunk)
    generated, real, refs = (sorted(pictures, key=_content) for pictures in (generated, real, refs))
    sets = {
        "n_real": len(real), "n_generated": len(generated), "image_size": generated[0].shape[-1], "seeds": list(seeds),
    }  # fmt: skip
    return [
        *_distribution_rows(generated, real, extract, sets, subset_cap, subsets, batch_size),
        *_perceptual_rows(generated, real, refs, trunk, protocol, sets, batch_size),
    ]


def _content(picture: Tensor) -> bytes:
    """A key that puts images in one order, whatever the order of the files."""
    return hashlib.sha256(images.to_uint8(picture).tobytes()).digest()


def _row(name: str, runs: Sequence[dict[str, Any]], protocol: dict[str, Any], is_random: bool) -> dict[str, Any]:
    """One metric from its results over seeds; their spread is the ``sd`` where something is random."""
    values = [run["value"] for run in runs]
    rest = {k: v for k, v in runs[0].items() if k not in ("value", "sd")}
    if None in values:
        return {"metric": name, "value": None, "sd": None, "protocol": {**protocol, **rest, "sd_over": None}}
    sd = float(np.std(values, ddof=1)) if is_random and len(values) > 1 else None
    shown = {**protocol, **rest, "sd_over": "seeds" if sd is not None else None}
    return {"metric": name, "value": float(np.mean(values)), "sd": sd, "protocol": shown}


def _distribution_rows(
    generated: Sequence[Tensor],
    real: Sequence[Tensor],
    extract: extractors.Extractor,
    sets: dict[str, Any],
    subset_cap: int,
    subsets: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """KID and IS."""
    features, logits = extract.both(generated, batch_size)
    features_real = extract(real, batch_size)
    shared = {
        "extractor": extract.name, "weights_sha256": extract.weights_sha256, "resize": extract.resize, **sets,
    }  # fmt: skip
    kids = [kid(features_real, features, subset_cap, subsets, seed) for seed in sets["seeds"]]
    # A subset as large as both sets is both sets: nothing is drawn.
    drawn = kids[0]["subset_size"] < max(len(real), len(generated))
    scores = [inception_score(logits, seed=seed) for seed in sets["seeds"]]
    return [
        _row(metric_name(extract.name, "kid"), kids, {**shared, "kernel": "polynomial, degree 3, unbiased"}, drawn),
        _row(metric_name(extract.name, "is"), scores, {**shared, "classes": logits.shape[1]}, scores[0]["splits"] > 1),
    ]


def _perceptual_rows(
    generated: Sequence[Tensor],
    real: Sequence[Tensor],
    refs: Sequence[Tensor],
    trunk: extractors.Perceptual,
    protocol: Protocol,
    sets: dict[str, Any],
    batch_size: int,
) -> list[dict[str, Any]]:
    """LPIPS to the nearest real image, and IC-LPIPS."""
    size = trunk.size or protocol.size
    drawn = trunk.embed(generated, size, batch_size)
    around_real = trunk.embed(real, size, batch_size)
    around = around_real if protocol.references == "real" else trunk.embed(refs, size, batch_size)
    nearest = lpips_to_nearest(drawn, around_real)[0].double()
    shared = {
        "extractor": trunk.name, "weights_sha256": trunk.weights_sha256,
        "resize": f"{images.IMAGE_FILTER} to {size} px", **sets,
    }  # fmt: skip
    lpips = {
        "metric": metric_name(trunk.name, "lpips"),
        "value": nearest.mean().item(),
        "sd": nearest.std().item() if len(nearest) > 1 else None,
        "protocol": {**shared, "distance_to": "nearest real image", "sd_over": "samples" if len(nearest) > 1 else None},
    }
    clustered = [ic_lpips(drawn, around, protocol, seed) for seed in sets["seeds"]]
    about = {
        **shared, "protocol": protocol.name, "protocol_trunk": protocol.trunk, "cap": protocol.cap,
        "singles": protocol.singles, "references": protocol.references, "n_references": len(around),
    }  # fmt: skip
    return [lpips, _row(metric_name(trunk.name, "ic-lpips"), clustered, about, clustered[0]["capped"])]
