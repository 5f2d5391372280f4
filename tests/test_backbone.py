"""Loading a base model: one path for every folder, each fault one sentence, and every word is a token of its own."""

import re
import shutil

import pytest
import torch

from defectlib import backbone, images
from defectlib.data import mini


def test_shapes_and_ranges(untrained):
    pictures = torch.rand(3, 3, 64, 64) * 2 - 1
    latents = untrained.encode(pictures)
    assert latents.shape == (3, *untrained.latent_shape(64)) == (3, 12, 16, 16) and untrained.cell == 4
    decoded = untrained.decode(latents)
    assert decoded.shape == pictures.shape and decoded.abs().max() <= 1
    assert not any(
        p.requires_grad for part in (untrained.vae, untrained.unet, untrained.text_encoder) for p in part.parameters()
    )
    assert untrained.scheduler.config.clip_sample is False


def test_a_prompt_means_the_same_in_any_list(untrained):
    both = untrained.embed(["a crack", "a stain", "a crack"])
    assert both.shape == (3, 48, 128) and torch.equal(both[0], both[2]) and not torch.equal(both[0], both[1])
    assert torch.equal(untrained.embed(["a stain"])[0], both[1])


def test_rare_words_and_any_folder_name_are_tokens_of_their_own(untrained):
    ids = {
        w: tuple(untrained.tokenizer(w).input_ids)
        for w in ("vfx", "sks", "crack", "MT_Blowhole", "MT_Crack", "ü", "汉")
    }
    assert len(set(ids.values())) == len(ids)
    assert all(len(ids[word]) == 3 for word in ("vfx", "sks", "crack")), "one token between start and end"
    assert not any(untrained.tokenizer.eos_token_id in found[1:-1] for found in ids.values()), "nothing is unknown"


def test_too_long_a_prompt_is_refused(untrained):
    with pytest.raises(ValueError, match=r"has \d+ tokens; the base model reads 48: shorten it"):
        untrained.embed(["x" * 60])


def test_an_image_size_that_does_not_divide_is_refused(untrained):
    with pytest.raises(ValueError, match="image_size 72 must be a multiple of 16 px"):
        untrained.latent_shape(72)


@pytest.fixture
def copy(untrained_folder, tmp_path):
    return shutil.copytree(untrained_folder, tmp_path / "copy")


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "model_index.json", "vae/config.json"])
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{copy / file} is missing: complete the folder")):
        backbone.load(str(copy))


def test_a_tokenizer_without_its_words_is_refused(copy):
    """transformers would make one that reads every word as unknown."""
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer/vocab.json is missing: complete the folder"):
        backbone.load(str(copy))
    (copy / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer/merges.txt is missing: complete the folder"):
        backbone.load(str(copy))


@pytest.mark.parametrize("file", backbone.WEIGHT_FILES)
def test_weights_that_are_cut_off_are_named(copy, file):
    whole = (copy / file).read_bytes()
    for kept in (20, len(whole) // 2):
        (copy / file).write_bytes(whole[:kept])
        with pytest.raises(FileNotFoundError, match=re.escape(f"{copy / file} is cut off or no safetensors file")):
            backbone.load(str(copy))


def test_an_unknown_name_lists_the_known():
    with pytest.raises(FileNotFoundError, match="there is no base model 'sd16': give tiny, sd15 or a folder"):
        backbone.load("sd16")
    with pytest.raises(
        FileNotFoundError, match="of the hub is fetched first: `hf download someone/model --local-dir .*/model`"
    ):
        backbone.load("someone/model")


def test_a_shipped_model_that_was_changed_is_brought_back_not_trained_anew(tmp_path, monkeypatch):
    shutil.copytree(backbone.folder_of("tiny"), tmp_path / "tiny")
    listed = backbone.known()
    monkeypatch.setattr(backbone, "HERE", tmp_path)
    monkeypatch.setattr(backbone, "known", lambda: listed)
    file = tmp_path / "tiny" / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(FileNotFoundError, match="its sha256 differs.*: bring back what was shipped: `git checkout -- "):
        backbone.load("tiny")


def test_sd15_that_is_not_here_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DEFECTLIB_SD15", str(tmp_path))
    sentence = (
        r"model_index.json is missing \(DEFECTLIB_SD15 names that folder\): run `hf download .* --revision 451f4fe1"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        backbone.load("sd15")


def test_sd15_with_other_weights_is_refused(untrained_folder, monkeypatch):
    monkeypatch.setenv("DEFECTLIB_SD15", str(untrained_folder))
    with pytest.raises(FileNotFoundError, match="is not the file of that name"):
        backbone.load("sd15")


def test_an_images_latents_do_not_depend_on_its_batch(untrained):
    pictures = torch.stack([images.resize_image(mini.draw("nut", "train/good", i)[0], 64) for i in range(3)])
    assert torch.allclose(untrained.encode(pictures)[1], untrained.encode(pictures[1:2])[0], atol=1e-4)
