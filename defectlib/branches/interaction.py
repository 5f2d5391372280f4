"""DualAnoDiff's SAIM: what the two rows of a pair exchange after an attention layer, position by position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pair_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention between the two rows of each pair, position by position, in closed form.

    A softmax over two logits is a sigmoid of their difference, so softmax(q K^T / sqrt(C)) V is
    v_partner + sigmoid(q (k_own - k_partner) / sqrt(C)) (v_own - v_partner).

    Args:
        query: (2 N, L, C); row i and row N + i are a pair.
        key: The same shape.
        value: The same shape.
    """
    partner_key, partner_value = (torch.roll(x, len(x) // 2, 0) for x in (key, value))
    logit = (query * (key - partner_key)).sum(-1, keepdim=True) / query.shape[-1] ** 0.5
    # Under autocast the sum comes out in float32, and lerp takes one type.
    return torch.lerp(partner_value, value, torch.sigmoid(logit).to(value.dtype))


class Interaction(nn.Module):
    """SAIM after one attention layer: what is added to its output, (2 N, L, C) to the same.

    LayerNorm, a projection, attention over the two branches at each position, a projection: 5 C^2 + 7 C parameters.

    Args:
        width: C.
        zero: Start without effect; the released code starts with random values and so disturbs the frozen model.
    """

    def __init__(self, width: int, zero: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj_in, self.query, self.key, self.value, self.proj_out = (nn.Linear(width, width) for _ in range(5))
        if zero:
            nn.init.zeros_(self.proj_out.weight)
            nn.init.zeros_(self.proj_out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the pair adds to ``hidden``."""
        entered = self.proj_in(self.norm(hidden))
        return self.proj_out(pair_attention(self.query(entered), self.key(entered), self.value(entered)))


class FoldedInteraction(nn.Module):
    """A trained :class:`Interaction` for drawing: its linear layers multiplied out, to 1.5 projections instead of 5.

    With x = LN(h), d = x_a - x_b for the rows a and b of a pair, and W the layers' weights, biases aside:
    the logit of a is x_a G d with G = W_i' W_q' W_k W_i, that of b is -x_b G d, and both rows are mixtures of B x_b and
    B d with B = W_o W_v W_i, because what a row takes of its partner is 1 - sigmoid(logit). G and B are formed once.
    """

    @torch.no_grad()
    def __init__(self, layer: Interaction) -> None:
        super().__init__()
        self.norm = layer.norm
        enter, query, key, value, leave = (
            part.weight.double() for part in (layer.proj_in, layer.query, layer.key, layer.value, layer.proj_out)
        )
        into = layer.proj_in.bias.double()
        entered_query = query @ into + layer.query.bias.double()
        out = leave @ value @ enter
        bias = leave @ (value @ into + layer.value.bias.double()) + layer.proj_out.bias.double()
        scale = enter.shape[0] ** -0.5
        tensors = {
            "of_difference": torch.cat([scale * (enter.T @ query.T @ key @ enter), out]),  # G, then B
            "of_logit": scale * (enter.T @ key.T @ entered_query),
            "of_partner": out,
            "bias": bias,
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.to(layer.proj_out.weight.dtype), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """What the pair adds to ``hidden``, (2 N, L, C)."""
        image, part = self.norm(hidden).chunk(2)
        difference = image - part
        logit, mixed = F.linear(difference, self.of_difference).chunk(2, -1)
        shared, rest = F.linear(part, self.of_partner, self.bias), difference @ self.of_logit
        own = torch.sigmoid((image * logit).sum(-1) + rest)[..., None]
        partners = torch.sigmoid((part * logit).sum(-1) + rest)[..., None]  # 1 - sigmoid of the part's own logit
        return torch.cat([shared + own * mixed, shared + partners * mixed])
