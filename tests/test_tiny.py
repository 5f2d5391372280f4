"""The base model that ships with the package: its files are the card's, and it keeps what a picture of mini shows."""

import json

import pytest
import torch

from defectlib import backbone, paths
from defectlib.pretrain import card, parts, recipe

FOLDER = backbone.HERE / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return backbone.load("tiny", device="cpu")


def test_its_files_are_those_of_the_card_and_small():
    text = (FOLDER / "README.md").read_text()
    pinned = backbone.known()["tiny"]["sha256"]
    assert set(pinned) == set(backbone.files_of(FOLDER))
    for file, digest in pinned.items():
        assert paths.sha256(FOLDER / file) == digest and f"| `{file}` | `{digest}` |" in text
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file()) <= 25e6


def test_its_curves_fall():
    """The UNet's in each of its targets: noise in the warm start, velocity after it."""
    recorded = json.loads((FOLDER / "curves.json").read_text())
    warm = recipe.UNET_WARM_FIT.steps
    curves = {
        "vae": (recorded["vae"], 0.5),
        "noise": ([point for point in recorded["unet"] if point[0] <= warm], 0.5),
        "velocity": ([point for point in recorded["unet"] if point[0] > warm], 0.9),
    }
    for name, (curve, share) in curves.items():
        losses = [loss for _, loss in curve]
        assert sum(losses[-5:]) < share * sum(losses[:5]), name


def test_pictures_of_mini_come_back_at_28_db(tiny):
    images = card.mini_images()
    assert card.reconstruction(tiny, torch.cat(list(images.values()))) >= 28
    found = {name: card.reconstruction(tiny, own) for name, own in images.items()}
    assert {name for name, value in found.items() if value < 28} <= {"brick"} and min(found.values()) > 27


def test_latents_have_about_unit_variance(tiny):
    latents = tiny.encode(torch.cat(list(card.mini_images(2).values())))
    assert 0.7 < latents.std() < 1.4


def test_words_decide_the_tones_and_the_same_seed_repeats_the_picture(tiny):
    things = ("bright marble", "dark marble", "red disc of felt", "blue disc of felt", "bright marble")
    bright, dark, red, blue, again = (card.draw(tiny, [f"a {thing}"] * 2, [3, 4], steps=10) for thing in things)
    assert torch.equal(bright, again)
    assert (bright.mean((1, 2, 3)) > dark.mean((1, 2, 3)) + 0.3).all()
    redder = [(x[:, 0] - x[:, 2])[:, 24:40, 24:40].mean((1, 2)) for x in (red, blue)]
    assert (redder[0] > redder[1] + 0.3).all()


def test_rare_words_and_folder_names_are_distinct(tiny):
    texts = tiny.embed(["vfx", "sks", "a part_007 with a Kratzer", "a part_008 with a Kratzer"])
    distance = torch.cdist(texts.flatten(1), texts.flatten(1))
    assert (distance[~torch.eye(4, dtype=torch.bool)] > 0.1).all()


def test_its_tokenizer_and_schedule_are_the_recipes(tiny):
    """The trainer of tokenizers meets words in an order of chance: the recipe must not."""
    assert tiny.tokenizer.get_vocab() == parts.new_tokenizer().get_vocab()
    shipped, new = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (tiny.scheduler, parts.new_scheduler()))
    assert shipped == new
