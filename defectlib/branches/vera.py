"""VeRA (Kopiczko et al., ICLR 2024) with vectors of each class, to compare CSB-LoRA with.

CSB-LoRA learns bases that classes share, and each class a few coefficients. VeRA is the other end: the bases are random
and frozen, one pair for all projections, branches and classes, and each class learns all that is learned, two vectors a
projection: Delta W_c = diag(b_c) B diag(d_c) A.

peft has VeRA, but not for batches of mixed adapters, which routing by branch needs. So its rule is written out in the
matrices of peft's LoRA layers: bases drawn once from a fixed key, uniform as Kaiming's, and cut to each projection's
widths; d starts at 0.1, b at zero. A vector for each class is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from defectlib.branches.classes import Rows, Scaled

KEY = 0
"""Of the bases: they are part of the form, not of a fit, so that they need not be kept with it."""
START = 0.1


class Vectors(Scaled):
    """A frozen matrix with a learned vector a class.

    Args:
        frozen: (out, in).
        classes: How many.
        rows: The batch's classes.
        start: Of all vectors.
    """

    def __init__(self, frozen: Tensor, classes: int, rows: Rows, start: float) -> None:
        super().__init__(rows)
        self.register_buffer("frozen", frozen, persistent=False)
        self.vectors = nn.Parameter(torch.full((classes, len(frozen)), start))

    @property
    def weight(self) -> Tensor:
        """The frozen matrix under the mean of the classes' vectors."""
        return self.shared()[:, None] * self.frozen

    def base(self) -> Tensor:
        """The frozen matrix."""
        return self.frozen

    def coefficients(self) -> Tensor:
        """The vectors."""
        return self.vectors

    def shared(self) -> Tensor:
        """Their mean over the classes."""
        return self.vectors.mean(0)


def put_vera(layers: Sequence[LoraLayer], rank: int, classes: int, rows: Rows) -> None:
    """Put VeRA in the place of A and B in all adapters of these layers."""
    widths = [(layer.in_features, layer.out_features) for layer in layers]
    generator = torch.Generator().manual_seed(KEY)
    down, up = torch.empty(rank, max(w for w, _ in widths)), torch.empty(max(w for _, w in widths), rank)
    for base in (down, up):
        nn.init.kaiming_uniform_(base, generator=generator)
    for layer, (entering, leaving) in zip(layers, widths, strict=True):
        for name in list(layer.lora_A):
            layer.lora_A[name] = Vectors(down[:, :entering], classes, rows, START)
            layer.lora_B[name] = Vectors(up[:leaving], classes, rows, 0.0)
