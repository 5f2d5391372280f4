"""Online decoder adaptation (AdaBLDM): after drawing, a VAE's decoder is trained on the one image it has to decode.

What lies outside the defect is known, the normal image, yet the decoder gives its own reconstruction of it. A copy of
the decoder's weights is trained for each image until it gives the normal there and still gives the defect. The base
model's own decoder is never written to.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from defectlib.backbone import Backbone

Part = Literal["whole", "last_block", "norms", "last_layer"]
OUTSIDE = 100.0
"""Weight of an error outside the defect against one inside (released code)."""


def layers(base: Backbone) -> nn.Sequential:
    """The decoder's own layers in the order that they run in, so that what is not trained can be computed once."""
    d = base.vae.decoder
    return nn.Sequential(d.conv_in, d.mid_block, *d.up_blocks, d.conv_norm_out, d.conv_act, d.conv_out)


def adapted(
    base: Backbone,
    latents: Tensor,
    normals: Tensor,
    masks: Tensor,
    *,
    part: Part = "whole",
    steps: int = 200,
    learning_rate: float = 1e-4,
    schedule: Literal["constant", "cycle"] = "constant",
    together: bool | None = None,
) -> Tensor:
    """Decode latents, each by a decoder trained for it alone: AdaBLDM's last stage.

    Minimised by AdamW is MSE(M x_fg, M D(z)) + 100 MSE((1 - M) x_ok, (1 - M) D(z)), where x_fg is what the decoder
    gave before, clipped to the images' range.

    Args:
        base: Its decoder is copied.
        latents: z, (N, C, h, w), as :meth:`Backbone.decode` takes them.
        normals: x_ok, float32 (N, 3, H, W) in [-1, 1].
        masks: M, bool (N, 1, H, W): where the defect is.
        part: What is trained: the whole decoder (the paper), its last block and what follows, the scales and shifts of
            its norms, or its last convolution. What runs before the first trained layer runs once.
        steps: Of AdamW; the paper has 200.
        learning_rate: The paper has 1e-4.
        schedule: Constant, or one cycle: up to ``learning_rate`` in the first 15 % of the steps, then down to nothing.
        together: All images as one optimisation, with a copy of the weights each, or one after the other; None is the
            first on a GPU. On a CPU a convolution with weights of each image's own is twice as slow.

    Returns:
        Images (N, 3, H, W) on the CPU, in [-1, 1].
    """
    device, run = base.device, layers(base)
    with torch.no_grad():
        z = base.vae.post_quant_conv(latents.to(device) / base.vae.config.scaling_factor)
    masks, normals = masks.to(device), normals.to(device)
    together = device.type == "cuda" if together is None else together
    first = {"whole": 0, "norms": 0, "last_block": len(run) - 4, "last_layer": len(run) - 1}[part]
    parts = [slice(0, len(z))] if together else [slice(i, i + 1) for i in range(len(z))]
    found = []
    for rows in parts:
        with torch.no_grad():
            before = run[:first](z[rows])
            goal = torch.where(masks[rows], run[first:](before).clamp(-1, 1), normals[rows])
        weights = torch.where(masks[rows], 1.0, OUTSIDE)
        # Deep copies keep the layers' memory format, on which the speed of convolutions depends.
        head = copy.deepcopy(run[first:]).requires_grad_(False)
        names = [name for name, _ in head.named_parameters() if part != "norms" or "norm" in name]
        found.append(_trained(head, names, before, goal, weights, steps, learning_rate, schedule))
    return torch.cat(found).clamp(-1, 1).cpu()


def _trained(
    head: nn.Module,
    names: list[str],
    inputs: Tensor,
    goal: Tensor,
    weights: Tensor,
    steps: int,
    learning_rate: float,
    schedule: str,
) -> Tensor:
    """What copies of ``head``, one an image, give after their training."""
    own = dict(head.named_parameters())
    if len(inputs) == 1:
        trained = [own[name].requires_grad_(True) for name in names]

        def give() -> Tensor:
            return head(inputs)
    else:
        copies = {name: own[name].expand(len(inputs), *own[name].shape).clone().requires_grad_(True) for name in names}
        trained = list(copies.values())
        each = vmap(lambda values, x: functional_call(head, values, (x[None],))[0])

        def give() -> Tensor:
            return each(copies, inputs)

    optimiser = torch.optim.AdamW(trained, lr=learning_rate, fused=True)
    rate = None
    if schedule == "cycle" and steps > 1:
        rate = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, learning_rate, total_steps=steps, pct_start=0.15, cycle_momentum=False
        )
    for _ in range(steps):
        with torch.enable_grad():
            # A sum over images: what one learns does not depend on how many there are.
            loss = (weights * (give() - goal).square()).mean((1, 2, 3)).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
        optimiser.step()
        if rate:
            rate.step()
    with torch.no_grad():
        return give()
