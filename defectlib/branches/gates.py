"""TDAM: how strongly background, interaction and residual fusion act at each stage of the denoising.

Stated by the paper (its abstract): the module "adjusts branch interaction, background information injection, and
residual feature fusion according to the denoising stage", "from global structure restoration to local defect
refinement". Our reading: three gates a layer, g(tau) = 2 sigmoid(a + b (tau - 1/2)) with tau = t / T the share of
noise, bounded in (0, 2) and one everywhere where a = b = 0. The identity path of a layer is never gated.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

KINDS = ("background", "interaction", "fusion")
PRIOR = (2.0, -1.0, -1.0)
"""b of the prior: backgrounds early, interaction and refinement late."""

Schedule = Literal["neutral", "prior", "fixed", "cosine"]


class Gates(nn.Module):
    """The gates of one layer.

    Args:
        schedule: Where they start: "neutral" (one everywhere) or "prior" (global first), both learned. With nothing
            learned, "fixed" is the prior as it starts, and "cosine" goes between the same ends by cos(pi tau).
    """

    def __init__(self, schedule: Schedule = "neutral") -> None:
        super().__init__()
        self.schedule = schedule
        if schedule in ("neutral", "prior"):
            self.offset = nn.Parameter(torch.zeros(len(KINDS)))
            self.slope = nn.Parameter(torch.tensor(PRIOR) if schedule == "prior" else torch.zeros(len(KINDS)))

    def forward(self, tau: Tensor) -> Tensor:
        """Gates of rows with these shares of noise: (N,) in [0, 1] to (3, N), in the order of ``KINDS``."""
        prior = torch.tensor(PRIOR, device=tau.device)[:, None]
        if self.schedule == "cosine":
            return 1 - (prior / 4).tanh() * torch.cos(math.pi * tau)  # 2 sigmoid(x) = 1 + tanh(x / 2)
        if self.schedule == "fixed":
            return 2 * torch.sigmoid(prior * (tau - 0.5))
        return 2 * torch.sigmoid(self.offset[:, None] + self.slope[:, None] * (tau - 0.5))
