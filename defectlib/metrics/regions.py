"""Regions and labels: mask IoU, AUROC, AP and F1 of pixels and images, PRO and IAP of defects, classification scores.

Masks and labels are bool, so the ground truth is one and the same for every measure (the released scripts erode it for
some and grow it for others). A measure that is undefined, because only one class is present, is None: see
:func:`why_undefined`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn.metrics import accuracy_score, confusion_matrix, confusion_matrix_at_thresholds, f1_score

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

SCORES = ("auroc", "ap", "f1_max", "f1_50", "f1_max_21")
INSTANCES = ("pro", "iap", "iap90")
PRO_LIMIT = 0.3
POOL_AT_256 = 21


def _pair(scores: ArrayLike, truth: ArrayLike, what: str) -> tuple[Array, Mask]:
    """Two arrays of one shape: finite floats and bools."""
    scores, truth = np.asarray(scores), np.asarray(truth)
    if truth.dtype != np.bool_:
        raise ValueError(f"{what} must be bool, got {truth.dtype}: binarise once, by images.read_mask")
    if not np.issubdtype(scores.dtype, np.floating) or not np.isfinite(scores).all():
        raise ValueError(f"the scores for {what} must be finite floats, got {scores.dtype}")
    if scores.shape != truth.shape:
        raise ValueError(f"the scores are {scores.shape} but {what} are {truth.shape}")
    return scores, truth


def why_undefined(truth: ArrayLike) -> str | None:
    """Why AUROC, AP and F1 of these labels do not exist, in a few words; None where they do."""
    truth = np.asarray(truth)
    if truth.size == 0:
        return "nothing to score"
    if truth.all():
        return "no negative: every label is defect"
    if not truth.any():
        return "no positive: no label is defect"
    return None


def binary_scores(scores: ArrayLike, truth: ArrayLike) -> dict[str, float | None]:
    """AUROC, AP and F1 of scores against labels, all from one sort.

    * ``auroc``: area under the ROC curve, ties by trapezoids (scikit-learn's ``roc_auc_score``)
    * ``ap``: sum of precision times the step in recall, no interpolation (``average_precision_score``)
    * ``f1_max``: the largest F1 over all thresholds, exact
    * ``f1_50``: F1 of ``score > 0.5``
    * ``f1_max_21``: the largest F1 over ``score > t`` for t = 0, 0.05 ... 1, as AnomalyDiffusion's
      ``test-localization.py`` computes its F1-max; never above ``f1_max``

    Args:
        scores: Floats of any shape; the F1 at fixed thresholds expects probabilities in [0, 1].
        truth: bool of the same shape, True is defect.

    Returns:
        The five numbers; None for all where only one class is present.
    """
    scores, truth = _pair(scores, truth, "labels")
    if why_undefined(truth) is not None:
        return dict.fromkeys(SCORES)
    _, fps, _, tps, thresholds = confusion_matrix_at_thresholds(truth.ravel(), scores.ravel())
    positives, negatives = tps[-1], fps[-1]
    f1 = 2 * tps / (tps + fps + positives)
    recall_steps = np.diff(tps, prepend=0.0) / positives
    # Thresholds fall, so the last one above t holds the counts of `score > t`.
    above = np.searchsorted(-thresholds, -np.array([0.5, *(k / 20 for k in range(21))]), side="left") - 1
    fixed = np.where(above >= 0, f1[np.maximum(above, 0)], 0.0)
    return {
        "auroc": float(np.trapezoid(np.r_[0.0, tps], np.r_[0.0, fps]) / (positives * negatives)),
        "ap": float((recall_steps * tps / (tps + fps)).sum()),
        "f1_max": float(f1.max()),
        "f1_50": float(fixed[0]),
        "f1_max_21": float(fixed[1:].max()),
    }


def pixel_metrics(maps: ArrayLike, masks: ArrayLike) -> dict[str, float | None]:
    """:func:`binary_scores` over all pixels of all images, as ``pixel_auroc`` ... ``pixel_f1_max_21``.

    Args:
        maps: Defect probabilities (N, H, W) in [0, 1].
        masks: Ground truth (N, H, W), bool.
    """
    maps, masks = _pair(maps, masks, "masks")
    return {f"pixel_{name}": value for name, value in binary_scores(maps, masks).items()}


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float | None]:
    """AUROC, AP, F1-max and F1 at 0.5 over images, as ``image_auroc``, ``image_ap``, ``image_f1_max``, ``image_f1_50``.

    Args:
        scores: One score an image (N,), as :func:`image_scores` gives them.
        labels: bool (N,), True where the image has a defect.
    """
    values = binary_scores(scores, labels)
    return {f"image_{name}": values[name] for name in SCORES if name != "f1_max_21"}


def instances(masks: ArrayLike) -> list[NDArray[np.int64]]:
    """The single defects of bool masks (N, H, W): of each the places of its pixels in the flattened array.

    Pixels that touch at a corner are one defect (8-neighbourhood), as in MVTec AD's evaluation.
    """
    masks = np.asarray(masks)
    if masks.dtype != np.bool_:
        raise ValueError(f"masks must be bool, got {masks.dtype}: binarise once, by images.read_mask")
    found = []
    for i, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        inside = np.flatnonzero(labels)
        names = labels.ravel()[inside]
        order = np.argsort(names, kind="stable")
        sizes = np.bincount(names, minlength=count + 1)[1:]
        found += np.split(inside[order] + i * mask.size, np.cumsum(sizes)[:-1]) if count else []
    return found


def instance_metrics(maps: ArrayLike, masks: ArrayLike, limit: float = PRO_LIMIT) -> dict[str, float | None]:
    """PRO, IAP and IAP90, each exact: over all thresholds, from one sort of the pixels outside and one of those inside.

    * ``pro``: the share of a defect's pixels that are found, averaged over defects whatever their size, as a curve
      over the share of false pixels, its area up to ``limit`` divided by ``limit`` (MVTec AD's per-region overlap).
    * ``iap``: a defect is found where more than half of its pixels are; average precision with the pixels' precision
      and the defects' recall: the sum of precision times the step in recall.
    * ``iap90``: the pixels' precision at the highest threshold that finds nine tenths of the defects.

    IAP and IAP90 are those of DeSTSeg (AdaBLDM's tables), whose text leaves the sum open; this is our definition.

    Args:
        maps: Defect scores (N, H, W), finite floats.
        masks: Ground truth (N, H, W), bool.
        limit: Largest share of false pixels in PRO, in (0, 1].

    Returns:
        The three numbers; None for all where only one class is present.
    """
    maps, masks = _pair(maps, masks, "masks")
    if maps.ndim != 3:
        raise ValueError(f"maps must be (N, H, W), got {maps.shape}")
    if not 0 < limit <= 1:
        raise ValueError(f"the limit of PRO must lie in (0, 1], got {limit}")
    if why_undefined(masks) is not None:
        return dict.fromkeys(INSTANCES)
    regions = [maps.ravel()[places] for places in instances(masks)]
    false = np.sort(maps[~masks])
    true = np.concatenate(regions)
    # A pixel is found from the threshold of its own score on. What it adds to the area is the false positive rate still
    # to come; over equal scores the curve is a straight line, so there it is half of the step's own.
    above = 1 - np.searchsorted(false, true, "right") / len(false)
    up_to = 1 - np.searchsorted(false, true, "left") / len(false)
    reached = np.clip(limit - above, 0, None)
    step = np.maximum(up_to - above, np.finfo(float).tiny)
    area = np.where(up_to <= limit, limit - (above + up_to) / 2, reached**2 / (2 * step))
    weights = np.concatenate([np.full(len(scores), 1 / len(scores)) for scores in regions]) / len(regions)
    # The score that more than half of a defect's pixels reach.
    needed = np.sort([np.partition(s, len(s) - len(s) // 2 - 1)[len(s) - len(s) // 2 - 1] for s in regions])[::-1]
    true = np.sort(true)
    hits, misses = (len(scores) - np.searchsorted(scores, needed, "left") for scores in (true, false))
    precision = hits / (hits + misses)
    recall = (len(needed) - np.searchsorted(needed[::-1], needed, "left")) / len(needed)
    return {
        "pro": float((weights * area).sum() / limit),
        "iap": float((np.diff(recall, prepend=0.0) * precision).sum()),
        "iap90": float(precision[np.argmax(recall >= 0.9 - 1e-12)]),
    }


def image_scores(maps: ArrayLike, pool: int | None = None) -> Array:
    """One score an image: the largest value of the average-pooled map, stride 1, zeros outside (DRAEM).

    Args:
        maps: Defect probabilities (N, H, W) in [0, 1].
        pool: Odd side of the window; default the published 21 of a 256 px map, scaled to the map's larger side.

    Returns:
        Scores (N,) in [0, 1].
    """
    maps = np.asarray(maps, dtype=np.float32)
    if maps.ndim != 3:
        raise ValueError(f"maps must be (N, H, W), got {maps.shape}")
    pool = default_pool(max(maps.shape[1:])) if pool is None else pool
    if pool < 1 or pool % 2 == 0:
        raise ValueError(f"the pooling window must be odd and positive, got {pool}")
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(maps)[:, None], pool, stride=1, padding=pool // 2)
    return pooled.amax(dim=(1, 2, 3)).numpy().astype(np.float64)


def default_pool(side: int) -> int:
    """The odd window nearest to 21/256 of ``side``: 21 at 256 px, 5 at 64 px."""
    return 2 * int(max(0.0, round((POOL_AT_256 * side / 256 - 1) / 2))) + 1


def mask_iou(a: ArrayLike, b: ArrayLike) -> float | None:
    """Intersection over union of two bool masks of one shape; None where both are empty."""
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != np.bool_ or b.dtype != np.bool_ or a.shape != b.shape:
        raise ValueError(f"two bool masks of one shape are needed, got {a.dtype} {a.shape} and {b.dtype} {b.shape}")
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else None


BY_DEFECT = "_by_defect"
"""Ends the name of a score of one defect alone: a table averages over defects what it finds under one name."""
ORACLE = "_test_oracle"
"""Ends the name of a score of the checkpoint that is best on the test set, of a training whose last step is tested."""


def by_defect(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Of each class what :func:`classification_metrics` has of all: the share of its images found, and its F1.

    Args:
        confusion: Rows are true, columns predicted.
        classes: In that order.

    Returns:
        Class -> ``accuracy`` (its recall; None without an image of it) and ``f1_macro``, under the names of the scores
        that they are part of.
    """
    counts, found = np.asarray(confusion, float), {}
    for i, name in enumerate(classes):
        true, said = counts[i].sum(), counts[:, i].sum()
        recall = counts[i, i] / true if true else None
        found[name] = {"accuracy": recall, "f1_macro": 2 * counts[i, i] / (true + said) if true + said else 0.0}
    return found


def classification_metrics(y_true: Sequence, y_pred: Sequence, classes: Sequence) -> dict:
    """Accuracy, macro F1 and confusion over a fixed list of classes.

    A class with neither a true nor a predicted image counts as F1 0 (scikit-learn's ``zero_division=0``).

    Args:
        y_true: The labels.
        y_pred: What was predicted, in the same order.
        classes: All labels, in the order of the rows and columns of the confusion.

    Returns:
        ``accuracy`` and ``f1_macro`` (float) and ``confusion`` (lists; rows are true, columns predicted).
    """
    if len(y_true) != len(y_pred) or not len(y_true):
        raise ValueError(
            f"as many predictions as labels are needed, and at least one; got {len(y_pred)} and {len(y_true)}"
        )
    unknown = sorted({str(y) for y in [*y_true, *y_pred] if y not in classes})
    if unknown:
        raise ValueError(f"labels that are not among the classes: {', '.join(unknown)}")
    order = list(classes)
    return {
        "accuracy": float(accuracy_score(y_true, y_pred)),
        "f1_macro": float(f1_score(y_true, y_pred, labels=order, average="macro", zero_division=0)),
        "confusion": confusion_matrix(y_true, y_pred, labels=order).tolist(),
    }
