"""U^2-Net's way in and out, with a function in the network's place; its weights are never at hand in tests."""

import numpy as np
import pytest
import torch

from defectlib import paths
from defectlib.masks import saliency


def departure(batch):
    """What departs from the grey of the corner, as a saliency network would say it."""
    assert batch.shape == (1, 3, 320, 320) and batch.dtype == np.float32
    return np.abs(batch - batch[:, :, :1, :1]).sum(1, keepdims=True)


def test_a_salient_square_is_found_where_it_is():
    part, truth = torch.zeros(3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    truth[0, 20:40, 8:30] = True
    part[:, truth[0]] = -0.8
    found = saliency.mask(part, departure)
    assert found.dtype == torch.bool and found.shape == truth.shape
    assert (found & truth).sum() / (found | truth).sum() > 0.9


def test_pictures_are_normalised_by_their_largest_value_and_imagenet():
    seen = []
    saliency.mask(torch.full((3, 32, 32), 0.5), lambda batch: seen.append(batch) or batch[:, :1])
    expected = (1 - np.array(saliency.MEAN)) / saliency.SD
    assert np.allclose(seen[0][0, :, 5, 5], expected, atol=1e-5)


def test_a_constant_map_is_an_empty_mask():
    assert not saliency.mask(torch.zeros(3, 32, 32), lambda batch: batch[:, :1] * 0).any()


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "WEIGHTS", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"U\^2-Net is not here: put http.*u2net.onnx into .*defectlib\[saliency"
    ):
        saliency.load()
    (tmp_path / saliency.FILE).write_bytes(b"cut off")
    assert "is damaged or another file" in saliency.problem()
    monkeypatch.setattr(saliency, "MD5", "cc64e77e65d232d2741f5e62efa3faee")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert saliency.problem() == "onnxruntime is not installed: run `pip install 'defectlib[saliency]'`"
