"""Adaptation of a base model to normal images: it learns, leaves the base alone, and comes back from its adapter."""

import pytest
import torch

from defectlib import adaptation
from defectlib.training import FitSettings

IMAGES = torch.stack([torch.full((3, 64, 64), value) for value in (-0.5, 0.0, 0.5)])
SETTINGS = FitSettings(steps=3, batch_size=2, learning_rate=1e-2)


def predicted(base):
    latents = torch.randn(2, *base.latent_shape(64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return base.unet(latents, torch.tensor([300, 700]), base.embed(["a plate"] * 2)).sample


@pytest.fixture(scope="module")
def adapted(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    return adaptation.adapt(untrained, IMAGES, "a plate", SETTINGS, rank=2, seed=0, folder=folder)


def test_the_adapted_model_differs_and_the_base_does_not(untrained, adapted):
    before = predicted(untrained)
    model, adapter, curve = adapted
    assert not torch.allclose(predicted(model), before, atol=1e-4)
    assert torch.equal(predicted(untrained), before) and not any("lora" in n for n, _ in model.unet.named_parameters())
    assert len(curve) == 3 and all(value.shape[0 if ".lora_A" in name else 1] == 2 for name, value in adapter.items())
    assert (model.digest, model.vae) == (untrained.digest, untrained.vae)


def test_without_training_nothing_changes(untrained):
    fresh = adaptation._merged(untrained, adaptation._with_lora(untrained.unet, 2, 0))
    assert torch.equal(predicted(fresh), predicted(untrained))


def test_it_comes_back_from_its_adapter(untrained, adapted):
    model, adapter, _ = adapted
    assert torch.equal(predicted(adaptation.restore(untrained, adapter)), predicted(model))


def test_what_is_done_is_not_done_again(untrained, tmp_path, monkeypatch):
    first = adaptation.adapt(untrained, IMAGES, "a plate", SETTINGS, rank=2, seed=0, folder=tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(adaptation, "fit", lambda *a, **k: pytest.fail("it was trained again"))
        again = adaptation.adapt(untrained, IMAGES, "a plate", SETTINGS, rank=2, seed=0, folder=tmp_path)
    assert torch.equal(predicted(again[0]), predicted(first[0])) and again[2] == first[2]
    other = adaptation.adapt(untrained, IMAGES, "a plate", SETTINGS, rank=2, seed=1, folder=tmp_path)
    assert not torch.equal(predicted(other[0]), predicted(first[0]))


def test_an_adapter_of_another_unet_is_refused(untrained, adapted):
    other = {name: value[..., :1] for name, value in adapted[1].items()}
    with pytest.raises(ValueError, match="another UNet"):
        adaptation.restore(untrained, other)
