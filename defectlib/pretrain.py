"""How the shipped ``tiny`` base model is made: a VAE, then a text-conditioned UNet, on the generated world.

``make backbone`` runs all of it: some two hours on two cores, minutes on a GPU. Each part goes on from its last
checkpoint when the command is repeated. Nothing of ``mini`` is trained on.

The parts have Stable Diffusion 1.5's classes, schedule (scaled linear beta, eps-prediction, no clipping) and folder
layout; only sizes differ, so every method runs on either without a branch.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from defectlib import backbone, paths
from defectlib.backbone import WEIGHT_FILES, Backbone, tokenize
from defectlib.data import mini, world
from defectlib.diffusion import denoise, noise_like, sd_scheduler
from defectlib.training import FitSettings, fit

WORLD = 24_000
HELD_OUT = 512
# Twelve numbers a block keep, already as plain principal components, the grain of gravel that eight blur away.
LATENT_CHANNELS, CELL = 12, 4
WARM_FIT = FitSettings(
    steps=1000, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=50, weight_decay=1e-4,
    precision="bf16", save_every=250,
)  # fmt: skip
VAE_FIT = FitSettings(
    steps=4500, batch_size=16, learning_rate=8e-4, schedule="cosine", warmup=100, weight_decay=1e-4,
    precision="bf16", save_every=250,
)  # fmt: skip
KL_WEIGHT = 1e-4
UNET_FIT = FitSettings(
    steps=6000, batch_size=32, learning_rate=1e-3, schedule="cosine", warmup=300, weight_decay=0.01, ema=0.999,
    precision="bf16", save_every=500,
)  # fmt: skip
TEXT_LENGTH, TEXT_WIDTH = 48, 128
NO_PROMPT, SPELT = 0.1, 0.15
RARE_WORDS = ("vfx", "sks")


def _chunk(seed: int, start: int, n: int) -> tuple[np.ndarray, list[str]]:
    torch.set_num_threads(1)
    pictures = world.pool(n, seed, start)
    pixels = np.stack([((p.image.numpy() + 1) * 127.5).round().astype(np.uint8) for p in pictures])
    return pixels, [p.prompt for p in pictures]


def world_images(n: int, seed: int, folder: Path) -> tuple[Tensor, list[str]]:
    """``n`` pictures of the world, uint8 (n, 3, 64, 64), and their prompts; drawn once, kept in ``folder``."""
    pixels, prompts = folder / f"world-{seed}-{n}.npy", folder / f"world-{seed}-{n}.txt"
    if not prompts.exists():
        folder.mkdir(parents=True, exist_ok=True)
        starts = range(0, n, 1000)
        with ProcessPoolExecutor(2) as workers:
            parts = list(workers.map(_chunk, [seed] * len(starts), starts, [min(1000, n - s) for s in starts]))
        with open(pixels, "wb") as file:
            np.save(file, np.concatenate([part[0] for part in parts]))
        paths.write_text(prompts, "\n".join(line for part in parts for line in part[1]))
    return torch.from_numpy(np.load(pixels)), prompts.read_text().split("\n")


def to_float(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]: 10 log10(4 / MSE), the MSE over all pixels."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def _augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image flipped and turned by a multiple of 90 degrees at random."""
    code = torch.randint(8, (len(pixels),), generator=generator).tolist()
    return torch.stack([torch.rot90(p.flip(-1) if c & 4 else p, c % 4, (-2, -1)) for p, c in zip(pixels, code)])


def new_vae(seed: int) -> AutoencoderKL:
    """The untrained autoencoder: factor 4, 64 px to (12, 16, 16)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, sample_size=world.SIZE,
            block_out_channels=(32, 64, 96), layers_per_block=1, norm_num_groups=8, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        )  # fmt: skip
    with torch.no_grad():  # start with a posterior so narrow that its noise hides nothing
        vae.quant_conv.weight[LATENT_CHANNELS:] = 0
        vae.quant_conv.bias[LATENT_CHANNELS:] = -6
    return vae


class Components:
    """The first principal components of 4 x 4 px blocks, as latents of unit variance: (N, 3, H, W) -> (N, C, h, w)."""

    def __init__(self, images: Tensor):
        blocks = self._blocks(images)
        self.mean = blocks.mean(0)
        _, values, axes = torch.linalg.svd(blocks - self.mean, full_matrices=False)
        self.axes = axes[:LATENT_CHANNELS] * len(blocks) ** 0.5 / values[:LATENT_CHANNELS, None]

    @staticmethod
    def _blocks(images: Tensor) -> Tensor:
        return F.unfold(images, CELL, stride=CELL).transpose(1, 2).flatten(0, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """The latents (N, C, h, w) of images (N, 3, H, W) in [-1, 1]."""
        rows = (self._blocks(images) - self.mean) @ self.axes.T
        side = images.shape[-1] // CELL
        return rows.view(len(images), side, side, LATENT_CHANNELS).permute(0, 3, 1, 2)


def train_vae(
    pixels: Tensor, seed: int, folder: Path, progress: Callable[[int, float], None] | None = None
) -> tuple[AutoencoderKL, list[tuple[int, float]]]:
    """Fit the autoencoder: a warm start on principal components, then encoder and decoder together.

    From random weights the first component (the blocks' mean tone) drowns the others: after 2,500 steps colour was not
    yet coded. So the encoder first learns the leading components of 4 x 4 px blocks, and the decoder to invert
    them; then both minimise L1 of a sampled reconstruction plus ``KL_WEIGHT`` times the mean KL a latent element.

    Returns:
        The autoencoder, its ``scaling_factor`` one over the latents' standard deviation, and the curve of both parts.
    """
    vae = new_vae(seed)
    components = Components(to_float(pixels[:1000]))

    def warm(items: Tensor, generator: torch.Generator) -> Tensor:
        images = to_float(_augmented(pixels[items], generator))
        latents = components(images)
        known = (vae.encode(images).latent_dist.mean.float() - latents).square().mean()
        return known + (vae.decode(latents).sample.float() - images).abs().mean()

    def joint(items: Tensor, generator: torch.Generator) -> Tensor:
        images = to_float(_augmented(pixels[items], generator))
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return (decoded.float() - images).abs().mean() + KL_WEIGHT * kl

    started = fit(vae, warm, len(pixels), WARM_FIT, seed=seed, folder=folder / "vae-warm", progress=progress)
    curve = fit(vae, joint, len(pixels), VAE_FIT, seed=seed, folder=folder / "vae-fit", progress=progress)
    with torch.no_grad():
        std = vae.encode(to_float(pixels[:1000])).latent_dist.mean.std()
    vae.register_to_config(scaling_factor=round(float(1 / std), 4))
    return vae, started + [(WARM_FIT.steps + step, loss) for step, loss in curve]


def new_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a small vocabulary: one token a word of the world, and bytes for all other text.

    Any folder name is thus a sequence of its own; ``vfx`` and ``sks``, the rare words of dual-branch systems, are
    tokens that the world never uses.
    """
    draft = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
    )  # fmt: skip
    draft.train_from_iterator([*world.words(), *RARE_WORDS], trainer)
    parts = json.loads(draft.to_str())["model"]
    vocabulary = parts["vocab"]
    for symbol in alphabet:  # a byte at the end of a word; training makes only those that it met
        vocabulary.setdefault(f"{symbol}</w>", len(vocabulary))
    return CLIPTokenizer(vocabulary, [tuple(pair) for pair in parts["merges"]], model_max_length=TEXT_LENGTH)


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The untrained text encoder: two layers of width 128."""
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=TEXT_LENGTH, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    ))  # fmt: skip


def new_unet() -> UNet2DConditionModel:
    """The untrained UNet: heads of width 32 (``attention_head_dim`` counts heads, by a naming fault kept upstream)."""
    return UNet2DConditionModel(
        sample_size=16, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, cross_attention_dim=TEXT_WIDTH,
        block_out_channels=(64, 96, 128), attention_head_dim=(2, 3, 4), layers_per_block=1, norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Scaled posterior means (n, C, h, w), encoded once."""
    parts = [vae.encode(to_float(part)).latent_dist.mean for part in pixels.split(64)]
    return torch.cat(parts) * vae.config.scaling_factor


def token_table(tokenizer: CLIPTokenizer, prompts: Sequence[str], seed: int) -> Tensor:
    """Token ids (n, L). In a share of ``SPELT`` every other word is spelt in letters, so that those are trained too."""
    ids = tokenize(tokenizer, prompts)
    rng = np.random.default_rng([seed, 11])
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for row in np.flatnonzero(rng.uniform(size=len(prompts)) < SPELT):
        pieces: list[int] = []
        for index in ids[row].tolist():
            if index in special:
                continue
            text = names[index].removesuffix("</w>")
            letters = [*text[:-1], f"{text[-1]}</w>"] if rng.uniform() < 0.5 else [names[index]]
            pieces += tokenizer.convert_tokens_to_ids(letters)
        pieces = [tokenizer.bos_token_id, *pieces[: TEXT_LENGTH - 2], tokenizer.eos_token_id]
        ids[row] = torch.tensor(pieces + [tokenizer.pad_token_id] * (TEXT_LENGTH - len(pieces)))
    return ids


def train_unet(
    latents: Tensor,
    tokens: Tensor,
    tokenizer: CLIPTokenizer,
    settings: FitSettings,
    seed: int,
    folder: Path,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel, list[tuple[int, float]]]:
    """Fit UNet and text encoder together: eps-MSE at uniform timesteps, the prompt left out in a tenth of the items."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)})
    schedule, empty = sd_scheduler(), tokenize(tokenizer, [""])

    def loss(items: Tensor, generator: torch.Generator) -> Tensor:
        clean, ids = latents[items], tokens[items]
        timesteps = torch.randint(schedule.config.num_train_timesteps, (len(items),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(len(items), generator=generator) < NO_PROMPT
        hidden = parts["text_encoder"](torch.where(dropped[:, None], empty, ids))[0]
        predicted = parts["unet"](schedule.add_noise(clean, noise, timesteps), timesteps, hidden).sample
        return (predicted.float() - noise).square().mean()

    curve = fit(parts, loss, len(latents), settings, seed=seed, folder=folder / "unet-fit", progress=progress)
    return parts["unet"], parts["text_encoder"], curve


def save(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer, folder: Path
) -> None:
    """Write diffusers' Stable Diffusion layout, weights as float16 safetensors."""
    parts = {"vae": vae, "unet": unet, "text_encoder": text}
    pipeline = StableDiffusionPipeline(
        **{name: part.to(torch.float16) for name, part in parts.items()}, tokenizer=tokenizer,
        scheduler=sd_scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in WEIGHT_FILES:
        (folder / file).chmod(0o644)


def reconstruction(base: Backbone, images: Tensor) -> float:
    """PSNR in dB of images (N, 3, H, W) that went through the VAE."""
    return psnr(base.decode(base.encode(images)), images)


def mini_images(per_kind: int = 4) -> dict[str, Tensor]:
    """Category -> pictures of ``mini`` at 64 px, normals and every defect alike: measured on, never trained on."""
    found = {}
    for category, defects in mini.CATEGORIES.items():
        kinds = ["train/good", *(f"test/{defect}" for defect in defects)]
        found[category] = torch.stack([
            mini.draw(category, kind, i, size=world.SIZE)[0] for kind in kinds for i in range(per_kind)
        ])  # fmt: skip
    return found


def draw(base: Backbone, prompts: Sequence[str], seeds: Sequence[int], steps: int = 30, scale: float = 3.0) -> Tensor:
    """Zero-shot samples (N, 3, 64, 64), with classifier-free guidance."""
    text = base.embed([*[""] * len(prompts), *prompts])

    @torch.no_grad()
    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        without, with_text = base.unet(torch.cat([latents, latents]), timestep, text).sample.chunk(2)
        return without + scale * (with_text - without)

    return base.decode(denoise(predict, noise_like(seeds, base.latent_shape(world.SIZE)), base.scheduler, steps))


CARD = """# Model card: tiny

A latent diffusion model of {parameters:.1f} M parameters in Stable Diffusion 1.5's classes and folder layout, for
images of 64 px, with which every method runs from end to end without a download. It draws surfaces, simple objects,
marks on them, and silhouettes, of the world in `defectlib/data/world.py`; it is of no use as a picture generator.

## Made by

    {command}

Seed {seed}, {pictures:,} generated pictures, nothing of `mini` among them. Curves: `curves.json`. Latents: {latent}.

## Measured

Peak signal to noise ratio of what went through the autoencoder (float16 weights, computed in float32):

| pictures | PSNR, dB |
| --- | --- |
{psnr}

## Files

| file | sha256 |
| --- | --- |
{files}

## Limits

The world has no depth, no people and no text; prompts outside its words are read letter by letter and mean little. What
a category's defects look like has to be learned from shots. Licence: the project's own.
"""


def card(base: Backbone, held_out: Tensor, seed: int, pictures: int, folder: Path) -> str:
    """The model card, measured on the weights that it is about; ``held_out`` are pictures of the world."""
    rows = {"the world, held out": held_out} | {f"mini, {name}": images for name, images in mini_images().items()}
    rows["mini, all"] = torch.cat(list(mini_images().values()))
    parts = (base.vae, base.unet, base.text_encoder)
    return CARD.format(
        parameters=sum(p.numel() for part in parts for p in part.parameters()) / 1e6, seed=seed, pictures=pictures,
        command=f"python -m defectlib.pretrain --seed {seed}",
        latent=" x ".join(map(str, base.latent_shape(world.SIZE))),
        psnr="\n".join(f"| {name} | {reconstruction(base, images):.2f} |" for name, images in rows.items()),
        files="\n".join(f"| `{file}` | `{paths.sha256(folder / file)}` |" for file in WEIGHT_FILES),
    )  # fmt: skip


def main() -> None:
    """Train VAE, UNet and text encoder, write the folder with its model card, and print the card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=backbone.HERE / "tiny")
    parser.add_argument("--work", type=Path, default=paths.RUNS / "backbone", help="pictures, checkpoints, curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, seed = options.work, options.seed
    clock = time.perf_counter()

    def progress(part: str) -> Callable[[int, float], None]:
        return lambda step, loss: print(f"{part} {step}: {loss:.4f}, {time.perf_counter() - clock:.0f} s", flush=True)

    pixels, prompts = world_images(WORLD, seed, work)
    if (work / "vae-curve.json").is_file():
        vae = AutoencoderKL.from_pretrained(work / "vae")
    else:
        vae, curve = train_vae(pixels[HELD_OUT:], seed, work, progress("vae"))
        vae.save_pretrained(work / "vae")
        paths.write_text(work / "vae-curve.json", json.dumps(curve))
    tokenizer = new_tokenizer()
    tokens, latents = token_table(tokenizer, prompts, seed), latents_of(vae, pixels)
    unet, text, curve = train_unet(latents, tokens, tokenizer, UNET_FIT, seed, work, progress("unet"))
    save(vae, unet, text, tokenizer, options.out)
    curves = {"vae": json.loads((work / "vae-curve.json").read_text()), "unet": curve}
    paths.write_text(options.out / "curves.json", json.dumps(curves))
    text = card(backbone.load(str(options.out)), to_float(pixels[:HELD_OUT]), seed, len(pixels), options.out)
    paths.write_text(options.out / "README.md", text)
    print(text)
    print("sha256 for defectlib/backbone/known.json:")
    print(json.dumps({file: paths.sha256(options.out / file) for file in WEIGHT_FILES}, indent=2))


if __name__ == "__main__":
    main()
