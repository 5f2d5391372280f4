"""DualAnoDiff's BCM: a background joins what the image branch attends to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Compensation(nn.Module):
    """BCM before one self-attention: a background's input z_b to the same layer joins that of the image branch.

    Stated: phi(z) + gamma MLP(phi(z_b)) with gamma learned from 0.1, and that "Key, and Value of the background" are
    fused (caption of Figure 2). Our reading: keys and values are made of the sum, queries of phi(z). The released code
    makes keys and values of (1 - gamma) z + gamma MLP(z_b), gamma learned from 0, without the ReLU in the MLP.

    Args:
        width: C of the layer.
        released: The released form.
    """

    WIDTH, GAMMA = 320, 0.1

    def __init__(self, width: int, released: bool = False) -> None:
        super().__init__()
        self.released = released
        between = nn.Identity() if released else nn.ReLU()
        self.mlp = nn.Sequential(nn.Linear(width, self.WIDTH), between, nn.Linear(self.WIDTH, width))
        self.gamma = nn.Parameter(torch.tensor(0.0 if released else self.GAMMA))

    def forward(self, hidden: Tensor, background: Tensor, gate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What queries and what keys and values are made of, each (2 N, L, C).

        Args:
            hidden: The layer's input, (2 N, L, C); the second half, the part branch, is left as it is.
            background: z_b, (M, L, C) with N a multiple of M; they repeat as a whole.
            gate: Multiplies what is added, (N, 1, 1); None: one.
        """
        image, part = hidden.chunk(2)
        added = self.gamma * self.mlp(background).repeat(len(image) // len(background), 1, 1)
        added = added if gate is None else gate * added
        kept = (1 - self.gamma) * image if self.released else image
        return hidden, torch.cat([kept + added, part])
