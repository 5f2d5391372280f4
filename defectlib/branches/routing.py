"""LoRA routed by branch: every row takes that of its own, in one pass."""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from defectlib.branches.classes import Scaled

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
BRANCHES = ("image", "part")
BASE = "__base__"
"""peft's name for a row that takes no LoRA."""
SWITCHED_OFF = (
    "LoRA is switched off, or merged into the base's weights, by a helper call: the branches add it themselves"
)

ONE_ACTIVE = "one branch's LoRA is not active: it would be frozen, and left out of the prediction"


class Route:
    """Hooks of every LoRA layer: each row takes the LoRA of its branch, both branches in one batched product.

    Without it peft would add up both branches' in every row. Its own batch of mixed adapters gathers the rows of each
    and scatters them back, forwards and backwards: the same numbers, at a fifth more for a whole training step.

    Attributes:
        base_only: True while backgrounds pass: no row takes any.
        calls: How many projections took rows through it; a pass that misses one lacks LoRA there, or sums both.
    """

    base_only, calls = False, 0
    entered: nn.Module | None = None

    def __call__(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        """Before a layer: peft is told that no row takes any."""
        if layer.disable_adapters or layer.merged:
            raise RuntimeError(SWITCHED_OFF)
        if set(layer.active_adapters) != set(BRANCHES):
            raise RuntimeError(ONE_ACTIVE)
        self.entered = layer
        return arguments, named | {"adapter_names": [BASE] * len(arguments[0])}

    def add(self, layer: LoraLayer, arguments: tuple, output: Tensor) -> Tensor:
        """After it: the first half of the rows (2 N, L, C) take the LoRA "image", the second half "part"."""
        self.calls += layer is self.entered
        if self.base_only:
            return output
        hidden = arguments[0].unflatten(0, (len(BRANCHES), -1))
        added = _each(layer.lora_B, _each(layer.lora_A, hidden))
        return torch.add(output, added.flatten(0, 1), alpha=layer.scaling[BRANCHES[0]])


def _each(matrices: nn.ModuleDict, hidden: Tensor) -> Tensor:
    """(2, N, L, in) to (2, N, L, out): each branch by its own A or B, with the coefficients of its rows' classes."""
    own = [matrices[name] for name in BRANCHES]
    weights = torch.stack([m.base() if isinstance(m, Scaled) else m.weight for m in own])
    product = torch.bmm(hidden.flatten(1, 2), weights.transpose(1, 2)).view(*hidden.shape[:-1], -1)
    if not isinstance(own[0], Scaled):
        return product
    return product * torch.stack([m.scale() for m in own]).to(product.dtype)[:, :, None]


class FoldedLora(nn.Module):
    """A projection for drawing, its LoRA added to the weights of each branch.

    Args:
        layer: peft's, with both branches' adapters.
        route: Of the model.
        classes: Of all that is drawn, (1,) or (1, K), where the LoRA has class-dependent coefficients; None: without.
    """

    @torch.no_grad()
    def __init__(self, layer: LoraLayer, route: Route, classes: Tensor | None = None) -> None:
        super().__init__()
        self.layer, self.route = layer, route
        base = layer.get_base_layer()
        weights = torch.stack([base.weight + _delta(layer, name, classes) for name in BRANCHES])
        self.register_buffer("weights", weights.transpose(1, 2).contiguous(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rows (2 N, L, C), the image branch first; all by the base's weights while backgrounds pass."""
        self.route.calls += 1
        base = self.layer.get_base_layer()
        if self.route.base_only:
            return base(hidden)
        bias = torch.zeros((), dtype=hidden.dtype, device=hidden.device) if base.bias is None else base.bias
        projected = torch.baddbmm(bias, hidden.unflatten(0, (2, -1)).flatten(1, 2), self.weights)
        return projected.view(*hidden.shape[:-1], -1)


def _delta(layer: LoraLayer, name: str, classes: Tensor | None) -> Tensor:
    """(alpha / r) B A of one adapter, with the coefficients of a class where it has any."""
    if classes is None and not isinstance(layer.lora_A[name], Scaled):
        return layer.get_delta_weight(name)
    down, up = (
        m.of_class(classes) if isinstance(m, Scaled) else m.weight for m in (layer.lora_A[name], layer.lora_B[name])
    )
    return layer.scaling[name] * up @ down


def lora(rank: int, projections: list[str]) -> LoraConfig:
    """LoRA of scale 1 that starts as the released code's: B zero, A normal with a standard deviation of 1 / rank."""
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=projections)
