import numpy as np
import pytest
import torch

from defectlib.metrics import bootstrap, perceptual, quality

ONCE = np.ones((1, 9))


def features(n, shift=0.0, seed=0, width=5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + shift


def test_counts_are_draws_with_replacement():
    taken = bootstrap.counts(6, seed=3, draws=2000)
    assert taken.shape == (2000, 6) and (taken.sum(1) == 6).all()
    assert taken.mean() == pytest.approx(1) and taken.var() == pytest.approx(1 - 1 / 6, abs=0.03)
    assert (taken == bootstrap.counts(6, seed=3, draws=2000)).all()
    assert (taken != bootstrap.counts(6, seed=4, draws=2000)).any()


def test_each_image_taken_once_gives_the_measure_itself():
    real, drawn = features(7, seed=1), features(9, 0.3)
    value = quality.kid(real, drawn, subsets=4000)["value"]  # averages over subsets of seven samples
    assert bootstrap.kid(real, drawn, np.ones((1, 7)), ONCE)[0] == pytest.approx(value, rel=0.03)
    same = quality.kid(drawn[:7], real, subsets=1)["value"]
    assert bootstrap.kid(drawn[:7], real, np.ones((1, 7)), np.ones((1, 7)))[0] == pytest.approx(same)
    assert bootstrap.inception_score(drawn, ONCE)[0] == pytest.approx(quality.inception_score(drawn)["value"], rel=1e-5)
    around = features(3, seed=5)
    for protocol in perceptual.PROTOCOLS.values():
        places, _ = perceptual.clusters(drawn, around, protocol)
        found = bootstrap.ic_lpips(drawn, places, protocol, ONCE)[0]
        assert found == pytest.approx(perceptual.ic_lpips(drawn, around, protocol)["value"], rel=1e-5)


def test_copies_of_an_image_are_not_pairs():
    """Taken twice, an image is not compared with itself: three points 0, 1, 3, taken 2, 1, 0 times, leave one pair."""
    points = torch.tensor([[0.0], [1.0], [3.0]])
    (dropped, zero) = (perceptual.PROTOCOLS[name] for name in ("anomalydiffusion", "seas"))
    taken = np.array([[2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    found = bootstrap.ic_lpips(points, [np.arange(3)], dropped, taken)
    assert found[:2] == pytest.approx([1.0, (1 + 4 + 9) / 3]) and np.isnan(found[2])
    assert bootstrap.ic_lpips(points, [np.arange(3)], zero, taken)[2] == 0


def test_an_interval_is_around_the_value():
    drawn = np.array([np.nan, *np.linspace(0, 100, 1001)])
    assert bootstrap.interval(10.0, drawn) == pytest.approx((10 - 47.5, 10 + 47.5))


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = features(200, width=1)[:, 0]
    low, high = bootstrap.interval(0.0, bootstrap.mean(values, bootstrap.counts(200, 0)))
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 200**0.5, rel=0.1)


def test_a_share_of_all_or_none_is_not_certain():
    """Wilson's closed form for n of n: n / (n + z^2), and 1."""
    low, high = bootstrap.of_share(torch.ones(16))
    assert low == pytest.approx(16 / (16 + 1.959964**2), abs=1e-6) and high == pytest.approx(1)
    assert bootstrap.of_share(torch.zeros(16)) == pytest.approx((1 - high, 1 - low), abs=1e-9)


def test_kids_interval_covers_what_other_images_would_have_given():
    """Of 60 pairs of sets from the same two distributions, most intervals hold the true difference."""
    truth = bootstrap.kid(
        features(1500, seed=98), features(1500, 0.4, seed=99), np.ones((1, 1500)), np.ones((1, 1500))
    )[0]
    held = 0
    for seed in range(60):
        real, drawn = features(24, seed=2 * seed), features(24, 0.4, seed=2 * seed + 1)
        taken = bootstrap.counts(24, 0, 400), bootstrap.counts(24, 1, 400)
        value = bootstrap.kid(real, drawn, np.ones((1, 24)), np.ones((1, 24)))[0]
        low, high = bootstrap.interval(value, bootstrap.kid(real, drawn, *taken))
        held += low <= truth <= high
    assert held >= 51
