import pytest
import torch

from defectlib.types import Request, Sample, Shot

IMAGE, MASK = torch.zeros(3, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)


def test_valid_records():
    assert Shot(IMAGE, MASK, "nut", "crack", "000").mask.any()
    assert Request(IMAGE, None, "nut", "crack", "a nut", 1, 0).mask is None


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (IMAGE + 2, MASK, r"\[-1, 1\]"),
        (IMAGE * float("nan"), MASK, r"\[-1, 1\]"),
        (IMAGE.double(), MASK, "float32"),
        (IMAGE[0], MASK, "float32"),
        (IMAGE, MASK.float(), "bool"),
        (IMAGE, MASK[:, :4], "but its image is"),
    ],
)
def test_wrong_tensors_are_refused(image, mask, message):
    with pytest.raises(ValueError, match=message):
        Sample(image, mask, "nut", "crack", 0, 0)


def test_a_shot_without_a_defect_is_refused():
    with pytest.raises(ValueError, match="mask of shot 007 is empty"):
        Shot(IMAGE, ~MASK, "nut", "crack", "007")
