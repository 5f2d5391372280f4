"""Two branches in one frozen UNet."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from defectlib.branches.classes import START, ClassScaled, Form, Rows, Separate
from defectlib.branches.compensation import Compensation
from defectlib.branches.gates import Gates, Schedule
from defectlib.branches.interaction import FoldedInteraction, Interaction
from defectlib.branches.routing import BRANCHES, ONE_ACTIVE, PROJECTIONS, SWITCHED_OFF, FoldedLora, Route, lora
from defectlib.branches.vera import put_vera

PASS = ("down", "mid", "up")
"""The parts of a UNet in the order of a pass; as modules they stand in another."""


class BranchProcessor(nn.Module):
    """The attention processor of one layer: compensation, the stock attention, interaction, each with its gate.

    Attributes:
        folded: What acts in the place of ``interaction`` while drawing.
        base_only: True while backgrounds go through the base model: neither module acts, and ``seen`` is noted.
        apart: True where the branches are not to interact.
        seen: The layer's input of the last background pass, where it has compensation.
        background: What compensation reads, or None.
        tau: The rows' shares of noise, (2 N,), where there are gates.
    """

    def __init__(
        self, interaction: Interaction | None, compensation: Compensation | None, gates: Gates | None = None
    ) -> None:
        super().__init__()
        self.interaction, self.compensation, self.gates = interaction, compensation, gates
        self.tau: Tensor | None = None
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
        gates = None if self.gates is None or self.base_only else self.gates(self.tau)[..., None, None]
        if self.base_only and itself and self.compensation is not None:
            self.seen = hidden_states
        elif self.background is not None and itself:
            of_background = None if gates is None else gates[0, : len(hidden_states) // 2]
            hidden_states, encoder_hidden_states = self.compensation(hidden_states, self.background, of_background)
        output = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        if not (self.base_only or self.apart or self.interaction is None):
            added = (self.folded or self.interaction)(output)
            output = output + (added if gates is None else gates[1] * added)
        return output if gates is None else gates[2] * output


class BranchUNet(nn.Module):
    """A frozen UNet with two branches; what is trained is LoRA, SAIM and BCM.

    Args:
        unet: The base model's; a copy is changed, itself it is left alone.
        rank: Of LoRA, whose scale is 1.
        seed: Of all initial weights.
        interaction: With SAIM.
        compensation: With BCM.
        released: SAIM and BCM as in the released code, where cross-attention carries an MLP that nothing reads.
        classes: How many classes have something of their own in every LoRA; 0: one LoRA for all.
        form: What they have: coefficients of shared bases ("csb", see ``ClassScaled``), a LoRA each ("separate"), or
            vectors beside frozen bases ("vera", see ``branches.vera``).
        blocks: Coefficients a class and LoRA, see ``ClassScaled``.
        start: Their standard deviation at the start.
        gates: With gates over the denoising (TDAM) of this schedule; None: without.
        num_train_timesteps: T of tau = t / T.
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
        classes: int = 0,
        blocks: int | None = None,
        start: float = START,
        form: Form = "csb",
        gates: Schedule | None = None,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        self.rows, self.classes, self.num_train_timesteps = Rows(), classes, num_train_timesteps
        self.unet = copy.deepcopy(unet).requires_grad_(False)
        self.route = Route()
        if any(m.residual_connection for m in self.unet.modules() if isinstance(m, Attention)):
            raise ValueError(
                "an attention layer of this UNet adds its own input to its output, where gates and interaction would "
                "act on it: only UNets whose attention lies in transformer blocks have branches"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # Adapters first, processors last: adding an adapter may reset processors (huggingface/diffusers#6966).
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are what is wanted
                for name in BRANCHES:
                    self.unet.add_adapter(lora(rank * (classes if form == "separate" else 1), PROJECTIONS), name)
            self.unet.set_adapter(list(BRANCHES))
            self.unet.set_attn_processor({
                f"{name}.processor": BranchProcessor(
                    Interaction(layer.query_dim, zero=not released) if interaction else None,
                    Compensation(layer.query_dim, released)
                    if compensation and (released or not layer.is_cross_attention) else None,
                    Gates(gates) if gates else None,
                )
                for name, layer in self.unet.named_modules() if isinstance(layer, Attention)
            })  # fmt: skip
        self._loras = {name: layer for name, layer in self.unet.named_modules() if isinstance(layer, LoraLayer)}
        coefficients = torch.Generator().manual_seed(seed)
        for layer in self._loras.values():
            layer.register_forward_pre_hook(self.route, with_kwargs=True)
            layer.register_forward_hook(self.route.add)
            for name in BRANCHES if classes and form == "csb" else ():
                scaled = ClassScaled(layer.lora_A[name], classes, self.rows, coefficients, blocks=blocks, start=start)
                layer.lora_A[name] = scaled
            for name in BRANCHES if classes and form == "separate" else ():
                layer.lora_A[name] = Separate(layer.lora_A[name], classes, self.rows)
        if classes and form == "vera":
            put_vera(list(self._loras.values()), rank, classes, self.rows)
        self.to(unet.device)
        self.check()

    @property
    def processors(self) -> list[BranchProcessor]:
        """Of all attention layers."""
        return [m.processor for m in self.unet.modules() if isinstance(m, Attention)]

    def gates(self) -> dict[str, Gates]:
        """Those of all attention layers that have some, by the layer's name, in the order of a pass."""
        found = {name: m.processor.gates for name, m in self.unet.named_modules() if isinstance(m, Attention)}
        order = sorted(found, key=lambda name: PASS.index(name.split("_")[0]))
        return {name: found[name] for name in order if found[name] is not None}

    def injected(self) -> dict[str, BranchProcessor]:
        """What a background is injected into: the processors of self-attention with compensation, by layer."""
        layers = ((name, m) for name, m in self.unet.named_modules() if isinstance(m, Attention))
        own = {name: m.processor for name, m in layers if not m.is_cross_attention}
        return {name: processor for name, processor in own.items() if processor.compensation is not None}

    def check(self) -> None:
        """Raise RuntimeError where a layer lost its processor, or a projection its routed LoRA, to a helper call."""
        lost = sum(not isinstance(processor, BranchProcessor) for processor in self.processors)
        routed, wanted = [m for m in self.unet.modules() if isinstance(m, LoraLayer)], 4 * len(self.processors)
        hooks = [(m._forward_pre_hooks.values(), m._forward_hooks.values()) for m in routed]
        routed = [
            m
            for m, (before, after) in zip(routed, hooks, strict=True)
            if self.route in before and self.route.add in after
        ]
        if lost or len(routed) != wanted:
            raise RuntimeError(
                f"{lost} attention layers lost their processor, {len(routed)} of {wanted} projections have routed LoRA"
            )
        if any(m.disable_adapters or m.merged for m in routed):
            raise RuntimeError(SWITCHED_OFF)
        if any(set(m.active_adapters) != set(BRANCHES) for m in routed):
            raise RuntimeError(ONE_ACTIVE)

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
        self,
        noisy: Tensor,
        timesteps: Tensor,
        text: Tensor,
        background: Sequence[Tensor] | None = None,
        classes: Tensor | None = None,
    ) -> Tensor:
        """What both branches predict, (2 N, C, h, w).

        Args:
            noisy: Latents (2 N, C, h, w), the image branch first; row i and row N + i are a pair.
            timesteps: A scalar, or (2 N,).
            text: (2 N, L, D).
            background: What :meth:`background_features` returned for M backgrounds; N is a multiple of M, and they
                repeat as a whole.
            classes: Of the pairs, (N,) or (N, K), see ``Rows``; None: what all classes share.

        Raises:
            ValueError: The branches have BCM and no background is given, or the other way round; the rows are odd; or
                the classes are not one of each pair, or unknown.
        """
        if len(noisy) % 2:
            raise ValueError(
                f"{len(noisy)} rows are no pairs: give the image branch's, then as many of the part branch"
            )
        if not all(isinstance(processor, BranchProcessor) for processor in self.processors):
            self.check()  # before the forward pass, which needs their attributes
        reading = list(self.injected().values())
        if len(background or []) != len(reading):
            raise ValueError("a background is given exactly where the branches are fitted with background compensation")
        for processor, seen in zip(reading, background or [], strict=True):
            processor.background = seen  # kept after the call: gradient checkpointing computes the layer again
        if classes is not None:
            self._check(classes, len(noisy) // 2)
        self.rows.classes = classes  # kept as well
        tau = timesteps.to(noisy.device).expand(len(noisy)) / self.num_train_timesteps
        for processor in self.processors:
            processor.tau = tau
        self.route.calls = 0
        predicted = self.unet(noisy, timesteps, text).sample
        if self.route.calls < len(self._loras):
            self.check()
            raise RuntimeError(f"{self.route.calls} of {len(self._loras)} projections routed their rows by branch")
        return predicted

    def _check(self, classes: Tensor, pairs: int) -> None:
        """Raise ValueError where a class would be taken for another, or one for all pairs."""
        if classes.shape not in ((pairs,), (pairs, self.classes)):
            wanted = f"({pairs},) or ({pairs}, {self.classes}) for {pairs} pairs and {self.classes} classes"
            raise ValueError(f"classes must be {wanted}, got {tuple(classes.shape)}")
        if classes.ndim == 1 and not (classes.min() >= 0 and classes.max() < self.classes):
            raise ValueError(f"classes must lie in 0 to {self.classes - 1}, got {classes.tolist()}")

    @torch.no_grad()
    def fold(self, classes: Tensor | None = None) -> None:
        """Multiply out what is constant while drawing; trained values that change later are not seen.

        Args:
            classes: The one class of all that is drawn, (1,) or (1, K); None: what all classes share.

        Raises:
            ValueError: It is not one class, or unknown.
        """
        self.check()
        if classes is not None:
            self._check(classes, 1)
        for name, layer in self._loras.items():
            self.unet.set_submodule(name, FoldedLora(layer, self.route, classes))
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
        """How many parameters LoRA, SAIM and BCM have, and where they are there a class's own (CSB, VeRA) and TDAM."""
        parts = {
            "LoRA": ".lora_", "SAIM": ".interaction.", "BCM": ".compensation.", "CSB": ".departure",
            "VeRA": ".vectors", "TDAM": ".gates.",
        }  # fmt: skip
        found = {
            part: sum(value.numel() for name, value in self.named_parameters() if key in name)
            for part, key in parts.items()
        }
        found["LoRA"] -= found["CSB"] + found["VeRA"]
        return {part: n for part, n in found.items() if n or part in ("LoRA", "SAIM", "BCM")}
