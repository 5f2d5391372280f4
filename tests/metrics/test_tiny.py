import hashlib
import re

import numpy as np
import pytest
import torch

from defectlib.data import textures
from defectlib.metrics import tiny


def test_shipped_weights_are_those_of_the_card():
    card = (tiny.WEIGHTS.parent / "CARD.md").read_text()
    assert re.search(r"sha256: `([0-9a-f]{64})`", card)[1] == hashlib.sha256(tiny.WEIGHTS.read_bytes()).hexdigest()
    assert tiny.WEIGHTS.stat().st_size <= 3_000_000


def test_shipped_network_names_textures_it_has_not_seen():
    scores = tiny.accuracy(tiny.load(), 128, seed=12345)
    assert scores["accuracy"] > 0.8 and scores["surface"] > 0.85 and scores["marked"] > 0.85


def test_shapes():
    x = tiny.prepare([textures.draw(k, np.random.default_rng(k)) for k in range(2)])
    maps = tiny.load().maps(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 64, 64), (48, 32, 32), (96, 16, 16), (160, 8, 8), (192, 4, 4)]
    features, logits = tiny.load().features_and_logits(x)
    assert features.shape == (2, 192) and logits.shape == (2, 32)
    assert torch.equal(features, maps[-1].mean((2, 3)))


def test_prepare_resizes_any_size():
    assert tiny.prepare([torch.zeros(3, 40, 70), torch.zeros(3, 64, 64)]).shape == (2, 3, 64, 64)


def test_training_learns_repeats_and_leaves_the_callers_random_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = tiny.train(steps=3, seed=5, batch_size=8)
    assert torch.equal(before, torch.get_rng_state())
    second = tiny.train(steps=3, seed=5, batch_size=8)
    other = tiny.train(steps=3, seed=6, batch_size=8)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_saved_in_half_precision_and_read_back(tmp_path):
    model = tiny.train(steps=1, seed=0, batch_size=4)
    tiny.save(model, tmp_path / "net.safetensors")
    back = tiny.load(tmp_path / "net.safetensors")
    assert back.head.weight.dtype == torch.float32 and not back.training
    assert torch.equal(back.head.weight, model.head.weight.detach().half().float())


def test_missing_and_foreign_files_are_refused(tmp_path):
    import safetensors.torch

    with pytest.raises(FileNotFoundError, match="defectlib.metrics.tiny --steps"):
        tiny.load(tmp_path / "none.safetensors")
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="is not a file of this network"):
        tiny.load(tmp_path / "foreign.safetensors")
