"""AUROC, AP, PRO, IAP and IAP90 of 100 maps of 512 x 512 against plain forms: the same values, in what time.

    python benchmarks/region_metrics.py

The plain forms are scikit-learn's for AUROC and AP, and for the others a loop over thresholds with the share found of
each defect, as the released scripts have it (theirs stop at 100 thresholds). The scores are multiples of 1/255, so that
256 thresholds are all there are and the loop is exact. The last line is JSON; ``ratio`` is ours / reference in one run,
``max_abs_diff`` the check that both give the same five numbers, ``pixels_per_s`` and ``memory_gb`` are ours.
"""

import json
import resource
import sys
import time

import numpy as np
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from defectlib.metrics import regions

N, SIDE, LEVELS = 100, 512, 255


def data() -> tuple[np.ndarray, np.ndarray]:
    """Maps float32 (N, SIDE, SIDE), noise that is a little higher on the defects, and bool masks of some blobs each."""
    rng = np.random.default_rng(0)
    masks = rng.random((N, SIDE, SIDE), dtype=np.float32) < 2e-5
    masks = ndimage.binary_dilation(masks, np.ones((1, 3, 3)), iterations=12)
    maps = rng.random(masks.shape, dtype=np.float32) * 0.8 + 0.2 * masks
    return np.round(maps * LEVELS) / np.float32(LEVELS), masks


def plain(maps: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """The same five numbers by scikit-learn, and by one pass over all pixels a threshold."""
    labelled = [ndimage.label(mask, np.ones((3, 3))) for mask in masks]
    false, overlap, recall, precision = [0.0], [0.0], [], []
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        means = [ndimage.mean(f, ids, np.arange(1, n + 1)) for f, (ids, n) in zip(found, labelled) if n]
        shares = np.concatenate(means)
        false.append(found[~masks].mean())
        overlap.append(shares.mean())
        recall.append((shares > 0.5).mean())
        precision.append(masks[found].mean())
    edge = np.interp(regions.PRO_LIMIT, false, overlap)
    inside = np.array(false) <= regions.PRO_LIMIT
    x, y = np.r_[np.array(false)[inside], regions.PRO_LIMIT], np.r_[np.array(overlap)[inside], edge]
    return {
        "pixel_auroc": roc_auc_score(masks.ravel(), maps.ravel()),
        "pixel_ap": average_precision_score(masks.ravel(), maps.ravel()),
        "pro": np.trapezoid(y, x) / regions.PRO_LIMIT,
        "iap": (np.diff(recall, prepend=0.0) * precision).sum(),
        "iap90": next(p for p, r in zip(precision, recall) if r >= 0.9),
    }


def main() -> None:
    """Ours, then the plain forms."""
    maps, masks = data()
    unit = 1 if sys.platform == "darwin" else 1024
    before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    ours = regions.pixel_metrics(maps, masks) | regions.instance_metrics(maps, masks)
    ours_s = time.perf_counter() - clock
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 1e9
    clock = time.perf_counter()
    reference = plain(maps, masks)
    reference_s = time.perf_counter() - clock
    print(json.dumps({
        "name": "region_metrics", "maps": N, "side": SIDE, "instances": len(regions.instances(masks)),
        "ours_s": round(ours_s, 2), "reference_s": round(reference_s, 2), "ratio": round(ours_s / reference_s, 4),
        "max_abs_diff": max(abs(ours[name] - value) for name, value in reference.items()),
        "pixels_per_s": round(maps.size / ours_s), "memory_gb": round(memory, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
