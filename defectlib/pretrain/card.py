"""The model card of the small base model: what it keeps of a picture, what it knows, and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from defectlib import images, paths
from defectlib.backbone import Backbone, files_of
from defectlib.data import mini, world
from defectlib.diffusion import denoise, noise_like, prompted
from defectlib.pretrain import evidence, recipe


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal to noise ratio in dB of images in [-1, 1]: 10 log10(4 / MSE), the MSE over all pixels."""
    return float(10 * torch.log10(4 / (a - b).square().mean()))


def reconstruction(base: Backbone, images: Tensor) -> float:
    """PSNR in dB of images (N, 3, H, W) that went through the VAE."""
    return psnr(base.decode(base.encode(images)), images)


def mini_images(per_kind: int = 4) -> dict[str, Tensor]:
    """Category -> pictures of ``mini`` at 64 px, normals and every defect alike: measured on, never trained on."""
    found = {}
    for category, defects in mini.CATEGORIES.items():
        kinds = ["train/good", *(f"test/{defect}" for defect in defects)]
        found[category] = torch.stack([
            images.resize_image(mini.draw(category, kind, i)[0], world.SIZE) for kind in kinds for i in range(per_kind)
        ])  # fmt: skip
    return found


def draw(
    base: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 30,
    scale: float = 3.0,
    size: int = world.SIZE,
) -> Tensor:
    """Zero-shot samples (N, 3, size, size), with classifier-free guidance."""
    noise = noise_like(seeds, base.latent_shape(size)).to(base.device)
    return base.decode(denoise(prompted(base, prompts, scale), noise, base.scheduler, steps))


WANTED = 28.0
"""Of every picture, in dB."""
CARD = """# Model card: tiny

A latent diffusion model of {parameters:.1f} M parameters in Stable Diffusion 1.5's classes and folder layout, for
images of 64 px, with which every method runs from end to end without a download. Of the world in
`defectlib/data/world.py` it draws white silhouettes, small parts on grey, surfaces of the tone and mostly of the
pattern that is asked for, and objects that have their form and ragged edges; few deterministic steps draw them more
ragged than many of DDPM's (`03_backbone` shows two pictures of each kind, with a prompt and without). Without a prompt,
by DDPM's steps, a person recognises silhouettes and most surfaces (cloth, leather, felt, plain sheets with a mark);
objects are lumps on plain ground. It was trained on {seen:,} pictures in all, counted with repeats; it is of no use as
a picture generator.

## Made by

    {command}

Seed {seed}, {pictures:,} generated pictures, {held_out} of them held out, nothing of `mini` among them. Curves:
`curves.json`. Latents: {latent} (other numbers of channels
were not compared). Noise schedule: {schedule} beta, {predicts} (`pretrain/parts.py` says why).
Trained on: {device}.

## Measured

Peak signal to noise ratio of what went through the autoencoder (float16 weights, computed in float32):

{psnr}

{wanted:g} dB were wanted; below them: {below}.

## How far it is from `mini`

`mini` is not in the world. Pixel AP of a localiser tested on real defects of `mini`, {defects} kinds a category, and
trained (`demo` protocol, one seed) on what the base model draws from the defect's prompt alone (into `mini`'s normal
images, at moved masks of the shots), on {shots} shots a kind alone, and on Crop-Paste of these shots; chance is the
share of defect pixels:

{localisation}

Relatives of four categories are in the world (blocks in bond, fibres, pebbles, rings), so zero-shot samples
teach a part, as masks and surroundings do; what a method has to add is the distance from the first column to the
second.

Root mean square difference, in grey levels of 255, of `mini`'s defect images to the nearest other defect image of
their category, to the nearest of as many pictures of the world (mean over {draws} draws), and to the nearest of all
{trained:,} that the model was trained on; among that many one is near most pictures:

{nearest}

## Files

{files}

## Limits

The world has no depth, no people and no text; prompts outside its words are read letter by letter and mean little. What
a category's defects look like has to be learned from shots. Licence: the project's own.
"""


def card(base: Backbone, pixels: Tensor, held_out: int, seed: int, folder: Path, work: Path) -> str:
    """The model card, measured on the weights that it is about.

    Args:
        base: The trained model.
        pixels: The world, uint8 (n, 3, 64, 64); the first ``held_out`` were not trained on.
        held_out: How many.
        seed: Of the recipe.
        folder: Where the model is.
        work: Where the evidence's methods may write.
    """
    own = mini_images()
    rows = {"the world, held out": recipe.to_float(pixels[:held_out])}
    rows |= {f"mini, {name}": shown for name, shown in own.items()} | {"mini, all": torch.cat(list(own.values()))}
    kept = pd.DataFrame({"PSNR, dB": {name: reconstruction(base, shown) for name, shown in rows.items()}})
    below = kept.index[kept["PSNR, dB"] < WANTED]
    fits = (recipe.UNET_WARM_FIT, recipe.UNET_FIT, recipe.UNET_LAST_FIT)
    digests = {f"`{file}`": f"`{paths.sha256(folder / file)}`" for file in files_of(folder)}
    modules = (base.vae, base.unet, base.text_encoder)
    return CARD.format(
        parameters=sum(p.numel() for module in modules for p in module.parameters()) / 1e6,
        schedule=base.scheduler.config.beta_schedule, predicts=base.scheduler.config.prediction_type.replace("_", "-"),
        device=base.device.type.upper(),
        seed=seed, pictures=len(pixels), held_out=held_out, command=f"python -m defectlib.pretrain --seed {seed}",
        latent=" x ".join(map(str, base.latent_shape(world.SIZE))), defects=evidence.DEFECTS, shots=evidence.SHOTS,
        seen=sum(one.steps * one.batch_size for one in fits), draws=evidence.DRAWS, trained=len(pixels) - held_out,
        psnr=_table("pictures", kept, 2), wanted=WANTED, below="; ".join(below) or "none",
        localisation=_table("category", evidence.localisation(base, work), 3),
        nearest=_table("category", evidence.nearest(pixels[held_out:]), 1),
        files=_table("file", pd.DataFrame({"sha256": digests})),
    )  # fmt: skip


def _table(name: str, frame: pd.DataFrame, digits: int = 0) -> str:
    """A frame in Markdown, its index first."""
    lines = [[name, *frame.columns], ["---"] * (1 + len(frame.columns))]
    lines += [[key, *(v if isinstance(v, str) else f"{v:.{digits}f}" for v in row)] for key, row in frame.iterrows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
