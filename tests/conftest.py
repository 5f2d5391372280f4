"""Small trees that several tests share."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from defectlib import backbone, params, paths
from defectlib.data import mini
from defectlib.pretrain import parts

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Files that take minutes: first, so that two workers end together.
LONG = ("test_reproduce.py", "test_real_data.py")


def pytest_collection_modifyitems(items):
    """The long files first, the others in their order."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session")
def tiny_mini(tmp_path_factory):
    """Two categories of `mini`, a few images of 64 px."""
    root = tmp_path_factory.mktemp("data") / "mini"
    first = sorted(mini.CATEGORIES)[:2]
    return mini.build(root, categories=first, shots=6, train=6, test=3, size=64)


@pytest.fixture
def tiny_parameters(tiny_mini, tmp_path):
    """Smoke parameters on it, with run folders of this test alone."""
    return params.validate(
        {"profile": "smoke", "data_root": str(tiny_mini), "runs_root": str(tmp_path / "runs")}, "test"
    )


@pytest.fixture(scope="session")
def untrained_folder(tmp_path_factory):
    """A base model of the small one's shape, with the weights that it starts from, in diffusers' layout."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), parts.new_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts.save(parts.new_vae(0), parts.new_unet(), parts.new_text_encoder(tokenizer), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def untrained(untrained_folder):
    """The same, loaded."""
    return backbone.load(str(untrained_folder), device="cpu")


@pytest.fixture
def shared():
    """The folder of real data sets beside the checkout; the test is skipped where it is missing."""
    folder = paths.ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data sets beside the checkout ({folder.name}/ is missing)")
    return folder


@pytest.fixture(scope="session")
def picture():
    """Draws blobs of several sizes from a seed: pictures that are not alike."""

    def draw(seed, side=96):
        rng, values = np.random.default_rng(seed), np.zeros((side, side))
        y, x = np.mgrid[:side, :side]
        for _ in range(40):
            cy, cx, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(2, 9)
            values += rng.choice([-1, 1]) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r**2))
        return Image.fromarray(np.uint8(np.clip(128 + 50 * values, 0, 255)))

    return draw
