"""What two branches minimise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from defectlib.backbone import Backbone
from defectlib.branches.dual import Dual
from defectlib.diffusion import noised


def dual_loss(
    dual: Dual,
    base: Backbone,
    clean: dict[str, Tensor],
    generator: torch.Generator,
    *,
    classes: Tensor | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """What a training step minimises: the mean over both branches of the base's own loss, eps-MSE in the paper.

    Args:
        dual: What is trained.
        base: Its noise schedule and its empty prompt are used.
        clean: x_0 of "image" and "part", and with compensation of "background", (N, C, h, w) each.
        generator: A CPU generator: timesteps, one a pair, then the noise of each branch.
        classes: Of the pairs, where the branches have class-dependent coefficients.
        weigh: Timesteps (N,) to weights of the squared errors, (N, 1, h, w), alike in both branches; None: one.
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
    predicted = dual.branches(noisy, timesteps.repeat(2), text, features, classes)
    errors = (predicted.float() - target).square()
    return errors.mean() if weigh is None else (weigh(timesteps).repeat(2, 1, 1, 1) * errors).mean()
