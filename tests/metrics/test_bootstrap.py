import numpy as np
import pytest
import torch

from defectlib.metrics import bootstrap, neighbours, perceptual, quality

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
        places = perceptual.clusters(perceptual.lpips_to_nearest(drawn, around)[1], len(around), protocol)
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


def test_the_interval_of_a_median_holds_its_order_statistics():
    """Of 100 normal values 95 % of medians lie within 1.96 * 1.253 / 10."""
    values = np.random.default_rng(0).normal(size=100)
    low, high = bootstrap.interval(float(np.median(values)), bootstrap.median(values, bootstrap.counts(100, 0)))
    assert high - low == pytest.approx(2 * 1.96 * 1.253 / 10, rel=0.35)
    assert bootstrap.told(100, lambda: (low, high)) == {"ci95": [low, high], "ci95_over": "samples"}
    assert bootstrap.told(bootstrap.LEAST - 1, lambda: (low, high)) == bootstrap.told(100, lambda: (low, low)) == {}


def test_a_share_of_all_or_none_is_not_certain():
    """Wilson's closed form for n of n: n / (n + z^2), and 1."""
    low, high = bootstrap.of_share(1.0, 16, np.ones(50))
    assert low == pytest.approx(16 / (16 + 1.959964**2), abs=1e-6) and high == 1
    wider = bootstrap.of_share(0.5, 16, np.linspace(0, 1, 1001))
    assert wider == pytest.approx((0.025, 0.975)), "draws that move further than the images' own chance"


def test_neighbours_of_every_image_taken_once_are_the_measures_themselves():
    real, drawn = features(12, seed=1), features(9, 0.4, seed=2)
    found = bootstrap.neighbours(real, drawn, np.ones((1, 12)), ONCE, k=3)
    for name, own in neighbours.values(real, drawn, k=3).items():
        assert found[name][0] == pytest.approx(own.mean().item())


@pytest.mark.parametrize(("n", "m", "shift"), [(10, 16, 0.3), (24, 16, 0.3)])
def test_intervals_of_neighbours_cover_what_other_images_would_have_given(n, m, shift):
    """Of 60 pairs of sets most intervals hold the mean over all, and few are twice as wide as they need be."""
    values, bounds = [], []
    for seed in range(60):
        real, drawn = features(n, seed=2 * seed, width=8), features(m, shift, seed=2 * seed + 1, width=8)
        value = {name: own.mean().item() for name, own in neighbours.values(real, drawn).items()}
        taken = bootstrap.counts(n, 0, 100), bootstrap.counts(m, 1, 100)
        found = bootstrap.neighbours(real, drawn, *taken, k=neighbours.K)
        wide = {"density": bootstrap.interval(value["density"], found["density"])}
        for name, size in (("precision", m), ("recall", n), ("coverage", n)):
            wide[name] = bootstrap.of_share(value[name], size, found[name])
        values.append(value)
        bounds.append(wide)
    for name in neighbours.NAMES:
        every = np.array([value[name] for value in values])
        held = [low <= every.mean() <= high for low, high in (wide[name] for wide in bounds)]
        assert np.mean(held) >= 0.85, name
        width = np.mean([high - low for low, high in (wide[name] for wide in bounds)])
        assert width <= 2 * 3.92 * every.std(), name


def test_kids_interval_covers_what_other_images_would_have_given():
    """Of 60 pairs of sets from the same two distributions, most intervals hold the true difference."""
    truth = bootstrap.kid(
        features(1500, seed=98), features(1500, 0.4, seed=99), np.ones((1, 1500)), np.ones((1, 1500))
    )[0]
    held, values, widths = 0, [], []
    for seed in range(60):
        real, drawn = features(24, seed=2 * seed), features(24, 0.4, seed=2 * seed + 1)
        taken = bootstrap.counts(24, 0, 400), bootstrap.counts(24, 1, 400)
        value = bootstrap.kid(real, drawn, np.ones((1, 24)), np.ones((1, 24)))[0]
        low, high = bootstrap.interval(value, bootstrap.kid(real, drawn, *taken))
        held += low <= truth <= high
        values.append(value)
        widths.append(high - low)
    assert held >= 51 and np.mean(widths) <= 2 * 3.92 * np.std(values)
