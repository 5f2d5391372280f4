import numpy as np
import pytest
import torch
from PIL import Image

from defectlib import images


def write(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_uint8_round_trip_is_exact():
    array = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    image = images.from_uint8(array)
    assert image.dtype == torch.float32 and image.min() == -1 and image.max() == 1
    assert (images.to_uint8(image) == array).all()


def test_png_round_trip(tmp_path):
    image = torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.rand(1, 9, 7, generator=torch.Generator().manual_seed(1)) > 0.5
    images.write_image(tmp_path / "a.png", image)
    images.write_mask(tmp_path / "m.png", mask)
    assert (images.read_image(tmp_path / "a.png") - image).abs().max() <= 1 / 255
    assert torch.equal(images.read_mask(tmp_path / "m.png"), mask)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.png", "m.png"], "no partial file is left"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16"])
def test_every_mode_becomes_rgb_in_range(tmp_path, mode):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(grey).convert("RGB").convert(mode) if mode != "L" else Image.fromarray(grey)
    picture.save(tmp_path / "x.png")
    image = images.read_image(tmp_path / "x.png")
    assert image.shape == (3, 8, 8)
    assert (images.to_uint8(image)[..., 0].astype(int) - grey).__abs__().max() <= (40 if mode == "P" else 0)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((4, 10, 3), np.uint8)).save(tmp_path / "x.jpg", exif=exif)
    assert images.read_image(tmp_path / "x.jpg").shape == (3, 10, 4)


def test_unreadable_file_is_named(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image .*replace or remove"):
        images.read_image(tmp_path / "bad.png")


@pytest.mark.parametrize("size", [512, 300])
def test_one_pixel_crack_survives_the_shrink(size):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, :, size // 3] = True
    small = images.resize_mask(mask, 64)
    assert small.any(dim=2).all(), "every row keeps its crack"
    assert small.sum() <= 2 * 64


def test_mask_shrink_threshold_by_hand():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True  # covers 1/4 of the first 2 x 2 cell; the threshold is 0.5 / 2
    assert images.resize_mask(mask, 2).tolist() == [[[True, False], [False, False]]]


def test_a_mask_never_becomes_empty():
    mask = torch.zeros(1, 512, 512, dtype=torch.bool)
    mask[0, 100, 100] = True
    small = images.resize_mask(mask, 16)
    assert small.sum() == 1 and small[0, 3, 3]


def test_mask_growth_is_nearest():
    mask = torch.tensor([[[True, False], [False, True]]])
    assert torch.equal(images.resize_mask(mask, 4), mask.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_box_is_cut_before_the_resize(tmp_path):
    array = np.zeros((8, 8, 3), np.uint8)
    array[4:, 4:] = 255
    write(tmp_path / "x.png", array)
    assert (images.read_image(tmp_path / "x.png", box=(4, 4, 8, 8), size=2) == 1).all()
    write(tmp_path / "m.png", array[..., 0])
    assert images.read_mask(tmp_path / "m.png", box=(4, 4, 8, 8)).all()


@pytest.mark.parametrize(("threshold", "expected"), [(127, [False, False, True]), (0, [False, True, True])])
def test_mask_threshold(tmp_path, threshold, expected):
    write(tmp_path / "m.png", np.array([[0, 60, 253]], np.uint8))
    assert images.read_mask(tmp_path / "m.png", threshold=threshold)[0, 0].tolist() == expected


def test_one_bit_masks_are_0_and_255(tmp_path):
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "m.png")
    assert Image.open(tmp_path / "m.png").mode == "1"
    assert images.read_mask(tmp_path / "m.png")[0, 0].tolist() == [False, True]
