"""TDAM: how strongly background, interaction and residual fusion act at each stage of the denoising.

Stated in the abstract: the module "adjusts branch interaction, background information injection, and residual feature
fusion according to the denoising stage", global structure first, local defects later. Our reading: three gates a layer,
g(tau) = 2 sigmoid(a + b (tau - 1/2)) with tau = t / T the share of noise, bounded in (0, 2) and one everywhere where
a = b = 0. The identity path of a layer is never gated.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

KINDS = ("background", "interaction", "fusion")
PRIOR = (2.0, -1.0, -1.0)
"""b of the prior: backgrounds early, interaction and refinement late."""

Schedule = Literal["neutral", "prior", "cosine"]


class Gates(nn.Module):
    """The gates of one layer.

    Args:
        schedule: Where they start: "neutral" (one everywhere) or "prior" (global first), both learned; "cosine" is the
            prior's order as a fixed schedule, 1 -+ cos(pi tau), with nothing learned.
    """

    def __init__(self, schedule: Schedule = "neutral") -> None:
        super().__init__()
        self.schedule = schedule
        if schedule != "cosine":
            self.offset = nn.Parameter(torch.zeros(len(KINDS)))
            self.slope = nn.Parameter(torch.tensor(PRIOR) if schedule == "prior" else torch.zeros(len(KINDS)))

    def forward(self, tau: Tensor) -> Tensor:
        """Gates of rows with these shares of noise: (N,) in [0, 1] to (3, N), in the order of ``KINDS``."""
        if self.schedule == "cosine":
            late = 1 + torch.cos(math.pi * tau)
            return torch.stack([2 - late, late, late])
        return 2 * torch.sigmoid(self.offset[:, None] + self.slope[:, None] * (tau - 0.5))
