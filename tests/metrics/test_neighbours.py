import numpy as np
import pytest
import torch

from defectlib.metrics import neighbours


def test_by_hand():
    """On a line, k = 1: real balls [0, 1], [0, 2], [7, 13]; samples' balls 0.5 +- 0.1, 0.6 +- 0.1, 8.5 +- 7.9."""
    real, drawn = torch.tensor([[0.0], [1.0], [4.0]]), torch.tensor([[0.5], [0.6], [8.5]])
    found = {name: own.tolist() for name, own in neighbours.values(real, drawn, k=1).items()}
    # Reach of the real ones: 1, 1, 3; 0.5 and 0.6 lie in two balls, 8.5 in none.
    assert found["precision"] == [1, 1, 0] and found["density"] == [2, 2, 0]
    assert found["coverage"] == [1, 1, 0]
    # The samples reach 0.1, 0.1 and 7.9: the last takes in what lies above 0.6.
    assert found["recall"] == [0, 1, 1]


def test_precision_and_recall_are_torch_fidelitys():
    from torch_fidelity.metric_prc import prc_features_to_metric

    rng = torch.Generator().manual_seed(0)
    real, drawn = torch.randn(40, 6, generator=rng), 0.8 * torch.randn(25, 6, generator=rng) + 0.3
    theirs = prc_features_to_metric(  # generated images are its first input
        drawn, real, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False
    )
    ours = {name: own.mean().item() for name, own in neighbours.values(real, drawn).items()}
    assert 0 < ours["recall"] < ours["precision"] < 1
    assert {name: ours[name] for name in ("precision", "recall")} == pytest.approx(
        {name: theirs[name] for name in ("precision", "recall")}
    )


def test_density_and_coverage_against_a_double_loop():
    rng = np.random.default_rng(1)
    real, drawn, k = rng.normal(size=(15, 4)), rng.normal(size=(11, 4)) * 1.5, 3
    density, coverage = np.zeros(len(drawn)), np.zeros(len(real))
    for i, x in enumerate(real):
        reach = sorted(np.linalg.norm(x - other) for j, other in enumerate(real) if j != i)[k - 1]
        for j, y in enumerate(drawn):
            if np.linalg.norm(x - y) <= reach:
                density[j] += 1 / k
                coverage[i] = 1
    found = neighbours.values(torch.from_numpy(real), torch.from_numpy(drawn), k)
    assert np.allclose(found["density"], density) and found["coverage"].tolist() == coverage.tolist()


def test_what_the_real_distribution_itself_would_score():
    """Density has the mean 1 and coverage its closed form, whatever the distribution: 400 draws of 12 and 20 images."""
    rng = torch.Generator().manual_seed(2)
    found = [
        neighbours.values(torch.randn(12, 3, generator=rng).exp(), torch.randn(20, 3, generator=rng).exp())
        for _ in range(400)
    ]
    assert neighbours.expected_coverage(3, 2, 1) == pytest.approx(1 - 2 / 4)
    expected = neighbours.expected_coverage(12, 20)
    assert np.mean([f["coverage"].mean().item() for f in found]) == pytest.approx(expected, abs=0.01)
    # A ball's third neighbour is the edge: 3 of 11 others and as large a share of the samples lie inside, 20 x 3 / 12.
    inside = np.mean([f["density"].mean().item() for f in found])
    assert inside == pytest.approx(1, abs=0.03)


def test_too_few():
    with pytest.raises(ValueError, match="no neighbour number 3"):
        neighbours.values(torch.rand(3, 2), torch.rand(9, 2))
