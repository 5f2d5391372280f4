"""The base model with what one set of shots trains: both branches of the UNet, and the text encoder's LoRA."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defectlib.backbone import Backbone, tokenize
from defectlib.branches.classes import OWN
from defectlib.branches.routing import lora
from defectlib.branches.unet import BranchUNet
from defectlib.training import State

PROMPTS = ("a vfx with sks", "sks")


class Dual(nn.Module):
    """The base model with what one fit trains: both branches, and the text encoder's LoRA.

    Args:
        base: Copied where it is changed.
        rank: Of all LoRA.
        seed: Of all initial weights.
        checkpointing: Compute layers again for their gradients, to save memory.
        parts: What the branches have, see :class:`BranchUNet`.
    """

    def __init__(self, base: Backbone, rank: int, seed: int, *, checkpointing: bool = False, **parts: Any) -> None:
        super().__init__()
        self.branches = BranchUNet(
            base.unet, rank, seed, num_train_timesteps=base.scheduler.config.num_train_timesteps, **parts
        )
        self.text_encoder = copy.deepcopy(base.text_encoder).requires_grad_(False)
        projections = ["q_proj", "k_proj", "v_proj", "out_proj"]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.text_encoder.add_adapter(lora(rank, projections), "text")
        self.register_buffer("tokens", tokenize(base.tokenizer, [*PROMPTS, ""]), persistent=False)
        if checkpointing:
            self.branches.unet.enable_gradient_checkpointing()
        self.to(base.device).eval()
        # In one list without names that a module cannot have; a checkpoint then holds what is trained alone.
        self.names = [name for name, value in self.named_parameters() if value.requires_grad]
        own = dict(self.named_parameters())
        self.trained = nn.ParameterList([own[name] for name in self.names])

    def text(self) -> Tensor:
        """The image's prompt, the part's, and the empty one, (3, L, D)."""
        return self.text_encoder(self.tokens)[0]

    def trained_state(self) -> State:
        """A copy on the CPU of all that is trained, by name."""
        values = (value.detach().cpu().contiguous().clone() for value in self.trained)
        return dict(zip(self.names, values, strict=True))

    def expect(self, state: State, source: Path | str = "the fit") -> None:
        """Raise ValueError where a state, from ``source``, is of another rank, other parts or another base model."""
        own = dict(zip(self.names, self.trained, strict=True))
        if {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in own.items()}:
            return
        ranks, wanted = (
            {len(value) for name, value in some.items() if ".lora_A." in name and not name.endswith(OWN)}
            for some in (state, own)
        )
        what = "other parts (SAIM, BCM, classes, gates) or another base model"
        if ranks != wanted:
            what = f"rank {', '.join(map(str, sorted(ranks)))} instead of {', '.join(map(str, wanted))}"
        raise ValueError(f"{source} was fitted with {what}: fit it anew")

    def load_trained(self, state: State, classes: Tensor | None = None) -> None:
        """Set what is trained to what :meth:`trained_state` held, ready to draw this class, see ``BranchUNet.fold``."""
        self.set_trained(state)
        self.branches.fold(classes)

    def set_trained(self, state: State) -> None:
        """Set what is trained to what :meth:`trained_state` held, ready to be trained on."""
        self.expect(state)
        self.branches.unfold()
        with torch.no_grad():
            for name, value in zip(self.names, self.trained, strict=True):
                value.copy_(state[name])
