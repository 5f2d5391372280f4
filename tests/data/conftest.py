"""Small procedural trees in the layouts that the readers know."""

import numpy as np
import pytest
from PIL import Image

SIZE = (40, 32)  # width, height: not square, so that swapped axes show


def picture(seed, size=SIZE):
    """A grey-green textured RGB surface; every seed differs."""
    rng = np.random.default_rng(seed)
    base = np.array([110, 130, 120]) + rng.integers(-12, 13, (size[1], size[0], 1))
    return base.clip(0, 255).astype(np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def blob(index, size=SIZE, value=255):
    """A mask with a 6 x 5 px defect whose place depends on the index."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    x, y = 3 + 4 * (index % 6), 4 + 3 * (index % 5)
    mask[y : y + 5, x : x + 6] = value
    return mask


class Trees:
    """Writes trees; seeds count up, so no two pictures are equal."""

    def __init__(self):
        self.seed = 0

    def image(self, path, mask=None):
        self.seed += 1
        array = picture(self.seed, SIZE if mask is None else mask.shape[::-1])
        if mask is not None:
            array[mask > 0] = 30
        return save(path, array)

    def pair(self, image, truth, index=0, value=255):
        mask = blob(index, value=value)
        self.image(image, mask)
        return save(truth, mask)

    def mvtec(self, root, category="plate", defects=("crack", "stain"), shots=6, train=6, test=3):
        base = root / category
        for i in range(train):
            self.image(base / "train/good" / f"{i:03d}.png")
        for i in range(test):
            self.image(base / "test/good" / f"{i:03d}.png")
        for defect in defects:
            for i in range(shots):
                self.pair(
                    base / "test" / defect / f"{i:03d}.png", base / "ground_truth" / defect / f"{i:03d}_mask.png", i
                )
        return root


@pytest.fixture
def trees():
    return Trees()


@pytest.fixture
def plate(trees, tmp_path):
    """MVTec AD's layout: one category, two defects of six images, six train and three test normals."""
    return trees.mvtec(tmp_path / "plates")


@pytest.fixture
def write_image():
    return save


@pytest.fixture
def draw_blob():
    return blob
