"""What the small base model is trained on, for how long, and how."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from defectlib import diffusion, images, paths
from defectlib.backbone import tokenize
from defectlib.data import world
from defectlib.pretrain import parts
from defectlib.training import FitSettings, Loss, fit

WORLD = 24_000
HELD_OUT = 512
CELL = 4
WARM_FIT = FitSettings(
    steps=1000, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=50, weight_decay=1e-4,
    precision="bf16", save_every=250,
)  # fmt: skip
VAE_FIT = FitSettings(
    steps=4500, batch_size=16, learning_rate=8e-4, schedule="cosine", warmup=100, weight_decay=1e-4,
    precision="bf16", save_every=250,
)  # fmt: skip
VAE_LAST_FIT = FitSettings(
    steps=2000, batch_size=16, learning_rate=5e-4, schedule="cosine", warmup=100, weight_decay=1e-4, save_every=250
)
KL_WEIGHT, SQUARED = 1e-4, 10.0
UNET_WARM_FIT = FitSettings(
    steps=6000, batch_size=32, learning_rate=1e-3, schedule="cosine", warmup=300, weight_decay=0.01, ema=0.999,
    precision="bf16", save_every=500,
)  # fmt: skip
UNET_FIT = FitSettings(
    steps=4500, batch_size=32, learning_rate=8e-4, schedule="cosine", warmup=200, weight_decay=0.01, ema=0.999,
    precision="bf16", save_every=250,
)  # fmt: skip
UNET_LAST_FIT = FitSettings(
    steps=17700, batch_size=32, learning_rate=8e-4, schedule="cosine", warmup=200, weight_decay=0.01, ema=0.999,
    precision="bf16", save_every=250,
)  # fmt: skip
NO_PROMPT = 0.2
# Between these timesteps forms take shape: at lower ones all is clear, at higher ones little more than the mean tone is
# left. Half of the items are drawn from there, the others from all.
FORMS = (150, 650)

Progress = Callable[[int, float], None] | None


def _chunk(seed: int, start: int, n: int) -> tuple[np.ndarray, list[str]]:
    torch.set_num_threads(1)
    pictures = world.pool(n, seed, start)
    pixels = np.stack([images.to_uint8(p.image) for p in pictures])
    return pixels.transpose(0, 3, 1, 2), [p.prompt for p in pictures]


def world_images(n: int, seed: int, folder: Path) -> tuple[Tensor, list[str]]:
    """``n`` pictures of the world, uint8 (n, 3, 64, 64), and their prompts; drawn once, kept in ``folder``."""
    pixels, prompts = folder / f"world-{seed}-{n}.npy", folder / f"world-{seed}-{n}.txt"
    if not prompts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, n, 1000)
        with ProcessPoolExecutor(2) as workers:
            drawn = list(workers.map(_chunk, [seed] * len(starts), starts, [min(1000, n - s) for s in starts]))
        with open(pixels, "wb") as file:
            np.save(file, np.concatenate([part[0] for part in drawn]))
        paths.write_text(prompts, "\n".join(line for part in drawn for line in part[1]))
    return torch.from_numpy(np.load(pixels)), prompts.read_text().split("\n")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped and turned by a multiple of 90 degrees at random."""
    code = torch.randint(8, (len(pixels),), generator=generator).tolist()
    return torch.stack([torch.rot90(p.flip(-1) if c & 4 else p, c % 4, (-2, -1)) for p, c in zip(pixels, code)])


def _timesteps(n: int, generator: torch.Generator) -> Tensor:
    """Timesteps int64 (n,), half of them in ``FORMS``."""
    every, forms = (torch.randint(*span, (n,), generator=generator) for span in ((0, 1000), FORMS))
    return torch.where(torch.rand(n, generator=generator) < 0.5, every, forms)


class Components:
    """The first principal components of 4 x 4 px blocks, as latents of unit variance: (N, 3, H, W) -> (N, C, h, w)."""

    def __init__(self, images: Tensor):
        blocks = self._blocks(images)
        self.mean = blocks.mean(0)
        _, values, axes = torch.linalg.svd(blocks - self.mean, full_matrices=False)
        self.axes = axes[: parts.LATENT_CHANNELS] * len(blocks) ** 0.5 / values[: parts.LATENT_CHANNELS, None]

    @staticmethod
    def _blocks(images: Tensor) -> Tensor:
        return F.unfold(images, CELL, stride=CELL).transpose(1, 2).flatten(0, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """The latents (N, C, h, w) of images (N, 3, H, W) in [-1, 1]."""
        rows = (self._blocks(images) - self.mean) @ self.axes.T
        side = images.shape[-1] // CELL
        return rows.view(len(images), side, side, parts.LATENT_CHANNELS).permute(0, 3, 1, 2)


def phase(
    model: nn.Module,
    loss: Loss,
    n: int,
    settings: FitSettings,
    seed: int,
    folder: Path,
    progress: Progress,
    before: int = 0,
) -> list[tuple[int, float]]:
    """A fit whose end is kept beside ``folder``, so that a later one that is killed does not repeat it.

    Returns:
        Its curve, counted from the ``before`` steps that went before.

    Raises:
        ValueError: What lies there was made with other settings, another seed or other pictures.
    """
    done, asked = folder.with_suffix(".safetensors"), {"settings": settings.model_dump(), "seed": seed, "pictures": n}
    if not done.is_file():
        curve = fit(model, loss, n, settings, seed=seed, folder=folder, progress=progress)
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        described = {"curve": json.dumps(curve), "asked": json.dumps(asked)}
        paths.write_bytes(done, safetensors.torch.save(state, metadata=described))
        paths.remove(folder)
    with safe_open(done, "pt") as file:
        known = file.metadata()
    if json.loads(known["asked"]) != asked:
        raise ValueError(f"{done} was trained with other settings: delete {folder.parent} to train anew")
    model.load_state_dict(safetensors.torch.load_file(done))
    model.eval()
    return [(before + step, value) for step, value in json.loads(known["curve"])]


def train_vae(
    pixels: Tensor, seed: int, folder: Path, device: str, progress: Progress = None
) -> tuple[AutoencoderKL, list[tuple[int, float]]]:
    """Fit the autoencoder: a warm start on principal components, then encoder and decoder together.

    From random weights the first component (the blocks' mean tone) drowns the others: after 2,500 steps colour was not
    yet coded. So the encoder first learns the leading components of 4 x 4 px blocks, and the decoder to invert
    them; then both minimise L1 of a sampled reconstruction plus ``KL_WEIGHT`` times the mean KL a latent element, and
    at last ``SQUARED`` times its squared error, which weighs about as much, in place of L1.

    Returns:
        The autoencoder, its ``scaling_factor`` one over the latents' standard deviation, and the curve of both parts.
    """
    # Channels last is a sixth faster on a CPU.
    vae = parts.new_vae(seed).to(device, memory_format=torch.channels_last)
    components = Components(to_float(pixels[:1000]).to(device))

    def batch(items: Tensor, generator: torch.Generator) -> Tensor:
        return to_float(_augmented(pixels[items], generator)).to(device)

    def warm(items: Tensor, generator: torch.Generator) -> Tensor:
        shown = batch(items, generator)
        latents = components(shown)
        known = (vae.encode(shown).latent_dist.mean.float() - latents).square().mean()
        return known + (vae.decode(latents).sample.float() - shown).abs().mean()

    def joint(distance: Callable[[Tensor], Tensor]) -> Loss:
        def loss(items: Tensor, generator: torch.Generator) -> Tensor:
            shown = batch(items, generator)
            posterior = vae.encode(shown).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
            kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
            return distance(decoded.float() - shown).mean() + KL_WEIGHT * kl

        return loss

    n, before, squared = len(pixels), WARM_FIT.steps + VAE_FIT.steps, joint(lambda error: SQUARED * error.square())
    curve = [
        *phase(vae, warm, n, WARM_FIT, seed, folder / "vae-warm", progress),
        *phase(vae, joint(torch.abs), n, VAE_FIT, seed, folder / "vae-fit", progress, WARM_FIT.steps),
        *phase(vae, squared, n, VAE_LAST_FIT, seed + 1, folder / "vae-last", progress, before),
    ]
    with torch.no_grad():
        std = vae.encode(to_float(pixels[:1000]).to(device)).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(float(1 / std), 4))
    return vae, curve


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Tensor, file: Path) -> Tensor:
    """Scaled posterior means (n, C, h, w), encoded once and kept in ``file``."""
    if not file.is_file():
        means = [vae.encode(to_float(part).to(vae.device)).latent_dist.mean.cpu() for part in pixels.split(64)]
        latents = torch.cat(means) * vae.config.scaling_factor
        paths.write_bytes(file, safetensors.torch.save({"latents": latents.contiguous()}))
    return safetensors.torch.load_file(file)["latents"]


def train_unet(
    latents: Tensor,
    tokens: Tensor,
    tokenizer: CLIPTokenizer,
    seed: int,
    folder: Path,
    device: str,
    progress: Progress = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel, list[tuple[int, float]]]:
    """Fit UNet and text encoder together, the prompt left out in a share of ``NO_PROMPT`` of the items.

    The warm start predicts noise under Stable Diffusion's schedule, at uniform timesteps. The fit goes on with the
    schedule and the target that the model ships with, see ``parts.new_scheduler``, half of its timesteps in ``FORMS``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.ModuleDict({"unet": parts.new_unet(), "text_encoder": parts.new_text_encoder(tokenizer)}).to(device)
    if (
        device == "cpu"
    ):  # in bfloat16 the backward pass of torch's fused attention is slow there: 0.50 s a step, or 0.35
        model["unet"].set_attn_processor(AttnProcessor())
    empty = tokenize(tokenizer, [""])

    def under(schedule: DDIMScheduler, forms: bool) -> Loss:
        def loss(items: Tensor, generator: torch.Generator) -> Tensor:
            chosen = _timesteps(len(items), generator) if forms else None
            noisy, timesteps, target = diffusion.noised(latents[items].to(device), schedule, generator, chosen)
            dropped = torch.rand(len(items), generator=generator) < NO_PROMPT
            hidden = model["text_encoder"](torch.where(dropped[:, None], empty, tokens[items]).to(device))[0]
            return (model["unet"](noisy, timesteps, hidden).sample.float() - target).square().mean()

        return loss

    before = UNET_WARM_FIT.steps + UNET_FIT.steps
    n, warm, final = len(latents), under(diffusion.sd_scheduler(), False), under(parts.new_scheduler(), True)
    curve = [
        *phase(model, warm, n, UNET_WARM_FIT, seed, folder / "unet-warm", progress),
        *phase(model, final, n, UNET_FIT, seed, folder / "unet-fit", progress, UNET_WARM_FIT.steps),
        *phase(model, final, n, UNET_LAST_FIT, seed + 1, folder / "unet-last", progress, before),
    ]
    model["unet"].set_default_attn_processor()
    return model["unet"], model["text_encoder"], curve
