import numpy as np
import pytest
import torch

from defectlib.data import textures
from defectlib.metrics import features, nearest
from defectlib.types import Sample, Shot


def square(y, x, side, size=32):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[:, y : y + side, x : x + side] = True
    return mask


def shot(value, mask, defect="spot", ground=0.0):
    return Shot(torch.where(mask, value, torch.full((3, *mask.shape[1:]), ground)), mask, "thing", defect, "0")


def sample(value, mask, seed=0, ground=0.0):
    image = torch.where(mask, value, torch.full((3, *mask.shape[1:]), ground))
    return Sample(image, mask, "thing", "spot", seed, seed)


def mean_colour(pictures):
    return torch.stack([picture.mean((1, 2)) for picture in pictures])


def test_window_holds_the_mask_and_lies_inside():
    numbers = torch.arange(32.0 * 32).reshape(1, 32, 32).expand(3, -1, -1)
    assert torch.equal(nearest.window(numbers, square(10, 20, 4), 8), numbers[:, 8:16, 18:26])
    for y, x, rows, columns in ((0, 0, slice(0, 8), slice(0, 8)), (28, 15, slice(24, 32), slice(13, 21))):
        assert torch.equal(nearest.window(numbers, square(y, x, 4), 8), numbers[:, rows, columns])
    empty = torch.zeros(1, 32, 32, dtype=torch.bool)
    assert torch.equal(nearest.window(numbers, empty, 8), numbers[:, 12:20, 12:20])


def test_window_is_as_large_as_the_largest_shot_and_not_smaller_than_a_quarter():
    assert nearest.window_side([square(0, 0, 3), square(5, 5, 12)]) == 12
    assert nearest.window_side([square(0, 0, 3)]) == 8
    assert nearest.window_side([square(0, 0, 32)]) == 32


def test_nearest_shots_by_hand():
    """Windows are 8 px, defects 8 px: features are the colours 0.2, 0.9 (shots) and 0.25, 0.4, 0.9 (samples)."""
    shots = [shot(value, square(4, 4, 8)) for value in (0.2, 0.9)]
    samples = [sample(value, square(20, 12, 8), ground=-1.0) for value in (0.25, 0.4, 0.9)]
    table = nearest.nearest_shots(samples, shots, mean_colour)
    assert table["sample"].tolist() == [1, 0, 2] and table["shot"].tolist() == [0, 0, 1]
    assert table["distance"].tolist() == pytest.approx([0.2 * 3**0.5, 0.05 * 3**0.5, 0], abs=1e-6)


def test_a_real_defect_on_another_ground_is_nearer_than_noise_on_the_same():
    def picture(label, seed):
        return textures.draw(label, np.random.default_rng(seed))

    mask = square(24, 24, 16, 64)
    defect = [picture(1, seed) for seed in range(4)]
    grounds = [picture(label, 9) for label in (0, 8)]
    shots = [
        Shot(torch.where(mask, inside, grounds[0]), mask, "thing", "spot", str(i)) for i, inside in enumerate(defect)
    ]
    noise = (torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1).float()
    drawn = [torch.where(mask, defect[0], grounds[1]), torch.where(mask, noise, grounds[0])]
    samples = [Sample(image, mask, "thing", "spot", seed, seed) for seed, image in enumerate(drawn)]
    table = nearest.nearest_shots(samples, shots, features.load("tiny"))
    assert table["sample"].tolist() == [1, 0] and table["distance"][1] == pytest.approx(0, abs=1e-5)
    assert table["shot"][1] == 0 and table["distance"][0] > 0


def test_nothing_to_compare_and_mixed_defects_are_refused():
    one = shot(0.5, square(4, 4, 8))
    with pytest.raises(ValueError, match="0 samples and 1 shots"):
        nearest.nearest_shots([], [one], mean_colour)
    with pytest.raises(ValueError, match="got scratch, spot"):
        nearest.nearest_shots([one], [shot(0.5, square(4, 4, 8), "scratch")], mean_colour)


def test_shot_distance_by_hand():
    """Colours 0, 0.3 and 0.9 (shots): the distances to the next are 0.3, 0.3 and 0.6, in the median 0.3."""
    shots = [shot(value, square(4, 4, 8)) for value in (0.0, 0.3, 0.9)]
    samples = [sample(value, square(20, 12, 8)) for value in (0.3, 0.45, 0.9 - 0.3)]
    apart, between = nearest.shot_distance(samples, shots, mean_colour)
    assert between == pytest.approx(0.3 * 3**0.5) and apart.tolist() == pytest.approx([0, 0.5, 1], abs=1e-6)


def test_shot_distance_needs_shots_that_differ():
    one = shot(0.2, square(4, 4, 8))
    with pytest.raises(ValueError, match="1 samples and 1 shots"):
        nearest.shot_distance([sample(0.2, square(4, 4, 8))], [one], mean_colour)
    with pytest.raises(ValueError, match="the shots of 'spot' look the same"):
        nearest.shot_distance([sample(0.2, square(4, 4, 8))], [one, one], mean_colour)
