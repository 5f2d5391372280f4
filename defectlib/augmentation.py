"""What a few shots teach: each in several forms, image, mask, part and background mirrored and cropped alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from defectlib.images import TURNS, resize_image, resize_mask
from defectlib.masks.trimap import foreground
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

    Of 32 windows the first that has it, else the whole.
    """
    size = mask.shape[-1]
    for _ in range(32):
        length = int(rng.integers(round(side * size), size + 1))
        y, x = rng.integers(size - length + 1, size=2)
        box = slice(y, y + length), slice(x, x + length)
        if 2 * mask[:, *box].sum() >= mask.sum():
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
