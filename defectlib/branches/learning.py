"""What two branches learn from: images, parts and backgrounds, turned and cropped alike, and the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from defectlib.backbone import Backbone
from defectlib.branches.dual import Dual
from defectlib.diffusion import noised
from defectlib.images import TURNS, resize_image, resize_mask
from defectlib.masks.trimap import foreground
from defectlib.types import Shot


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
) -> dict[str, Tensor]:
    """What is learned from: "image", "part" and, where asked for, "background", (N, 3, H, W) each, row by row.

    Args:
        shots: Of one fit.
        seed: Of the crops.
        flips: Every picture also mirrored both ways and turned by half.
        crops: Random square crops a shot, besides the whole.
        crop_side: Their least side, as a share of the image's.
        backgrounds: With the images without their objects.
    """
    pictures: dict[str, list[Tensor]] = {"image": [], "part": []} | ({"background": []} if backgrounds else {})
    for k in range(1 + crops):
        for i, shot in enumerate(shots):
            size, box = shot.image.shape[-1], (slice(None), slice(None))
            if k:
                box = crop_box(shot.mask, crop_side, np.random.default_rng([seed, i, k]))
            image = resize_image(shot.image[:, *box], size)
            pictures["image"].append(image)
            pictures["part"].append(image * resize_mask(shot.mask[:, *box], size))
            if backgrounds:  # the object is found in the whole image: a crop may have no border
                pictures["background"].append(image * ~resize_mask(foreground(shot.image)[:, *box], size))
    turns = TURNS if flips else TURNS[:1]
    return {name: torch.cat([torch.stack(some).flip(turn) for turn in turns]) for name, some in pictures.items()}


def dual_loss(dual: Dual, base: Backbone, clean: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """What a training step minimises: the mean over both branches of the base's own loss, eps-MSE in the paper.

    Args:
        dual: What is trained.
        base: Its noise schedule and its empty prompt are used.
        clean: x_0 of "image" and "part", and with compensation of "background", (N, C, h, w) each.
        generator: A CPU generator: timesteps, one a pair, then the noise of each branch.
    """
    scheduler, n = base.scheduler, len(clean["image"])
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (n,), generator=generator)
    rows = {name: noised(x, scheduler, generator, timesteps) for name, x in clean.items()}
    noisy, target = (torch.cat([rows[name][i] for name in ("image", "part")]) for i in (0, 2))
    timesteps = timesteps.to(noisy.device)
    features = None
    if "background" in rows:
        features = dual.branches.background_features(rows["background"][0], timesteps, base.embed([""] * n))
    text = dual.text()[:2].repeat_interleave(n, 0)
    predicted = dual.branches(noisy, timesteps.repeat(2), text, features)
    return (predicted.float() - target).square().mean()
