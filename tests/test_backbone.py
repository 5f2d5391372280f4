"""Loading a base model: one path for every folder, each fault one sentence, the shipped one as its card says."""

import re
import shutil

import pytest
import torch

from defectlib import backbone, images, pretrain
from defectlib.data import mini


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untrained base model of the shipped one's shape."""
    target = tmp_path_factory.mktemp("base")
    tokenizer = pretrain.new_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = pretrain.new_vae(0), pretrain.new_unet(), pretrain.new_text_encoder(tokenizer)
    pretrain.save(*parts, tokenizer, target)
    return target


@pytest.fixture(scope="module")
def base(folder):
    return backbone.load(str(folder), device="cpu")


def test_shapes_and_ranges(base):
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    latents = base.encode(pictures)
    assert latents.shape == (3, *base.latent_shape(64)) == (3, 8, 16, 16) and base.cell == 4
    decoded = base.decode(latents)
    assert decoded.shape == pictures.shape and decoded.abs().max() <= 1
    assert not any(p.requires_grad for part in (base.vae, base.unet, base.text_encoder) for p in part.parameters())
    assert base.scheduler.config.clip_sample is False


def test_a_prompt_means_the_same_in_any_list(base):
    both = base.embed(["a crack", "a stain", "a crack"])
    assert both.shape == (3, 48, 128) and torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])
    assert torch.equal(base.embed(["a stain"])[0], both[1])


def test_rare_words_and_any_folder_name_are_tokens_of_their_own(base):
    ids = {w: tuple(base.tokenizer(w).input_ids) for w in ("vfx", "sks", "crack", "MT_Blowhole", "MT_Crack", "ü", "汉")}
    assert len(set(ids.values())) == len(ids)
    assert all(len(ids[word]) == 3 for word in ("vfx", "sks", "crack")), "one token between start and end"
    assert not any(base.tokenizer.eos_token_id in found[1:-1] for found in ids.values()), "nothing is unknown"


def test_too_long_a_prompt_is_refused(base):
    with pytest.raises(ValueError, match=r"has \d+ tokens; the base model reads 48: shorten it"):
        base.embed(["x" * 60])


def test_an_image_size_that_does_not_divide_is_refused(base):
    with pytest.raises(ValueError, match="image_size 72 must be a multiple of 16 px"):
        base.latent_shape(72)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "vae/config.json"])
def test_a_missing_file_is_named(folder, tmp_path, file):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{copy / file} is missing: complete the folder")):
        backbone.load(str(copy))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(FileNotFoundError, match="there is no base model 'sd16': give sd15, tiny or a folder"):
        backbone.load("sd16")


def test_sd15_that_is_not_here_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFECTLIB_SD15", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match=r"model_index.json is missing: run `hf download .* --revision 451f4fe1"
    ):
        backbone.load("sd15")


def test_sd15_with_other_weights_is_refused(folder, monkeypatch):
    monkeypatch.setenv("DEFECTLIB_SD15", str(folder))
    with pytest.raises(FileNotFoundError, match="is not the file of that name"):
        backbone.load("sd15")


def test_the_shipped_model_is_the_one_of_its_card():
    assert backbone.problem("tiny") is None
    card = (backbone.folder_of("tiny") / "README.md").read_text()
    for file, digest in backbone.known()["tiny"]["sha256"].items():
        assert f"`{file}`" in card and digest in card
    size = sum(file.stat().st_size for file in backbone.folder_of("tiny").rglob("*") if file.is_file())
    assert size <= 25 * 2**20


def test_the_shipped_autoencoder_keeps_what_mini_shows():
    base = backbone.load("tiny", device="cpu")
    pictures = torch.stack([mini.draw(c, "train/good", i, size=64)[0] for c in mini.CATEGORIES for i in range(2)])
    assert pretrain.reconstruction(base, pictures) > 26


def test_an_images_latents_do_not_depend_on_its_batch(base):
    pictures = torch.stack([images.resize_image(mini.draw("nut", "train/good", i)[0], 64) for i in range(3)])
    assert torch.allclose(base.encode(pictures)[1], base.encode(pictures[1:2])[0], atol=1e-4)
