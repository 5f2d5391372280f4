import numpy as np
import pytest
import torch

from defectlib.data import textures
from defectlib.types import check_image


@pytest.mark.parametrize("label", range(len(textures.CLASSES)))
def test_every_class_is_an_image_and_repeats(label):
    first = textures.draw(label, np.random.default_rng([1, label]))
    check_image(first)
    assert first.shape == (3, 64, 64)
    assert torch.equal(first, textures.draw(label, np.random.default_rng([1, label])))
    assert not torch.equal(first, textures.draw(label, np.random.default_rng([2, label])))
    assert first.std() > 0.01, "not a flat picture"


def test_classes_are_sixteen_surfaces_clean_and_marked():
    assert len(textures.CLASSES) == 32 == len(set(textures.CLASSES))
    assert textures.CLASSES[:2] == ("clouds", "clouds_marked")
    assert not {"gravel", "brick", "grass", "nut", "gear"} & set(textures.CLASSES)


def test_a_mark_changes_a_few_pixels_by_a_visible_amount():
    """On a flat sheet without light or noise the mark is all there is."""
    for seed in range(30):
        flat = np.full((64, 64, 3), 0.5)
        change = np.abs(textures.mark(flat, np.random.default_rng(seed)) - flat).max(-1)
        share = (change > 0.15).mean()
        assert 0.002 < share < 0.35, f"seed {seed}: {share}"


def test_orientation_families_differ_in_orientation():
    for name, steeper in (("brushed_across", 0), ("brushed_along", 1)):
        tone = getattr(textures, name)(np.random.default_rng(0), 64)
        slopes = [np.abs(np.diff(tone, axis=axis)).mean() for axis in (0, 1)]
        assert slopes[steeper] > 2 * slopes[1 - steeper]


def test_batch_draws_classes_evenly():
    pictures, labels = textures.batch(64, np.random.default_rng(0), size=32)
    assert pictures.shape == (64, 3, 32, 32) and pictures.dtype == torch.float32
    assert torch.bincount(labels, minlength=32).tolist() == [2] * 32


def test_unknown_class():
    with pytest.raises(ValueError, match="no texture class 99"):
        textures.draw(99, np.random.default_rng(0))
