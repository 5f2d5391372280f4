import math

import pytest
import torch

from defectlib.masks.shape import describe, without_specks


def box(height, width):
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 4 : 4 + height, 4 : 4 + width] = True
    return mask


@pytest.mark.parametrize(("height", "width", "elongation"), [(5, 5, 1), (1, 10, 10), (20, 2, 10), (1, 1, 1)])
def test_boxes_by_hand(height, width, elongation):
    shape = describe(box(height, width))
    assert shape.area == pytest.approx(height * width / 1024) and shape.components == 1
    assert shape.elongation == pytest.approx(elongation)


def test_specks_go_and_pieces_stay():
    mask = box(10, 10)
    speckled, torn = mask.clone(), mask.clone()
    speckled[0, 20, 20:24] = True
    torn[0, 20, 20:25] = True
    assert torch.equal(without_specks(speckled, 0.05), mask) and torch.equal(without_specks(torn, 0.05), torn)
    empty = torch.zeros_like(mask)
    assert torch.equal(without_specks(mask, 0.05), mask) and torch.equal(without_specks(empty, 0.05), empty)


def test_pieces_touching_at_a_corner_are_one_and_the_largest_counts():
    mask = box(4, 4)
    mask[0, 8, 8] = True
    assert describe(mask).components == 1
    mask[0, 20, 10:30] = True
    shape = describe(mask)
    assert shape.components == 2 and shape.elongation == pytest.approx(20)


def test_an_empty_mask_has_no_elongation():
    shape = describe(box(0, 0))
    assert shape[:2] == (0, 0) and math.isnan(shape.elongation)
