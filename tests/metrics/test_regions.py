import tracemalloc

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from defectlib.metrics import regions


def test_hand_worked_scores():
    """Four pixels, truth 1 0 1 0 in order of score: three of four pairs right, AP = 1/2 (1 + 2/3), F1 at .4 = 4/5."""
    found = regions.binary_scores(np.array([0.9, 0.8, 0.4, 0.1]), np.array([True, False, True, False]))
    assert found == pytest.approx({"auroc": 0.75, "ap": 5 / 6, "f1_max": 0.8, "f1_50": 0.5, "f1_max_21": 0.8})


def test_ties_count_half():
    found = regions.binary_scores(np.full(6, 0.5), np.array([True, False] * 3))
    assert found["auroc"] == 0.5 and found["ap"] == 0.5 and found["f1_50"] == 0.0, "0.5 is not above 0.5"


def brute_force(scores, truth, thresholds):
    return max(f1_score(truth, scores > t, zero_division=0) for t in thresholds)


@pytest.mark.parametrize("seed", range(6))
def test_against_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth = rng.random(400) < 0.2
    scores = np.clip(np.round(rng.normal(0.3 + 0.3 * truth, 0.25), 1 + seed % 3), 0, 1)
    found = regions.binary_scores(scores, truth)
    precision, recall, _ = precision_recall_curve(truth, scores)
    exact = np.nanmax(2 * precision * recall / np.maximum(precision + recall, 1e-12))
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert found["ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    assert found["f1_max"] == pytest.approx(exact, abs=1e-12)
    assert found["f1_50"] == pytest.approx(f1_score(truth, scores > 0.5), abs=1e-12)
    assert found["f1_max_21"] == pytest.approx(brute_force(scores, truth, [k / 20 for k in range(21)]), abs=1e-12)
    assert found["f1_max_21"] <= found["f1_max"]


def test_the_21_thresholds_can_miss_the_best_one():
    """All scores between 0.50 and 0.55: only `> 0.5` sees them, and it cannot part them."""
    found = regions.binary_scores(np.array([0.54, 0.53, 0.52, 0.51]), np.array([True, False, False, False]))
    assert found["f1_max"] == 1.0 and found["f1_max_21"] == pytest.approx(0.4)


@pytest.mark.parametrize("truth, reason", [([True] * 3, "no negative"), ([False] * 3, "no positive"), ([], "nothing")])
def test_one_class_is_undefined_not_a_half(truth, reason):
    truth = np.array(truth, dtype=bool)
    assert reason in regions.why_undefined(truth)
    assert set(regions.binary_scores(np.zeros(len(truth)), truth).values()) == {None}


def test_pixels_are_pooled_over_images():
    maps = np.zeros((2, 4, 4))
    masks = np.zeros((2, 4, 4), bool)
    maps[0, 0, 0], masks[0, 0, 0] = 0.9, True
    found = regions.pixel_metrics(maps, masks)
    assert found == {f"pixel_{name}": 1.0 for name in regions.SCORES}
    assert regions.why_undefined(masks) is None


def test_hand_worked_instances():
    """Two defects of two pixels and one, six pixels outside; a threshold at every score.

    Above .9: one pixel of the first, none false; .8: a false one; .6: the second defect; .5: the first one whole, since
    more than half of two pixels is both; then the rest. PRO to 1/2: up to 1/6 false 1/4 is found, from there 1.
    """
    maps = np.array([[[0.9, 0.5, 0.1], [0.0, 0.2, 0.8], [0.6, 0.1, 0.0]]])
    masks = np.array([[[1, 1, 0], [0, 0, 0], [1, 0, 0]]], bool)
    found = regions.instance_metrics(maps, masks, limit=0.5)
    assert [len(places) for places in regions.instances(masks)] == [2, 1]
    assert found["pro"] == pytest.approx((1 / 6 * 1 / 4 + 1 / 3 * 1) / 0.5)
    assert found["iap"] == pytest.approx(0.5 * 2 / 3 + 0.5 * 3 / 4) and found["iap90"] == pytest.approx(3 / 4)


def plain_instances(maps, masks, limit):
    """The definitions, threshold by threshold and defect by defect."""
    labelled = [ndimage.label(mask, np.ones((3, 3))) for mask in masks]
    false, overlap, recall, precision = [0.0], [0.0], [], []
    for threshold in np.unique(maps)[::-1]:
        found = maps >= threshold
        shares = np.array([found[i][ids == k].mean() for i, (ids, n) in enumerate(labelled) for k in range(1, n + 1)])
        false.append(found[~masks].mean())
        overlap.append(shares.mean())
        recall.append((shares > 0.5).mean())
        precision.append(masks[found].mean())
    false, overlap, recall = map(np.array, (false, overlap, recall))
    inside = false <= limit
    edge = overlap[inside][-1] if limit in false else np.interp(limit, false, overlap)
    area = np.trapezoid(np.r_[overlap[inside], edge], np.r_[false[inside], limit])
    steps = np.diff(recall, prepend=0.0)
    return {
        "pro": area / limit, "iap": (steps * precision).sum(),
        "iap90": next(p for p, r in zip(precision, recall) if r >= 0.9),
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_instances_against_the_plain_form(seed, limit):
    """With few distinct scores too, where thresholds fall on ties and the limit falls between two of them."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(3, 20, 20)), (0, 1.5, 1.5)) > 0.25
    maps = np.round(np.clip(rng.normal(0.3 + 0.3 * masks, 0.25), 0, 1), 1 + seed % 3)
    assert regions.instance_metrics(maps, masks, limit) == pytest.approx(plain_instances(maps, masks, limit), abs=1e-12)


@pytest.mark.parametrize("limit", [0.1, 0.3, 1.0])
def test_pro_of_equal_defects_is_partial_auroc(limit):
    """Where all defects are of one size, the mean over defects is the mean over pixels; scikit-learn's is McClish's."""
    rng = np.random.default_rng(0)
    masks = np.zeros((2, 16, 16), bool)
    masks[:, 2:5, 2:5] = masks[:, 9:12, 9:12] = True
    maps = np.round(np.clip(rng.normal(0.4 + 0.2 * masks, 0.2), 0, 1), 2)
    standardised = roc_auc_score(masks.ravel(), maps.ravel(), max_fpr=limit)
    least = limit**2 / 2
    area = least + (2 * standardised - 1) * (limit - least)
    assert regions.instance_metrics(maps, masks, limit)["pro"] == pytest.approx(area / limit)
    order = rng.permutation(2)
    assert regions.instance_metrics(maps[order], masks[order]) == pytest.approx(regions.instance_metrics(maps, masks))


def test_instances_of_one_class_are_undefined_and_wrong_arguments_refused():
    nothing = np.zeros((1, 4, 4), bool)
    assert set(regions.instance_metrics(np.zeros((1, 4, 4)), nothing).values()) == {None}
    assert set(regions.instance_metrics(np.zeros((1, 4, 4)), ~nothing).values()) == {None}
    with pytest.raises(ValueError, match="masks must be bool, got uint8"):
        regions.instances(nothing.astype(np.uint8))
    with pytest.raises(ValueError, match="limit of PRO"):
        regions.instance_metrics(np.zeros((1, 4, 4)), nothing, 0.0)
    with pytest.raises(ValueError, match=r"maps must be \(N, H, W\)"):
        regions.instance_metrics(np.zeros((4, 4)), nothing[0])


def test_corners_join_a_defect_and_images_part_it():
    masks = np.zeros((2, 3, 3), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[1, 0, 0] = True
    assert [places.tolist() for places in regions.instances(masks)] == [[0, 4], [9]]


def test_image_metrics_keep_four_names():
    found = regions.image_metrics(np.array([0.9, 0.2]), np.array([True, False]))
    assert found == {"image_auroc": 1.0, "image_ap": 1.0, "image_f1_max": 1.0, "image_f1_50": 1.0}


def test_image_score_is_the_largest_window_mean():
    maps = np.zeros((2, 9, 9), np.float32)
    maps[0, 4, 4] = 0.9
    maps[1, 0, 0] = 0.9
    assert regions.image_scores(maps, pool=3) == pytest.approx([0.1, 0.1]), "zeros outside count"
    assert regions.image_scores(maps, pool=1) == pytest.approx([0.9, 0.9])
    with pytest.raises(ValueError, match="odd"):
        regions.image_scores(maps, pool=4)


def test_window_scales_with_the_map():
    assert [regions.default_pool(side) for side in (256, 64, 512, 8)] == [21, 5, 41, 1]


def test_image_score_as_in_the_released_script():
    import torch

    maps = np.random.default_rng(0).random((2, 256, 256)).astype(np.float32)
    pooled = torch.nn.functional.avg_pool2d(torch.from_numpy(maps)[:, None], 21, stride=1, padding=21 // 2)
    assert regions.image_scores(maps) == pytest.approx(pooled.numpy().max(axis=(1, 2, 3)))


def test_mask_iou():
    a, b = np.zeros((2, 4, 4), bool)
    assert regions.mask_iou(a, b) is None
    a[:2], b[1:3] = True, True
    assert regions.mask_iou(a, b) == pytest.approx(4 / 12)
    assert regions.mask_iou(a, a) == 1.0 and regions.mask_iou(a, ~a) == 0.0


def test_grey_masks_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="masks must be bool, got uint8"):
        regions.pixel_metrics(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) but masks are \(1, 3, 2\)"):
        regions.pixel_metrics(np.zeros((1, 2, 2)), np.zeros((1, 3, 2), bool))
    with pytest.raises(ValueError, match="finite"):
        regions.binary_scores(np.array([np.nan, 1.0]), np.array([True, False]))
    with pytest.raises(ValueError, match="bool masks"):
        regions.mask_iou(np.zeros((2, 2), int), np.zeros((2, 2), bool))


def test_classification_by_hand():
    """Truth a a b c, predicted a b b a: accuracy 1/2; F1 of a 1/2, b 2/3, c 0."""
    found = regions.classification_metrics(list("aabc"), list("abba"), list("abc"))
    assert found["accuracy"] == 0.5
    assert found["f1_macro"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found["confusion"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="not among the classes: z"):
        regions.classification_metrics(["a"], ["z"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        regions.classification_metrics([], [], ["a"])


def test_four_million_pixels_in_bounded_memory():
    """How long that takes stands in `benchmarks/region_metrics.py`, for 26 million."""
    rng = np.random.default_rng(0)
    masks = rng.random((61, 256, 256)) < 0.02
    maps = rng.random(masks.shape, dtype=np.float32) * 0.7 + 0.3 * masks
    tracemalloc.start()  # numpy tells it what it takes; the process's own peak may lie higher already
    found = regions.pixel_metrics(maps, masks) | regions.instance_metrics(maps, masks)
    peak = tracemalloc.get_traced_memory()[1] / 2**30
    tracemalloc.stop()
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)
    assert 0.01 < peak < 0.6, f"{peak:.2f} GiB"


def test_scores_of_one_class_by_hand_and_their_mean_is_the_macro():
    confusion = [[6, 2, 0], [1, 3, 0], [0, 0, 0]]
    found = regions.by_defect(confusion, ["a", "b", "c"])
    assert found["a"]["accuracy"] == 0.75 and found["b"]["accuracy"] == 0.75 and found["c"]["accuracy"] is None
    assert found["a"]["f1_macro"] == pytest.approx(12 / 15) and found["c"]["f1_macro"] == 0.0
    true, said = ["a"] * 8 + ["b"] * 4, ["a"] * 6 + ["b"] * 2 + ["a"] + ["b"] * 3
    whole = regions.classification_metrics(true, said, ["a", "b", "c"])
    assert whole["confusion"] == confusion
    assert np.mean([own["f1_macro"] for own in found.values()]) == pytest.approx(whole["f1_macro"])
