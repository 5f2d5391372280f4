"""A base model's UNet brought closer to a category by its many normal images.

:func:`adapt` does it by LoRA (peft), as a part of a method's fit. AdaBLDM's scheme fine-tunes the base on the data set
before its ControlNet is trained (absent from its released code); DefectSynth does not. Low rank keeps what is stored
small: 13 MB for Stable Diffusion 1.5 at rank 16, not 3.4 GB.

:func:`to_objects` trains all of the UNet, for methods that draw whole images: their papers start from a model that
knows most objects, and the small one does not. It is no part of a method's fit, and serves all of a category.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from defectlib import diffusion, paths
from defectlib.backbone import Backbone
from defectlib.branches.dual import PROMPTS
from defectlib.branches.routing import PROJECTIONS
from defectlib.images import TURNS
from defectlib.profiles import AdaptSettings
from defectlib.training import Curve, FitSettings, State, digest, fit, once

ADAPTER = "adapter.safetensors"
OBJECT = PROMPTS[0].removesuffix(f" with {PROMPTS[1]}")
# Prompt, whether it is told of the image or of its anomaly part, which is grey all over, and its share of the training.
# Guidance leads away from what no prompt draws: were that images alone, the ground of parts would not stay grey.
TOLD = ((OBJECT, "image", 0.6), (PROMPTS[1], "part", 0.2), ("", "image", 0.1), ("", "part", 0.1))


def _with_lora(unet: UNet2DConditionModel, rank: int, seed: int) -> UNet2DConditionModel:
    """A copy with trainable LoRA on every attention projection; it draws as before until trained."""
    copied = copy.deepcopy(unet)
    projections = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        copied.add_adapter(projections)
    return copied


def _merged(base: Backbone, unet: UNet2DConditionModel) -> Backbone:
    """The base model with the adapted UNet, its LoRA added into the projections: a plain UNet again."""
    unet.fuse_lora()
    unet.unload_lora()
    return replace(base, unet=unet.eval().requires_grad_(False))


def adapt(
    base: Backbone, images: Tensor, prompt: str, settings: FitSettings, *, rank: int, seed: int, folder: Path
) -> tuple[Backbone, State, Curve]:
    """Train LoRA on defect-free images by the base's own loss; the base model itself is left alone.

    Args:
        base: The model to start from.
        images: float32 (N, 3, H, W) in [-1, 1].
        prompt: Their text.
        settings: Of the fit loop.
        rank: Of LoRA.
        seed: Of its initial weights and of the fit.
        folder: Where checkpoints go.

    Returns:
        The adapted model, what :func:`restore` needs to make it again, and the loss curve. The last two are kept in
        ``folder``, so that a run that is killed later does not adapt anew.
    """
    asked = [base.digest, digest([images]), prompt, settings.model_dump(), rank, seed]

    def train(checkpoints: Path) -> tuple[State, Curve]:
        unet = _with_lora(base.unet, rank, seed)
        latents, text = base.encode(images), base.embed([prompt])

        def loss(items: Tensor, generator: torch.Generator) -> Tensor:
            noisy, timesteps, target = diffusion.noised(latents[items], base.scheduler, generator)
            predicted = unet(noisy, timesteps, text.expand(len(items), -1, -1)).sample
            return (predicted.float() - target).square().mean()

        curve = fit(unet, loss, len(latents), settings, seed=seed, folder=checkpoints)
        return {name: value.detach().cpu().clone() for name, value in get_peft_model_state_dict(unet).items()}, curve

    adapter, curve = once(folder / ADAPTER, asked, train)
    return restore(base, adapter), adapter, curve


class Adapting(Protocol):
    """The fields of a method's configuration that say how its base model is adapted."""

    adapt_steps: int
    adapt_rank: int
    adapt_learning_rate: float
    train_batch_size: int
    precision: Literal["no", "bf16"]


def to_normals(
    base: Backbone, normals: Sequence[Tensor], category: str, config: Adapting, *, seed: int, folder: Path
) -> tuple[Backbone, State]:
    """A base model that has seen a category's normal images (3, H, W), as "a <category>"; arguments as :func:`adapt`.

    Returns:
        The adapted model, and what :func:`restore` needs to make it again.
    """
    settings = FitSettings(
        steps=config.adapt_steps, batch_size=config.train_batch_size, learning_rate=config.adapt_learning_rate,
        precision=config.precision,
    )  # fmt: skip
    prompt = f"a {category}".replace("_", " ")
    return adapt(base, torch.stack(list(normals)), prompt, settings, rank=config.adapt_rank, seed=seed, folder=folder)[
        :2
    ]


def restore(base: Backbone, adapter: State) -> Backbone:
    """The adapted model that :func:`adapt` returned with this adapter, from the same base.

    Raises:
        ValueError: The adapter is of a UNet of another shape.
    """
    rank = next(value.shape[0] for name, value in adapter.items() if ".lora_A" in name)
    unet = _with_lora(base.unet, rank, seed=0)
    wanted = {name: value.shape for name, value in get_peft_model_state_dict(unet).items()}
    if wanted != {name: value.shape for name, value in adapter.items()}:
        raise ValueError(f"the adapter was trained on another UNet than that of '{base.name}': fit it anew")
    set_peft_model_state_dict(unet, adapter)
    return _merged(base, unet)


def write(adapter: State, folder: Path) -> None:
    """Keep an adapter with a method's model; an empty one is none."""
    if adapter:
        paths.write_bytes(folder / ADAPTER, safetensors.torch.save(adapter))


def read(folder: Path, base: Backbone, config: Adapting) -> tuple[Backbone, State]:
    """The model that a method draws with, and its adapter: the base itself where the configuration adapts none."""
    if not config.adapt_steps:
        return base, {}
    adapter = safetensors.torch.load_file(folder / ADAPTER)
    return restore(base, adapter), adapter


def recipe(asked: AdaptSettings) -> dict[str, Any]:
    """All that :func:`to_objects` does with these settings, as JSON values: fits that start from it depend on it."""
    settings = FitSettings(
        steps=asked.steps, batch_size=asked.batch_size, learning_rate=asked.learning_rate, schedule="cosine"
    )
    return {"fit": settings.model_dump(), "flips": asked.flips, "told": TOLD}


def to_objects(base: Backbone, images: Tensor, asked: AdaptSettings, folder: Path) -> Backbone:
    """A base model all of whose UNet was trained on with normal images, by its own loss and the prompts of ``TOLD``.

    What was trained is kept in ``folder``, by all that it depends on: seeds and methods that start from it share one.

    Args:
        base: The model to start from; it is left alone.
        images: float32 (N, 3, H, W) in [-1, 1], without defects.
        asked: How long and at which rate; the rate falls to zero as a cosine.
        folder: Where it is kept, and where a killed training goes on.

    Returns:
        The model; its ``digest`` is of its weights.

    Raises:
        ValueError: The base cannot read images of this size, or the file that was kept is cut off.
    """
    base.latent_shape(images.shape[-1])
    depends = [base.digest, digest([images]), recipe(asked)]
    name = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:12]
    file = folder / f"{name}.safetensors"

    def train(checkpoints: Path) -> tuple[State, Curve]:
        unet = copy.deepcopy(base.unet).requires_grad_(True)
        turns = TURNS if asked.flips else TURNS[:1]
        latents = base.encode(torch.cat([images.flip(turn) for turn in turns]))
        prompts, pictures, shares = zip(*TOLD, strict=True)
        grey, text = base.encode(torch.zeros_like(images[:1])), base.embed(prompts)
        of_part = torch.tensor([picture == "part" for picture in pictures])

        def loss(items: Tensor, generator: torch.Generator) -> Tensor:
            told = torch.multinomial(torch.tensor(shares), len(items), replacement=True, generator=generator)
            clean = torch.where(of_part[told, None, None, None].to(base.device), grey, latents[items])
            noisy, timesteps, target = diffusion.noised(clean, base.scheduler, generator)
            return (unet(noisy, timesteps, text[told]).sample.float() - target).square().mean()

        curve = fit(unet, loss, len(latents), FitSettings(**recipe(asked)["fit"]), seed=0, folder=checkpoints)
        return {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}, curve

    with paths.locked(folder / f".{name}.lock"):  # jobs of several methods ask for one
        state, _ = once(file, depends, train)
    unet = copy.deepcopy(base.unet)
    unet.load_state_dict(state)
    weights = digest(state[key] for key in sorted(state))
    return replace(base, unet=unet, digest=hashlib.sha256(f"{base.digest}{weights}".encode()).hexdigest())
