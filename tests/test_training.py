"""The fit loop on a small regression: it learns, and what a kill leaves is continued to the same bits."""

import json

import pytest
import torch
from torch import nn

from defectlib import training
from defectlib.training import FitSettings, batch_indices, fit, step_generator

X = torch.linspace(-1, 1, 40)[:, None]
Y = X.sin() + 0.5
SETTINGS = FitSettings(
    steps=60, batch_size=8, learning_rate=0.02, schedule="cosine", warmup=5, ema=0.9, save_every=20
)  # fmt: skip


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))


def run(folder, settings=SETTINGS, stop_at=None, seed=0):
    net, calls = network(), []

    def loss(items, generator):
        calls.append(items)
        if stop_at is not None and len(calls) == stop_at:
            raise KeyboardInterrupt
        return (net(X[items] + 0.01 * torch.randn(len(items), 1, generator=generator)) - Y[items]).square().mean()

    curve = fit(net, loss, len(X), settings, seed=seed, folder=folder)
    return net, curve, calls


def test_it_learns(tmp_path):
    net, curve, _ = run(tmp_path, SETTINGS.model_copy(update={"steps": 300}))
    assert (net(X) - Y).square().mean() < 0.01 < curve[0][1]
    assert curve[-1][0] == 300


def test_a_killed_run_ends_at_the_same_bits(tmp_path):
    whole, curve, _ = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", stop_at=51)
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["step-0000040"]
    resumed, again, calls = run(tmp_path / "b")
    assert len(calls) == 20 and again == curve
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_average_replaces_the_weights(tmp_path):
    plain, _, _ = run(tmp_path / "a", SETTINGS.model_copy(update={"ema": None}))
    averaged, _, _ = run(tmp_path / "b")
    assert not torch.equal(plain[0].weight, averaged[0].weight)


def test_a_damaged_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=51)
    weights = tmp_path / "step-0000040" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"step-0000040 cannot be read: delete .* to train from the start"):
        run(tmp_path)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at=51)
    with pytest.raises(ValueError, match="of other settings"):
        run(tmp_path, seed=1)
    assert json.loads((tmp_path / "step-0000040" / "fit.json").read_text())["seed"] == 0


def test_a_loss_that_is_not_finite_stops(tmp_path):
    net = network()
    with pytest.raises(FloatingPointError, match="at step 0"):
        fit(net, lambda items, g: net(X[items]).sum() * torch.inf, 40, SETTINGS, seed=0, folder=tmp_path)


def test_checkpoints_stay_until_the_weights_are_kept(tmp_path, monkeypatch):
    """A kill while the weights are written costs the steps since the last checkpoint, not the whole fit."""
    calls = []

    def train(checkpoints):
        net, curve, made = run(checkpoints)
        calls.append(len(made))
        return net.state_dict(), curve

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(training.paths, "write_bytes", killed)
        training.once(tmp_path / "net.safetensors", ["asked"], train)
    state, curve = training.once(tmp_path / "net.safetensors", ["asked"], train)
    assert calls == [60, 20] and [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    again, kept = training.once(tmp_path / "net.safetensors", ["asked"], train)
    assert calls == [60, 20] and kept == curve and all(torch.equal(again[k], v) for k, v in state.items())
    training.once(tmp_path / "net.safetensors", ["something else"], train)
    assert calls == [60, 20, 60], "a training of something else is not taken"


def test_every_item_is_seen_equally_often():
    seen = torch.cat([batch_indices(10, 4, 3, step) for step in range(25)])
    assert seen.bincount(minlength=10).tolist() == [10] * 10
    assert batch_indices(3, 8, 0, 0).shape == (8,), "a batch may be larger than the set"
    assert not torch.equal(batch_indices(10, 4, 0, 0), batch_indices(10, 4, 1, 0))


def test_a_steps_generator_depends_on_seed_and_step():
    draws = {torch.randn(1, generator=step_generator(seed, step)).item() for seed in (0, 1) for step in (0, 1)}
    assert len(draws) == 4
