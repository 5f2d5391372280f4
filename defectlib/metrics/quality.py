"""Quality of generated images: KID, IS, precision to coverage, LPIPS to the nearest real image, and IC-LPIPS.

Each is a pure function from features to a number; KID, IS and LPIPS go through torch-fidelity's and lpips' own
arithmetic. :func:`evaluate` extracts the features once and returns rows with the protocol and the interval beside each
number.

With 5 to 30 real images these numbers move a lot. KID is unbiased, may be negative, and is never clipped. Where a set
is too small for a number to mean anything the number is withheld (None) and the reason stands in its protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from defectlib import images
from defectlib.metrics import bootstrap, neighbours
from defectlib.metrics import features as extractors
from defectlib.metrics.features import metric_name
from defectlib.metrics.perceptual import PROTOCOLS, Protocol, clusters, ic_lpips, lpips_to_nearest, vectors

MINIMUM = 4
IS_SPLITS = 10
IS_ONE_SPLIT_BELOW = 100
NEIGHBOUR_DRAWS = 300  # each sorts the sets' distances anew


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

    n, m = len(vectors(features_real, "real features")), len(vectors(features_generated, "generated features"))
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
        splits: Parts of the shuffled set whose scores are averaged; default 10, and 1 below 100 images, where a
            tenth would hold next to nothing.
        seed: Of the shuffle.
        minimum: Fewest images for which a number is given.

    Returns:
        ``value``, ``sd`` (over splits; None for one split), ``splits``, and ``why_withheld`` where the value is None.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    n = len(vectors(logits, "logits"))
    splits = (IS_SPLITS if n >= IS_ONE_SPLIT_BELOW else 1) if splits is None else splits
    if n < max(minimum, splits):
        reason = f"IS of {n} images in {splits} split(s); at least {max(minimum, splits)}"
        return {"value": None, "sd": None, "splits": splits, "why_withheld": reason}
    result = isc_features_to_metric(logits, splits=splits, shuffle=True, rng_seed=seed)
    sd = result[KEY_METRIC_ISC_STD] if splits > 1 else None
    return {"value": result[KEY_METRIC_ISC_MEAN], "sd": sd, "splits": splits}


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
    """KID, IS, precision, recall, density, coverage, LPIPS to the nearest real and IC-LPIPS of one defect's samples.

    Images go through 8 bits once, as files would; each is passed through each network once. The result depends on the
    sets of images, not on their order.

    Args:
        generated: Samples, float32 (3, H, W) in [-1, 1].
        real: Real images of the defect, for KID and LPIPS.
        refs: What protocols that do not cluster around all real images cluster around.
        extractor: "tiny" or "inception", for KID and IS.
        perceptual: "tiny", "alex" or "vgg", for LPIPS and IC-LPIPS; default the protocol's own trunk.
        protocol: One of ``PROTOCOLS``, by name or as a record.
        seeds: Of the random subsets; the value is the mean over them.
        subset_cap: See :func:`kid`.
        subsets: See :func:`kid`.
        batch_size: Images a forward pass.

    Returns:
        Rows ``{"metric": "tiny-kid", "value", "sd", "protocol"}``. ``protocol["sd_over"]`` says what ``sd`` is over:
        "seeds", "samples" (LPIPS), or None where nothing is random. ``protocol["ci95"]`` is the interval of a bootstrap
        over the images that ``protocol["ci95_over"]`` names, see ``metrics.bootstrap``. A withheld value is None, its
        reason ``why_withheld``.

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


def names(extractor: str, perceptual: str) -> list[str]:
    """The metrics that :func:`evaluate` returns, in order."""
    pairs = [(extractor, kind) for kind in ("kid", "is", *neighbours.NAMES)]
    pairs += [(perceptual, "lpips"), (perceptual, "ic-lpips")]
    return [metric_name(network, kind) for network, kind in pairs]


def _content(picture: Tensor) -> bytes:
    """A key that puts images in one order, whatever the order of the files."""
    return hashlib.sha256(images.to_uint8(picture).tobytes()).digest()


def _row(
    name: str,
    runs: Sequence[dict[str, Any]],
    protocol: dict[str, Any],
    is_random: bool,
    interval: Callable[[float], tuple[float, float]],
    over: str = "samples",
) -> dict[str, Any]:
    """One metric from its results over seeds; their spread is the ``sd`` where something is random.

    ``interval`` gives the bounds around the value if other images had been there: those that ``over`` names.
    """
    values = [run["value"] for run in runs]
    rest = {k: v for k, v in runs[0].items() if k not in ("value", "sd")}
    if None in values:
        return {"metric": name, "value": None, "sd": None, "protocol": {**protocol, **rest, "sd_over": None}}
    value = float(np.mean(values))
    sd = float(np.std(values, ddof=1)) if is_random and len(values) > 1 else None
    shown = {**protocol, **rest, "sd_over": "seeds" if sd is not None else None}
    counted = ("n_generated", "n_real") if "real" in over else ("n_generated",)
    shown |= bootstrap.told(min(protocol[count] for count in counted), lambda: interval(value), over)
    return {"metric": name, "value": value, "sd": sd, "protocol": shown}


def _distribution_rows(
    generated: Sequence[Tensor],
    real: Sequence[Tensor],
    extract: extractors.Extractor,
    sets: dict[str, Any],
    subset_cap: int,
    subsets: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """KID, IS, precision, recall, density and coverage."""
    features, logits = extract.both(generated, batch_size)
    features_real = extract(real, batch_size)
    shared = {
        "extractor": extract.name, "weights_sha256": extract.weights_sha256, "resize": extract.resize, **sets,
    }  # fmt: skip
    kids = [kid(features_real, features, subset_cap, subsets, seed) for seed in sets["seeds"]]
    # A subset as large as both sets is both sets: nothing is drawn.
    drawn = kids[0]["subset_size"] < max(len(real), len(generated))
    scores = [inception_score(logits, seed=seed) for seed in sets["seeds"]]
    taken_real, taken = bootstrap.counts(len(real), 0), bootstrap.counts(len(generated), 1)
    rows = [
        _row(
            metric_name(extract.name, "kid"), kids, {**shared, "kernel": "polynomial, degree 3, unbiased"}, drawn,
            lambda value: bootstrap.interval(value, bootstrap.kid(features_real, features, taken_real, taken)),
            "samples and real images",
        ),
        _row(
            metric_name(extract.name, "is"), scores, {**shared, "classes": logits.shape[1]}, scores[0]["splits"] > 1,
            lambda value: bootstrap.interval(value, bootstrap.inception_score(logits, taken)),
        ),
    ]  # fmt: skip
    return rows + _neighbour_rows(features_real, features, shared, extract.name)


def _neighbour_rows(real: Tensor, generated: Tensor, shared: dict[str, Any], extractor: str) -> list[dict[str, Any]]:
    """Precision, recall, density and coverage; withheld below ``neighbours.LEAST`` images a side."""
    about = {**shared, "neighbour": neighbours.K}
    if min(len(real), len(generated)) < neighbours.LEAST:
        why = f"{len(real)} real and {len(generated)} generated images; at least {neighbours.LEAST} of each"
        told = {**about, "why_withheld": why, "sd_over": None}
        return [
            {"metric": metric_name(extractor, name), "value": None, "sd": None, "protocol": told}
            for name in neighbours.NAMES
        ]
    found = neighbours.values(real, generated)
    taken_real, taken = (bootstrap.counts(len(x), seed, NEIGHBOUR_DRAWS) for seed, x in enumerate((real, generated)))
    drawn = bootstrap.neighbours(real, generated, taken_real, taken, neighbours.K)
    tell = {"coverage": {"of_real_itself": neighbours.expected_coverage(len(real), len(generated))}}
    rows = []
    for name, own in found.items():

        def interval(value: float, name: str = name, n: int = len(own)) -> tuple[float, float]:
            if name == "density":
                return bootstrap.interval(value, drawn[name])
            return bootstrap.of_share(value, n, drawn[name])

        run, told = {"value": own.mean().item()}, about | tell.get(name, {})
        rows.append(_row(metric_name(extractor, name), [run], told, False, interval, "samples and real images"))
    return rows


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
    place = {_content(picture): i for i, picture in enumerate(real)}  # shots are real images too, as a rule
    others = [picture for picture in refs if _content(picture) not in place]
    place |= {_content(picture): len(real) + i for i, picture in enumerate(others)}
    embedded = trunk.embed([*real, *others], size, batch_size)
    around_real = embedded[: len(real)]
    around = around_real if protocol.references == "real" else embedded[[place[_content(shot)] for shot in refs]]
    nearest = lpips_to_nearest(drawn, around_real)[0].double()
    taken = bootstrap.counts(len(generated), 0)
    shared = {
        "extractor": trunk.name, "weights_sha256": trunk.weights_sha256,
        "resize": f"{images.IMAGE_FILTER} to {size} px", **sets,
    }  # fmt: skip
    few = f"LPIPS of {len(nearest)} generated images; at least {MINIMUM}" if len(nearest) < MINIMUM else None
    run = {"value": None, "why_withheld": few} if few else {"value": nearest.mean().item()}
    lpips = _row(
        metric_name(trunk.name, "lpips"), [run], {**shared, "distance_to": "nearest real image"}, False,
        lambda value: bootstrap.interval(value, bootstrap.mean(nearest, taken)),
    )  # fmt: skip
    if run["value"] is not None:
        lpips |= {"sd": nearest.std().item(), "protocol": lpips["protocol"] | {"sd_over": "samples"}}
    nearest_reference = lpips_to_nearest(drawn, around)[1]
    clustered = [ic_lpips(drawn, around, protocol, seed, nearest_reference) for seed in sets["seeds"]]
    if few:
        clustered = [found | {"value": None, "why_withheld": f"IC-{few}"} for found in clustered]
    about = {
        **shared, "protocol": protocol.name, "protocol_trunk": protocol.trunk, "cap": protocol.cap,
        "singles": protocol.singles, "references": protocol.references, "n_references": len(around),
    }  # fmt: skip
    places = clusters(nearest_reference, len(around), protocol, sets["seeds"][0])
    return [
        lpips,
        _row(
            metric_name(trunk.name, "ic-lpips"), clustered, about, clustered[0]["capped"],
            lambda value: bootstrap.interval(value, bootstrap.ic_lpips(drawn, places, protocol, taken)),
        ),
    ]  # fmt: skip
