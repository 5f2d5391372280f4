"""What a few shots teach: each in several forms, mirrored and cropped, or cut out and pasted on a normal image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from defectlib.images import TURNS, resize_image, resize_mask
from defectlib.masks.random import ATTEMPTS, Places, affine_crop, at, settle, windows
from defectlib.masks.trimap import depth, foreground
from defectlib.types import Shot


class Pictures(NamedTuple):
    """What is learned from, row by row.

    Attributes:
        shown: "image", "part" (the image times its mask, so mid-grey outside) and, where asked for, "background",
            float (N, 3, H, W) each.
        masks: bool (N, 1, H, W).
        of_shot: Which shot each row shows, (N,).
    """

    shown: dict[str, Tensor]
    masks: Tensor
    of_shot: Tensor


def background(image: Tensor) -> Tensor:
    """The image (3, H, W) without its object, which is mid-grey there: I_b = (1 - M_f) I.

    All of it is grey where the surface fills the frame. The paper has M_f from U^2-Net, here it is ``masks.trimap``'s.
    """
    return image * ~foreground(image)


def crop_box(mask: Tensor, side: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A random square window, its side at least this share of the mask's, with half of the defect in it or more.

    Of 32 windows the first that has it and is not all defect, else the whole.
    """
    size = mask.shape[-1]
    for _ in range(32):
        length = int(rng.integers(round(side * size), size + 1))
        y, x = rng.integers(size - length + 1, size=2)
        box = slice(y, y + length), slice(x, x + length)
        if 2 * mask[:, *box].sum() >= mask.sum() and not mask[:, *box].all():
            return box
    return slice(0, size), slice(0, size)


def training_pictures(
    shots: Sequence[Shot],
    seed: int,
    *,
    flips: bool = True,
    crops: int = 0,
    crop_side: float = 0.8,
    backgrounds: bool = False,
) -> Pictures:
    """What is learned from, each shot in several forms.

    Args:
        shots: Of one fit.
        seed: Of the crops.
        flips: Every picture also mirrored both ways and turned by half.
        crops: Random square crops a shot, besides the whole.
        crop_side: Their least side, as a share of the image's.
        backgrounds: With the images without their objects.
    """
    pictures: dict[str, list[Tensor]] = {"image": [], "part": []} | ({"background": []} if backgrounds else {})
    masks = []
    for k in range(1 + crops):
        for i, shot in enumerate(shots):
            size, box = shot.image.shape[-1], (slice(None), slice(None))
            if k:
                box = crop_box(shot.mask, crop_side, np.random.default_rng([seed, i, k]))
            image = resize_image(shot.image[:, *box], size)
            pictures["image"].append(image)
            masks.append(resize_mask(shot.mask[:, *box], size))
            pictures["part"].append(image * masks[-1])
            if backgrounds:  # the object is found in the whole image: a crop may have no border
                pictures["background"].append(image * ~resize_mask(foreground(shot.image)[:, *box], size))
    turns = TURNS if flips else TURNS[:1]

    def turned(some: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.stack(list(some)).flip(turn) for turn in turns])

    of_shot = torch.arange(len(shots)).repeat((1 + crops) * len(turns))
    return Pictures({name: turned(some) for name, some in pictures.items()}, turned(masks), of_shot)


def paste(normal: Tensor, patch: Tensor, mask: Tensor, y: int, x: int, feather: float = 0.0) -> tuple[Tensor, Tensor]:
    """Paste ``patch`` (3, h, w) where ``mask`` (1, h, w) with its corner at (y, x); parts outside the image are cut.

    Returns:
        The image (3, H, W) and its mask (1, H, W). Outside the mask the normal is untouched, whatever the feather: the
        blend runs from the mask's edge inwards.
    """
    frame = tuple(normal.shape[1:])
    placed = at(mask, (y, x), frame)
    outside, inside = windows(tuple(mask.shape[1:]), (y, x), frame)
    drawn = normal.clone()
    drawn[outside] = torch.where(mask[inside], patch[inside], normal[outside])
    if feather > 0:
        inside = distance_transform_edt(placed[0].numpy())
        alpha = torch.from_numpy(np.minimum(1.0, inside / (feather + 1))).float()[None]
        drawn = torch.where(placed, normal + alpha * (drawn - normal), normal)
    return drawn, placed


def composite(
    shots: Sequence[Shot],
    normal: Tensor,
    allowed: Tensor,
    rng: np.random.Generator,
    *,
    depths: Sequence[float] | None = None,
    rotate: float = 360.0,
    scale: tuple[float, float] = (0.85, 1.15),
    flip: bool = True,
    feather: float = 0.0,
    attempts: int = ATTEMPTS,
) -> tuple[Tensor, Tensor]:
    """The defect of one of the shots cut out, moved, and pasted on a normal image: AdaBLDM's composites.

    What is pasted is what the mask holds, so that a defect's black pixels are defect. One that fits nowhere whole is
    drawn again, a few times; the last one is then centred and cut to ``allowed``.

    Args:
        shots: To choose from.
        normal: float32 (3, H, W) in [-1, 1].
        allowed: Where the defect may lie, bool (1, H, W).
        rng: Source of the shot, its turn and scale, and the place.
        depths: How deep inside ``allowed`` it lies, see ``masks.random.place``; None is anywhere.
        rotate: The angle's range, as in ``masks.random.affine``.
        scale: The scale's range, likewise.
        flip: Whether it is mirrored, likewise.
        feather: Width in px of a blend that stays inside the mask.
        attempts: Drawings at most.

    Returns:
        The image (3, H, W) and its mask (1, H, W).

    Raises:
        ValueError: No pixel is allowed.
    """

    def draw() -> tuple[Tensor, Tensor]:
        shot = shots[rng.integers(len(shots))]
        return affine_crop(shot.image, shot.mask, rng, rotate=rotate, scale=scale, flip=flip)[:2]

    places = Places(allowed, None if depths is None else depth(allowed))
    (patch, mask), corner = settle(draw, allowed, rng, places=places, depths=depths, attempts=attempts)
    image, placed = paste(normal, patch, mask, *corner, feather)
    placed &= allowed
    return torch.where(placed, image, normal), placed
