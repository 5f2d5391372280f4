"""The recipe of the small base model, at toy size from end to end, and its parts by what they promise."""

import json
import sys

import pytest
import torch

from defectlib import backbone, paths
from defectlib.data import mini, world
from defectlib.pretrain import __main__, card, evidence, parts, recipe
from defectlib.pretrain.recipe import Components
from defectlib.training import FitSettings

PICTURES = torch.stack([p.image for p in world.pool(150, seed=5)])


def linear_psnr(components, images):
    """PSNR of what the components alone keep of images."""
    basis = torch.linalg.pinv(components.axes.T)
    rows = components._blocks(images) - components.mean
    return card.psnr(rows @ components.axes.T @ basis, rows)


def test_components_are_whitened_and_ordered():
    latents = Components(PICTURES)(PICTURES)
    assert latents.shape == (150, parts.LATENT_CHANNELS, 16, 16)
    covariance = torch.cov(latents.permute(1, 0, 2, 3).flatten(1))
    assert torch.allclose(covariance, torch.eye(len(covariance)), atol=0.02)


def test_twelve_numbers_a_block_leave_the_autoencoder_room_that_eight_do_not(monkeypatch):
    """The linear bound on `mini`; with eight a fitted autoencoder would have to reach nearly all of it for 28 dB."""
    pictures = torch.cat(list(card.mini_images(2).values()))
    kept = {}
    for n in (8, 12):
        monkeypatch.setattr(parts, "LATENT_CHANNELS", n)
        kept[n] = linear_psnr(Components(PICTURES), pictures)
    assert kept[8] < 28.5 and kept[12] > kept[8] + 1.5


def test_most_prompts_are_whole_words_and_some_are_spelt():
    tokenizer = parts.new_tokenizer()
    prompts = ["a photo of a grey disc of wood with a scratch"] * 400
    table = parts.token_table(tokenizer, prompts, seed=0)
    whole = (table == table.mode(0).values).all(1).float().mean()
    assert 0.8 < whole < 0.92
    spelt = next(row for row in table if not torch.equal(row, table.mode(0).values))
    words = tokenizer.decode(spelt, skip_special_tokens=True).split()
    assert "".join(words) == prompts[0].replace(" ", ""), "letters in the right order, nothing unknown"


def test_psnr_by_hand():
    assert card.psnr(torch.zeros(4), torch.full((4,), 0.2)) == pytest.approx(20.0, abs=1e-4)


def test_the_recipe_from_end_to_end(tmp_path, monkeypatch, capsys):
    quick = FitSettings(steps=2, batch_size=2, learning_rate=1e-3, ema=0.9)
    for name in ("WARM_FIT", "VAE_FIT", "VAE_LAST_FIT", "UNET_WARM_FIT", "UNET_FIT", "UNET_LAST_FIT"):
        monkeypatch.setattr(recipe, name, quick)
    monkeypatch.setattr(recipe, "WORLD", 24)
    monkeypatch.setattr(recipe, "HELD_OUT", 4)
    monkeypatch.setattr(evidence, "PROFILE", "smoke")
    for name in ("SHOTS", "TEST", "NORMALS", "SAMPLES"):
        monkeypatch.setattr(evidence, name, 2)
    monkeypatch.setattr(mini, "CATEGORIES", {"gear": ("crack",)})
    monkeypatch.setitem(evidence.ZERO_SHOT, "num_inference_steps", 2)
    out = tmp_path / "work" / "tiny"
    monkeypatch.setattr(sys, "argv", ["pretrain", "--work", str(tmp_path / "work"), "--threads", "1"])
    __main__.main()
    base = backbone.load(str(out), device="cpu")
    page = (out / "README.md").read_text()
    assert all(f"| `{file}` | `{paths.sha256(out / file)}` |" in page for file in backbone.files_of(out))
    assert page in capsys.readouterr().out and set(json.loads((out / "curves.json").read_text())) == {"vae", "unet"}
    assert card.draw(base, ["a stain on grey"], [0], steps=2).shape == (1, 3, 64, 64)
    monkeypatch.setattr(recipe, "UNET_FIT", quick.model_copy(update={"steps": 3}))
    with pytest.raises(ValueError, match=r"unet-fit\.safetensors was trained with other settings: delete .*work"):
        __main__.main()
    assert 0.1 < base.encode(PICTURES[:8]).std() < 10, "the scaling factor brings latents near unit variance"
