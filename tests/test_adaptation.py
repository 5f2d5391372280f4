"""Adaptation of a base model to normal images: it learns, leaves the base alone, and comes back from its file."""

import pytest
import torch

from defectlib import adaptation
from defectlib.profiles import AdaptSettings
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


ASKED = AdaptSettings(methods=["dualanodiff"], steps=3, batch_size=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def of_objects(untrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    return adaptation.to_objects(untrained, IMAGES, ASKED, folder), folder


def test_all_of_the_unet_is_trained_and_the_base_is_not(untrained, of_objects):
    model, before = of_objects[0], predicted(untrained)
    pairs = zip(model.unet.parameters(), untrained.unet.parameters(), strict=True)
    assert all(not torch.equal(now, then) for now, then in pairs) and torch.equal(predicted(untrained), before)
    assert not any(weight.requires_grad for weight in model.unet.parameters()) and not model.unet.training
    assert (model.vae, model.text_encoder) == (untrained.vae, untrained.text_encoder)


def test_who_asks_again_is_given_the_same_model(untrained, of_objects, monkeypatch):
    model, folder = of_objects
    monkeypatch.setattr(adaptation, "fit", lambda *a, **k: pytest.fail("it was trained again"))
    others = ASKED.model_copy(update={"methods": ["symmetry_aware"]})
    again = adaptation.to_objects(untrained, IMAGES, others, folder)
    assert torch.equal(predicted(again), predicted(model)) and again.digest == model.digest != untrained.digest


@pytest.mark.parametrize("change", ["images", "steps"])
def test_of_other_images_or_settings_it_is_another_model(untrained, of_objects, change):
    model, folder = of_objects
    images = IMAGES.flip(0)[:2] if change == "images" else IMAGES
    asked = ASKED.model_copy(update={"steps": 2}) if change == "steps" else ASKED
    other = adaptation.to_objects(untrained, images, asked, folder)
    assert other.digest != model.digest and not torch.equal(predicted(other), predicted(model))


def test_a_killed_training_ends_as_an_undisturbed_one(untrained, of_objects, tmp_path, monkeypatch):
    noised, steps = adaptation.diffusion.noised, []

    def dies(*arguments):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return noised(*arguments)

    with monkeypatch.context() as disturbed:
        disturbed.setattr(adaptation.diffusion, "noised", dies)
        with pytest.raises(KeyboardInterrupt):
            adaptation.to_objects(untrained, IMAGES, ASKED, tmp_path)
    with monkeypatch.context() as counted:
        counted.setattr(adaptation.diffusion, "noised", lambda *a: steps.append(1) or noised(*a))
        model = adaptation.to_objects(untrained, IMAGES, ASKED, tmp_path)
    assert len(steps) == ASKED.steps, "no step is repeated"
    assert model.digest == of_objects[0].digest and torch.equal(predicted(model), predicted(of_objects[0]))
    assert [file.suffix for file in tmp_path.glob("[!.]*")] == [".safetensors"], "no checkpoint is left"


def test_a_file_that_is_cut_off_is_named(untrained, of_objects, tmp_path):
    for file in of_objects[1].glob("*.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="safetensors cannot be read: delete it to train anew"):
        adaptation.to_objects(untrained, IMAGES, ASKED, tmp_path)


def test_the_part_of_a_normal_image_is_grey(untrained, tmp_path, monkeypatch):
    """All rows told by the part's prompt are, none told by the object's, and half of those told by nothing."""
    seen = []

    def one_step(unet, loss, n_items, settings, *, seed, folder):
        del settings, seed, folder
        unet.register_forward_pre_hook(lambda _, given: seen.extend(zip(given[0], given[2], strict=True)))
        loss(torch.arange(200) % n_items, torch.Generator().manual_seed(0))
        return []

    monkeypatch.setattr(adaptation, "fit", one_step)
    monkeypatch.setattr(adaptation.diffusion, "noised", lambda x, *a: (x, torch.zeros(len(x)), x))
    with torch.no_grad():
        adaptation.to_objects(untrained, IMAGES[:1], ASKED.model_copy(update={"flips": False}), tmp_path)
    grey, real = untrained.encode(torch.zeros(1, 3, 64, 64))[0], untrained.encode(IMAGES[:1])[0]
    told = dict(zip(("a vfx", "sks", ""), untrained.embed(["a vfx", "sks", ""]), strict=True))
    share = {}
    for prompt, text in told.items():
        own = [row for row, with_text in seen if torch.equal(with_text, text)]
        share[prompt] = len(own) / len(seen), sum(torch.equal(row, grey) for row in own) / len(own)
        assert all(torch.equal(row, grey) or torch.equal(row, real) for row in own)
    assert (share["a vfx"][1], share["sks"][1]) == (0, 1) and abs(share[""][1] - 0.5) < 0.2
    assert abs(share["a vfx"][0] - 0.6) < 0.1 and abs(share["sks"][0] - 0.2) < 0.1


def test_a_side_that_the_base_cannot_read_is_refused_before_training(untrained, tmp_path):
    with pytest.raises(ValueError, match="image_size 60 must be a multiple"):
        adaptation.to_objects(untrained, torch.zeros(2, 3, 60, 60), ASKED, tmp_path)
