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


class Route:
    """A forward pre-hook of every LoRA layer: each row takes the LoRA of its branch.

    Without it peft would add up both branches' in every row.

    Attributes:
        base_only: True while backgrounds pass: no row takes any.
        calls: How many projections took rows through it; a pass that misses one has summed both branches there.
    """

    base_only, calls = False, 0

    def __call__(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        """Hand peft the names of the rows' adapters, the first half's "image", the second half's "part"."""
        self.calls += 1
        rows = len(arguments[0])
        names = [BASE] * rows if self.base_only else [name for name in BRANCHES for _ in range(rows // 2)]
        return arguments, named | {"adapter_names": names}


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
    if classes is None:
        return layer.get_delta_weight(name)
    down, up = (
        m.of_class(classes) if isinstance(m, Scaled) else m.weight for m in (layer.lora_A[name], layer.lora_B[name])
    )
    return layer.scaling[name] * up @ down


def lora(rank: int, projections: list[str]) -> LoraConfig:
    """LoRA of scale 1 that starts as the released code's: B zero, A normal with a standard deviation of 1 / rank."""
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=projections)
