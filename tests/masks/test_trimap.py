from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from defectlib import images, paths
from defectlib.data import mini
from defectlib.masks import sources
from defectlib.masks.trimap import _tidy, depth, depths_of, foreground, forget, know, trimap
from defectlib.types import Shot

DATA = Path(paths.ROOT).parent / "shared" / "data"


def overlap(found: torch.Tensor, known: torch.Tensor) -> float:
    return ((found & known).sum() / (found | known).sum()).item()


@pytest.mark.parametrize("size", [128, 64])
@pytest.mark.parametrize("category", ["gear", "nut"])
def test_objects_of_mini_are_found(category, size):
    kinds = ["train/good"] * 6 + [f"test/{defect}" for defect in mini.CATEGORIES[category]]
    scores = []
    for index, kind in enumerate(kinds):
        image = images.resize_image(mini.draw(category, kind, index)[0], size)
        scores.append(overlap(foreground(image), mini.foreground(category, kind, index, size=size)))
    assert np.mean(scores) >= 0.93 and min(scores) > 0.88


@pytest.mark.parametrize("size", [128, 64])
def test_textures_fill_the_frame(size):
    whole = []
    for category in ("brick", "grass", "gravel"):
        for index, kind in enumerate(["train/good"] * 4 + [f"test/{defect}" for defect in mini.CATEGORIES[category]]):
            whole.append(foreground(images.resize_image(mini.draw(category, kind, index)[0], size)).all().item())
    assert np.mean(whole) >= 0.95


def test_a_disc_on_a_graded_ground_is_found_whatever_its_sign():
    y, x = np.mgrid[0:64, 0:64] / 63 - 0.5
    disc = np.hypot(y + 0.05, x - 0.1) < 0.3
    noise = np.random.default_rng(0).normal(0, 0.01, (3, 64, 64))
    for step in (0.5, -0.5):
        image = 0.1 + 0.3 * x + step * disc + noise
        found = foreground(torch.from_numpy(image.astype(np.float32)))
        assert overlap(found, torch.from_numpy(disc)[None]) > 0.97


def test_uniform_images_and_ramps_have_no_background():
    ramp = torch.linspace(-0.8, 0.8, 48).expand(3, 48, 48).contiguous()
    for image in (torch.zeros(3, 48, 48), torch.full((3, 48, 48), -1.0), ramp):
        assert foreground(image).all()
    rough = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 48, 48)).astype(np.float32))
    assert foreground(rough).all()


def test_a_bore_stays_open_and_a_glint_is_filled():
    y, x = np.mgrid[0:100, 0:100] - 49.5
    ring = (np.hypot(y, x) < 40) & (np.hypot(y, x) > 12)
    dotted = ring.copy()
    dotted[20:23, 48:51] = False
    dotted[2:4, 2:4] = True
    assert np.array_equal(_tidy(dotted), _tidy(ring))
    assert not _tidy(dotted)[49, 49] and _tidy(dotted)[21, 49] and not _tidy(dotted)[2, 2]


def test_trimap_is_adabldms():
    mask = torch.tensor([[[True, False, False, True]]])
    on = torch.tensor([[[True, True, False, False]]])
    drawn = trimap(mask, on)
    assert drawn.dtype == torch.float32 and drawn.tolist() == [[[1.0, 0.5, 0.0, 1.0]]]
    with pytest.raises(ValueError, match="but the foreground is"):
        trimap(mask, on[..., :2])


@pytest.mark.parametrize("size", [None, 64])
def test_on_real_images(size):
    if not DATA.is_dir():
        pytest.skip("the real images of ../shared/data are not there")
    tiles = sorted((DATA / "magnetic_tile").glob("MT_*/Imgs/*.jpg"))[::60]
    assert np.mean([foreground(images.read_image(path, size=size)).all().item() for path in tiles]) >= 0.95
    tires = sorted((DATA / "mvtec_3d_tire/tire/train/good").iterdir())[::10]
    shares = [foreground(images.read_image(path, size=size)).float().mean().item() for path in tires]
    assert all(0.25 < share < 0.5 for share in shares), "the tire fills a third of the frame"


def test_what_is_known_stands_before_what_is_found():
    image = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(77)) * 2 - 1
    given = torch.zeros(1, 40, 40, dtype=torch.bool)
    given[0, 5:9, 5:9] = True
    assert foreground(image).all()
    know(image, given)
    assert torch.equal(foreground(image), given) and torch.equal(foreground(image.clone()), given)
    assert foreground(image.flip(2)).all(), "another image"
    forget(image)
    assert foreground(image).all()
    with pytest.raises(ValueError, match="but its image is"):
        know(image, given[..., :20])
    with pytest.raises(ValueError, match="the foreground is empty"):
        know(image, ~given & given)


def test_depth_counts_from_the_background_and_not_from_the_frame():
    on = torch.zeros(1, 5, 9, dtype=torch.bool)
    on[..., 3:] = True
    assert np.allclose(depth(on)[2], [0, 0, 0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert (depth(torch.ones(1, 3, 3, dtype=torch.bool)) == 1).all()


def test_a_rims_defects_stay_as_deep_wherever_the_object_lies():
    y, x = np.mgrid[:64, :64] - 31.5
    shade = np.where(np.hypot(y, x) < 24, -0.5, 0.6).astype(np.float32)
    image = torch.from_numpy(shade).expand(3, -1, -1).contiguous()
    rim = torch.from_numpy((np.hypot(y, x) < 23) & (np.hypot(y, x) > 20) & (x > 15))[None]
    shot = Shot(image, rim, "c", "d", "0")
    (wanted,) = depths_of((shot,))
    assert wanted == pytest.approx(depth(foreground(image))[rim[0].numpy()].mean()) and 0 < wanted < 0.2
    other, depths = image.roll((6, -5), (1, 2)), {}
    of_object = depth(foreground(other))
    for name in ("affine_as_shots", "affine"):
        masks = [sources.SOURCES[name](np.random.default_rng(k), [shot], other) for k in range(40)]
        assert all((mask <= foreground(other)).all() for mask in masks)
        depths[name] = np.mean([of_object[mask[0].numpy()].mean() for mask in masks])
    assert depths["affine_as_shots"] < wanted + 0.06 and depths["affine"] > wanted + 0.2
