"""How much of a defect both branches find again under noise: why a small one may never be drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from defectlib.backbone import Backbone
from defectlib.diffusion import dilated, noise_like
from defectlib.types import Shot

RING = 3


@torch.no_grad()
def found_again(
    branches: Callable[[Tensor, Tensor, Tensor], Tensor],
    words: Tensor,
    base: Backbone,
    shot: Shot,
    levels: Sequence[int],
    seed: int,
) -> list[tuple[float, float]]:
    """The share of a shot's defect that is in the image, and in the part, which one step makes of noise.

    A share is the inner product of what is found and what is there over the square of what is there, over the mask's
    pixels: 1 is all of the defect's contrast, 0 none. The contrast of an image is to the mean of a ring of ``RING``
    pixels around the mask, that of a part to mid-grey.

    Args:
        branches: Predicts, as the base model's scheduler takes it, from (2, C, h, w) latents of image and part, a
            scalar timestep and the words of both.
        words: The embedded prompts of image and part, (2, L, D).
        base: Encodes and decodes; its noise schedule is used.
        shot: A real defect; its mask is neither empty nor full.
        levels: Timesteps.
        seed: Of the noise.
    """
    scheduler = base.scheduler
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    pictures = torch.stack([shot.image, shot.image * shot.mask])
    ring = dilated(shot.mask[None], RING)[0, 0] & ~shot.mask[0]
    is_image = torch.tensor([True, False])[:, None]

    def contrast(images: Tensor) -> Tensor:
        ground = torch.where(is_image, images[..., ring].mean(-1), 0.0)
        return images[..., shot.mask[0]] - ground[..., None]

    latents, there = base.encode(pictures), contrast(pictures)
    noise = noise_like([seed, seed + 1], latents.shape[1:]).to(latents.device)
    shares = []
    for level in torch.tensor(list(levels)):
        noisy = scheduler.add_noise(latents, noise, level[None])
        predicted = branches(noisy, level.to(noisy.device), words)
        found = contrast(base.decode(scheduler.step(predicted, level, noisy).pred_original_sample))
        image, part = ((there * found).sum((1, 2)) / there.square().sum((1, 2))).tolist()
        shares.append((image, part))
    return shares
