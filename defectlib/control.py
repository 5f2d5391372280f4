"""ControlNet on a frozen base model: a new one, what its training minimises, and what the two predict together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from defectlib.backbone import Backbone
from defectlib.diffusion import noised


def new_controlnet(base: Backbone, seed: int) -> ControlNetModel:
    """A copy of the base's encoder with zero convolutions behind it: untrained, it has no effect.

    The hint is brought to the latents' size by one stride-2 convolution a halving of the VAE.
    """
    halvings = int(np.log2(base.cell))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(
            base.unet, conditioning_embedding_out_channels=(16, 32, 96, 256)[: halvings + 1]
        )
    return net.to(base.device, memory_format=torch.channels_last)


def denoising_loss(
    net: ControlNetModel,
    base: Backbone,
    latents: Tensor,
    text: Tensor,
    hints: Tensor,
    weights: Tensor,
    generator: torch.Generator,
    control_text: Tensor | None = None,
) -> Tensor:
    """What a training step minimises: the error of the frozen base's prediction with the ControlNet's residuals.

    The base predicts noise, as the paper has it, or velocity, as its scheduler says.

    Args:
        net: What is trained; the gradients reach it through the base's decoder.
        base: Its UNet and noise schedule are used.
        latents: x_0 of what is learned from, (N, C, h, w).
        text: Embedded prompts, (N, L, D).
        hints: Masks or trimaps as images, (N, 3, H, W) in [0, 1].
        weights: Of the squared errors, (N, 1, h, w).
        generator: A CPU generator: timesteps, then noise.
        control_text: What the ControlNet reads in the prompts' place, (N, L, D).

    Returns:
        The weighted mean square, a scalar.
    """
    noisy, timesteps, target = noised(latents, base.scheduler, generator)
    read = text if control_text is None else control_text
    residuals, middle = net(noisy, timesteps, read, hints, return_dict=False)
    predicted = base.unet(
        noisy, timesteps, text, down_block_additional_residuals=residuals, mid_block_additional_residual=middle
    ).sample
    return (weights * (predicted.float() - target).square()).mean()


def steered(
    net: ControlNetModel,
    base: Backbone,
    text: Tensor,
    embedded: Tensor,
    *,
    guidance_scale: float = 1.0,
    controlnet_scale: float = 1.0,
    control_text: Tensor | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """What the base predicts from (x_t, t) with the ControlNet's residuals.

    Args:
        net: The ControlNet.
        base: Its UNet is used.
        text: Embedded prompts, (N, L, D); under guidance (2 N, L, D), those without a prompt first.
        embedded: The hint's embedding, see :func:`embedded_once`, of as many rows.
        guidance_scale: Above 1 it is classifier-free guidance (Ho and Salimans, 2022).
        controlnet_scale: Of the residuals.
        control_text: What the ControlNet reads in the prompts' place, of as many rows.
    """
    read = text if control_text is None else control_text

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        shown = torch.cat([latents, latents]) if guidance_scale > 1 else latents
        residuals, middle = net(shown, timestep, read, embedded, conditioning_scale=controlnet_scale, return_dict=False)
        predicted = base.unet(
            shown, timestep, text, down_block_additional_residuals=residuals, mid_block_additional_residual=middle
        ).sample
        if guidance_scale <= 1:
            return predicted
        without, with_text = predicted.chunk(2)
        return without + guidance_scale * (with_text - without)

    return predict


@contextmanager
def embedded_once(net: ControlNetModel, hint: Tensor) -> Iterator[Tensor]:
    """Within it ``net`` takes the embedding of ``hint``, which it yields, in the hint's place.

    A hint (N, 3, H, W) is embedded at its full size and is the same at every step: on a CPU a ninth of a step's time.
    """
    embedding = net.controlnet_cond_embedding
    try:
        net.controlnet_cond_embedding = nn.Identity()
        yield embedding(hint)
    finally:
        net.controlnet_cond_embedding = embedding
