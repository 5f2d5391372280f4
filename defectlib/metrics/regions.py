"""Regions and labels: mask IoU, AUROC, AP and F1 of pixels and of images, and classification scores.

Masks and labels are bool, so the ground truth is one and the same for every measure (the released scripts erode it for
some and grow it for others). A measure that is undefined, because only one class is present, is None: see
:func:`why_undefined`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, confusion_matrix_at_thresholds, f1_score

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]

SCORES = ("auroc", "ap", "f1_max", "f1_50", "f1_max_21")
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
