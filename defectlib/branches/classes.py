"""CSB-LoRA: low-rank bases that all classes share, and coefficients that each class has of its own.

Stated by the paper (its abstract): "cross-class shared low-rank bases with class-dependent coefficients". Our reading,
for every projection and branch: Delta W_c = (alpha / r) B diag(s_c) A with s_c = 1 + d_c, so that a class is a
departure from what all share. Without a departure it is LoRA. The regularisers are our reading too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Form = Literal["csb", "separate", "vera"]
"""What classes have of their own: coefficients of shared bases, a LoRA each, or vectors beside frozen bases."""
START = 0.02
"""Standard deviation of d_c before training: classes that start alike are told apart by their data alone."""


class Rows:
    """Which class each pair of a batch has; one for all layers of a model.

    Attributes:
        classes: (N,) indices, or (N, K) weights over the K classes for what lies between them; None: no departure.
    """

    classes: Tensor | None = None

    @contextmanager
    def of(self, classes: Tensor | None) -> Iterator[None]:
        """Within it the pairs have these classes."""
        before, self.classes = self.classes, classes
        try:
            yield
        finally:
            self.classes = before


DEPARTURE = ".departure"
OWN = (DEPARTURE, ".vectors")
"""How the names of what a class has of its own end."""


class Scaled(nn.Module, ABC):
    """One matrix W of a LoRA layer, in the place of peft's, with coefficients of the row's class: s_c * (W x).

    A batch of mixed classes goes through in one pass; no weights are merged. Every form has a ``weight``, (out, in):
    what all classes share, where peft looks for it.

    Args:
        rows: The batch's classes.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    @abstractmethod
    def base(self) -> Tensor:
        """W, (out, in)."""

    @abstractmethod
    def coefficients(self) -> Tensor:
        """s_c of every class, (K, out)."""

    @abstractmethod
    def shared(self) -> Tensor:
        """What stands for s_c where no class is asked for, (out,)."""

    def of_rows(self, classes: Tensor) -> Tensor:
        """S of rows with these classes, (N, out); between classes, that of the weighted mean."""
        every = self.coefficients()
        return classes.to(every) @ every if classes.ndim == 2 else every[classes]

    def of_class(self, classes: Tensor | None) -> Tensor:
        """diag(s_c) W of one class, (1,) or (1, K); None: of what stands for all."""
        scale = self.shared() if classes is None else self.of_rows(classes.to(self.base().device))[0]
        return scale[:, None] * self.base()

    def scale(self) -> Tensor:
        """S of the batch's rows, (N, out), or of all, (1, out), where no class is asked for."""
        if self.rows.classes is None:
            return self.shared()[None]
        return self.of_rows(self.rows.classes.to(self.base().device))

    def forward(self, hidden: Tensor) -> Tensor:
        """(N, ..., in) to (N, ..., out)."""
        left, scale = nn.functional.linear(hidden, self.base()), self.scale()
        return left * scale.to(left.dtype).view(len(scale), *[1] * (left.ndim - 2), -1)


class ClassScaled(Scaled):
    """A of one LoRA layer with class-dependent coefficients, s_c = 1 + d_c.

    A keeps its name in peft's state: what classes share is a LoRA of peft's, and starts from one.

    Args:
        linear: A, (r, width).
        classes: How many.
        rows: The batch's classes.
        generator: Of d_c.
        blocks: Coefficients a class: ``r`` of them, or fewer, each tied over r / blocks rows of A. That is the form
            sum_k a_(c,k) B_k A_k with K = blocks bases.
        start: Standard deviation of d_c.
    """

    def __init__(
        self,
        linear: nn.Linear,
        classes: int,
        rows: Rows,
        generator: torch.Generator,
        *,
        blocks: int | None = None,
        start: float = START,
    ) -> None:
        super().__init__(rows)
        rank = linear.out_features
        blocks = rank if blocks is None else blocks
        if rank % blocks:
            raise ValueError(f"{blocks} blocks do not divide rank {rank}: choose a divisor for tie_blocks")
        self.weight, self.tied = linear.weight, rank // blocks
        self.departure = nn.Parameter(start * torch.randn(classes, blocks, generator=generator))

    def base(self) -> Tensor:
        """A, (r, width)."""
        return self.weight

    def coefficients(self) -> Tensor:
        """s_c of every class, (K, r)."""
        return (1 + self.departure).repeat_interleave(self.tied, 1)

    def shared(self) -> Tensor:
        """One: no departure."""
        return self.weight.new_ones(len(self.weight))


class Separate(Scaled):
    """A of one LoRA layer of rank K r with r rows for each class: a LoRA a class, to compare CSB-LoRA with.

    With s_c one on a class's own rows and zero on the others', B diag(s_c) A is B_c A_c: nothing is shared.

    Args:
        linear: A, (K r, width), drawn with a standard deviation of 1 / (K r); every class starts as a LoRA of rank r.
        classes: K.
        rows: The batch's classes.
    """

    @torch.no_grad()
    def __init__(self, linear: nn.Linear, classes: int, rows: Rows) -> None:
        super().__init__(rows)
        self.weight = linear.weight
        self.weight.mul_(classes)
        own = torch.eye(classes).repeat_interleave(len(self.weight) // classes, 1)
        self.register_buffer("own", own, persistent=False)

    def base(self) -> Tensor:
        """A of all classes, (K r, width)."""
        return self.weight

    def coefficients(self) -> Tensor:
        """One on its own rows for every class, (K, K r)."""
        return self.own

    def shared(self) -> Tensor:
        """The mean over the classes."""
        return self.own.mean(0)


def scaled_layers(model: nn.Module) -> list[ClassScaled]:
    """All layers of a model that have coefficients."""
    return [m for m in model.modules() if isinstance(m, ClassScaled)]


def coefficient_map(layers: Sequence[ClassScaled]) -> Tensor:
    """d_c of every class over all layers, (K, M), for how alike classes are."""
    return torch.cat([layer.departure.detach().cpu() for layer in layers], 1)


def orthogonality(layers: Sequence[ClassScaled]) -> Tensor:
    """Mean over layers of ||R R^T - I||^2 with R the rows of A at length one; 0: they are orthogonal. B is free."""
    total = 0.0
    for layer in layers:
        rows = nn.functional.normalize(layer.weight, dim=1)
        gram = rows @ rows.T
        total = total + (gram - torch.eye(len(gram), device=gram.device)).square().sum()
    return total / len(layers)


def discrepancy(layers: Sequence[ClassScaled], margin: float) -> Tensor:
    """Mean over pairs of classes of max(0, cos(d_c, d_c') - margin) over all layers: classes are kept apart."""
    every = nn.functional.normalize(torch.cat([layer.departure for layer in layers], 1), dim=1)
    alike = every @ every.T
    pairs = torch.triu_indices(len(alike), len(alike), 1)
    if pairs.shape[1] == 0:
        return alike.new_zeros(())
    return (alike[pairs[0], pairs[1]] - margin).clamp_min(0).mean()
