"""DualAnoDiff's two branches in one UNet: LoRA routed by branch, interaction (SAIM), background compensation (BCM).

A batch holds the rows of the image branch first, then as many rows of the part branch. Both go through one frozen UNet
in one pass: every attention projection adds the LoRA of the row's own branch, after every attention layer the two rows
of a pair exchange what they hold at the same position (SAIM), and the self-attention of image rows may read a
background (BCM).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]
BRANCHES = ("image", "part")
BASE = "__base__"
"""peft's name for a row that takes no LoRA."""


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


class Route:
    """A forward pre-hook of every LoRA layer: each row takes the LoRA of its branch.

    Without it peft would add up both branches' in every row.

    Attributes:
        base_only: True while backgrounds pass: no row takes any.
    """

    base_only = False

    def __call__(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        """Hand peft the names of the rows' adapters, the first half's "image", the second half's "part"."""
        rows = len(arguments[0])
        names = [BASE] * rows if self.base_only else [name for name in BRANCHES for _ in range(rows // 2)]
        return arguments, named | {"adapter_names": names}


class FoldedLora(nn.Module):
    """A projection for drawing, its LoRA added to the weights of each branch."""

    @torch.no_grad()
    def __init__(self, layer: LoraLayer, route: Route) -> None:
        super().__init__()
        self.layer, self.route = layer, route
        base = layer.get_base_layer()
        weights = torch.stack([base.weight + layer.get_delta_weight(name) for name in BRANCHES])
        self.register_buffer("weights", weights.transpose(1, 2).contiguous(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Rows (2 N, L, C), the image branch first; all by the base's weights while backgrounds pass."""
        base = self.layer.get_base_layer()
        if self.route.base_only:
            return base(hidden)
        bias = torch.zeros((), dtype=hidden.dtype, device=hidden.device) if base.bias is None else base.bias
        projected = torch.baddbmm(bias, hidden.unflatten(0, (2, -1)).flatten(1, 2), self.weights)
        return projected.view(*hidden.shape[:-1], -1)


class Compensation(nn.Module):
    """BCM before one self-attention: a background's input z_b to the same layer joins that of the image branch.

    The paper's form gives the layer phi(z) + gamma MLP(phi(z_b)), gamma learned from 0.1. The released code gives its
    keys and values alone (1 - gamma) z + gamma MLP(z_b), gamma learned from 0, its MLP without the ReLU between.

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

    def forward(self, hidden: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
        """What queries and what keys and values are made of, each (2 N, L, C).

        Args:
            hidden: The layer's input, (2 N, L, C); the second half, the part branch, is left as it is.
            background: z_b, (M, L, C) with N a multiple of M; they repeat as a whole.
        """
        image, part = hidden.chunk(2)
        added = self.gamma * self.mlp(background).repeat(len(image) // len(background), 1, 1)
        if self.released:
            return hidden, torch.cat([(1 - self.gamma) * image + added, part])
        joined = torch.cat([image + added, part])
        return joined, joined


class BranchProcessor(nn.Module):
    """The attention processor of one layer: compensation, the stock attention, interaction.

    Attributes:
        folded: What acts in the place of ``interaction`` while drawing.
        base_only: True while backgrounds go through the base model: neither module acts, and ``seen`` is noted.
        apart: True where the branches are not to interact.
        seen: The layer's input of the last background pass, where it has compensation.
        background: What compensation reads, or None.
    """

    def __init__(self, interaction: Interaction | None, compensation: Compensation | None) -> None:
        super().__init__()
        self.interaction, self.compensation = interaction, compensation
        self.folded: FoldedInteraction | None = None
        self.base_only, self.apart, self.seen, self.background = False, False, None, None

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``hidden_states`` (2 N, L, C) to itself or to the text."""
        itself = encoder_hidden_states is None
        if self.base_only and itself and self.compensation is not None:
            self.seen = hidden_states
        elif self.background is not None and itself:
            hidden_states, encoder_hidden_states = self.compensation(hidden_states, self.background)
        output = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if self.base_only or self.apart or self.interaction is None:
            return output
        return output + (self.folded or self.interaction)(output)


def lora(rank: int, projections: list[str]) -> LoraConfig:
    """LoRA of scale 1 that starts as the released code's: B zero, A normal with a standard deviation of 1 / rank."""
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=projections)


class BranchUNet(nn.Module):
    """A frozen UNet with two branches; what is trained is LoRA, SAIM and BCM.

    Args:
        unet: The base model's; a copy is changed, itself it is left alone.
        rank: Of LoRA, whose scale is 1.
        seed: Of all initial weights.
        interaction: With SAIM.
        compensation: With BCM.
        released: SAIM and BCM as in the released code, where cross-attention carries an MLP that nothing reads.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        rank: int,
        seed: int,
        *,
        interaction: bool = True,
        compensation: bool = False,
        released: bool = False,
    ) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet).requires_grad_(False)
        self.route = Route()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Adapters first, processors last: adding an adapter may reset processors (huggingface/diffusers#6966).
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what is wanted
                for name in BRANCHES:
                    self.unet.add_adapter(lora(rank, PROJECTIONS), name)
            self.unet.set_adapter(list(BRANCHES))
            self.unet.set_attn_processor({
                f"{name}.processor": BranchProcessor(
                    Interaction(layer.query_dim, zero=not released) if interaction else None,
                    Compensation(layer.query_dim, released)
                    if compensation and (released or not layer.is_cross_attention) else None,
                )
                for name, layer in self.unet.named_modules() if isinstance(layer, Attention)
            })  # fmt: skip
        self._loras = {name: layer for name, layer in self.unet.named_modules() if isinstance(layer, LoraLayer)}
        for layer in self._loras.values():
            layer.register_forward_pre_hook(self.route, with_kwargs=True)
        self.to(unet.device)
        self.check()

    @property
    def processors(self) -> list[BranchProcessor]:
        """Of all attention layers."""
        return [m.processor for m in self.unet.modules() if isinstance(m, Attention)]

    def check(self) -> None:
        """Raise RuntimeError where a layer lost its processor, or a projection its routed LoRA, to a helper call."""
        lost = sum(not isinstance(processor, BranchProcessor) for processor in self.processors)
        routed, wanted = [m for m in self.unet.modules() if isinstance(m, LoraLayer)], 4 * len(self.processors)
        routed = [m for m in routed if self.route in m._forward_pre_hooks.values()]
        if lost or len(routed) != wanted:
            raise RuntimeError(
                f"{lost} attention layers lost their processor, {len(routed)} of {wanted} projections have routed LoRA"
            )
        if any(set(m.active_adapters) != set(BRANCHES) for m in routed):
            raise RuntimeError("one branch's LoRA is not active: it would be frozen, and left out of the prediction")

    @torch.no_grad()
    def background_features(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> list[Tensor]:
        """The self-attention inputs of backgrounds in the frozen base model, for BCM.

        Args:
            latents: Noisy latents of M backgrounds, (M, C, h, w).
            timesteps: A scalar, or (M,).
            text: (M, L, D).

        Returns:
            (M, L, C) for each layer that has compensation and is no cross-attention, in their order.
        """
        self._set(base_only=True)
        try:
            self.unet(latents, timesteps, text)
            return [processor.seen for processor in self.processors if processor.seen is not None]
        finally:
            self._set(base_only=False)

    def _set(self, *, base_only: bool) -> None:
        self.route.base_only = base_only
        for processor in self.processors:
            processor.base_only, processor.seen, processor.background = base_only, None, None

    def forward(
        self, noisy: Tensor, timesteps: Tensor, text: Tensor, background: Sequence[Tensor] | None = None
    ) -> Tensor:
        """What both branches predict, (2 N, C, h, w).

        Args:
            noisy: Latents (2 N, C, h, w), the image branch first; row i and row N + i are a pair.
            timesteps: A scalar, or (2 N,).
            text: (2 N, L, D).
            background: What :meth:`background_features` returned for M backgrounds; N is a multiple of M, and they
                repeat as a whole.

        Raises:
            ValueError: The branches have BCM and no background is given, or the other way round; or the rows are odd.
        """
        if len(noisy) % 2:
            raise ValueError(
                f"{len(noisy)} rows are no pairs: give the image branch's, then as many of the part branch"
            )
        if not all(isinstance(processor, BranchProcessor) for processor in self.processors):
            self.check()
        reading = [p for m in self.unet.modules() if isinstance(m, Attention) and not m.is_cross_attention
                   for p in [m.processor] if p.compensation is not None]  # fmt: skip
        if len(background or []) != len(reading):
            raise ValueError("a background is given exactly where the branches are fitted with background compensation")
        for processor, seen in zip(reading, background or [], strict=True):
            processor.background = seen  # kept after the call: gradient checkpointing computes the layer again
        return self.unet(noisy, timesteps, text).sample

    def fold(self) -> None:
        """Multiply out what is constant while drawing; trained values that change later are not seen."""
        self.check()
        for name, layer in self._loras.items():
            self.unet.set_submodule(name, FoldedLora(layer, self.route))
        for processor in self.processors:
            if processor.interaction is not None:
                processor.folded = FoldedInteraction(processor.interaction)

    def unfold(self) -> None:
        """Back to the layers that are trained."""
        for name, layer in self._loras.items():
            self.unet.set_submodule(name, layer)
        for processor in self.processors:
            processor.folded = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Within it the branches do not interact."""
        try:
            for processor in self.processors:
                processor.apart = True
            yield
        finally:
            for processor in self.processors:
                processor.apart = False

    def counts(self) -> dict[str, int]:
        """How many parameters LoRA, SAIM and BCM have."""
        parts = {"LoRA": ".lora_", "SAIM": ".interaction.", "BCM": ".compensation."}
        return {
            part: sum(value.numel() for name, value in self.named_parameters() if key in name)
            for part, key in parts.items()
        }
