"""The only place that knows uint8, PIL, resize filters and PNG.

Two rules are stated here and nowhere else:

* images are resized by PIL's bicubic filter, which antialiases when it shrinks (``IMAGE_FILTER``);
* masks shrink by area, then threshold: a cell is defect where at least ``0.5 / k`` of it is covered, ``k`` being the
  larger shrink factor, so that a one-pixel crack survives; they grow by nearest neighbour.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from defectlib import paths

IMAGE_FILTER = "PIL bicubic, antialiased"
NOTES = "defectlib"
"""The PNG text chunk in which a drawn mask says how it came about."""

TURNS = ((), (-1,), (-2,), (-2, -1))
"""The flips of a shot that a method with ``flips`` learns from: as it is, mirrored both ways, turned by half."""

Box = tuple[int, int, int, int]


def open_pil(path: Path | str) -> Image.Image:
    """Decode a file completely, upright (EXIF applied), or raise ValueError with the file's name."""
    try:
        with Image.open(path) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or remove the file") from error


def _as_rgb8(image: Image.Image) -> Image.Image:
    """Any PIL mode as 8-bit RGB: 16-bit grey is divided by 257, palettes are expanded, alpha is dropped."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64) / 257.0
        image = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path: Path | str, box: Box | None = None, size: int | None = None) -> Tensor:
    """Read an image as float32 (3, H, W) in [-1, 1].

    Args:
        path: Any file PIL decodes: 8- or 16-bit grey, palette, RGB or RGBA.
        box: Optional crop (x0, y0, x1, y1) in pixels of the file, taken before the resize.
        size: Optional side of the square result; the aspect ratio is not kept, as in the papers.

    Raises:
        ValueError: The file cannot be decoded.
    """
    image = _as_rgb8(open_pil(path))
    if box is not None:
        image = image.crop(box)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return from_uint8(np.asarray(image))


def read_mask(path: Path | str, box: Box | None = None, size: int | None = None, threshold: int = 127) -> Tensor:
    """Read a mask as bool (1, H, W); a pixel is defect where its value exceeds ``threshold``.

    Args:
        path: Grey, palette or RGB mask file; colours are compared by their largest channel, palettes by index.
        box: Optional crop (x0, y0, x1, y1), as for the image.
        size: Optional side of the square result.
        threshold: 127 for 0/255 and antialiased masks, 0 for class-id masks.
    """
    mask = mask_values(path) > threshold
    if box is not None:
        x0, y0, x1, y1 = box
        mask = mask[y0:y1, x0:x1]
    mask = torch.from_numpy(np.ascontiguousarray(mask))[None]
    return mask if size is None else resize_mask(mask, size)


def mask_values(path: Path | str) -> np.ndarray:
    """The grey values of a mask file as integers (H, W); palette files give their indices, 1-bit files 0 and 255."""
    image = open_pil(path)
    if image.mode in ("1", "LA"):
        image = image.convert("L")
    values = np.asarray(image)
    if values.ndim == 3:
        values = values[..., :3].max(axis=-1)
    return values.astype(np.int64)


def resize_image(image: Tensor, size: int) -> Tensor:
    """Resize float32 (3, H, W) in [-1, 1] to (3, size, size) through 8 bits, as files are."""
    if tuple(image.shape[1:]) == (size, size):
        return image
    resized = Image.fromarray(to_uint8(image)).resize((size, size), Image.Resampling.BICUBIC)
    return from_uint8(np.asarray(resized))


def resize_mask(mask: Tensor, size: int) -> Tensor:
    """Resize bool (1, H, W) to (1, size, size) by the rule at the top of this file.

    A mask that is not empty never becomes empty: if no cell passes, the most covered one is kept.
    """
    height, width = mask.shape[1:]
    if (height, width) == (size, size):
        return mask
    values = Image.fromarray(mask[0].numpy().astype(np.float32))
    shrink = max(height, width) / size
    if shrink <= 1:
        grown = values.resize((size, size), Image.Resampling.NEAREST)
        return torch.from_numpy(np.asarray(grown) > 0.5)[None]
    coverage = np.asarray(values.resize((size, size), Image.Resampling.BOX))
    small = coverage >= 0.5 / shrink - 1e-6
    if mask.any() and not small.any():
        small = coverage >= coverage.max()
    return torch.from_numpy(small)[None]


def is_grey(image: Tensor) -> bool:
    """Whether the channels of float32 (3, H, W) are equal everywhere, as a sensor of one channel gives them."""
    return torch.equal(image, image[:1].expand_as(image))


def to_grey(image: Tensor) -> Tensor:
    """float32 (3, H, W) with the mean of its channels in each of them."""
    return image.mean(0, keepdim=True).expand_as(image)


def to_uint8(image: Tensor) -> np.ndarray:
    """float32 (3, H, W) in [-1, 1] to uint8 (H, W, 3)."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def from_uint8(array: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def write_image(path: Path | str, image: Tensor) -> None:
    """Write float32 (3, H, W) in [-1, 1] as an 8-bit PNG, by atomic rename."""
    _write_png(path, Image.fromarray(to_uint8(image)))


def write_mask(path: Path | str, mask: Tensor, notes: dict[str, float | str] | None = None) -> None:
    """Write bool (1, H, W) as a 0/255 grey PNG, by atomic rename; ``notes`` are kept in its text chunk."""
    about = PngInfo()
    if notes:
        about.add_text(NOTES, json.dumps(notes))
    _write_png(path, Image.fromarray(mask[0].numpy().astype(np.uint8) * 255), about)


def read_notes(path: Path | str) -> dict[str, float | str]:
    """The notes that :func:`write_mask` put into a file; empty where there are none."""
    return json.loads(open_pil(path).info.get(NOTES, "{}"))


def _write_png(path: Path | str, image: Image.Image, about: PngInfo | None = None) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=about)
    paths.write_bytes(path, buffer.getvalue())
