"""``python -m defectlib.pretrain``: train the small base model, or go on where a run stopped."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from defectlib import backbone, paths
from defectlib.pretrain import card, parts, recipe


def main() -> None:
    """Train VAE, UNet and text encoder, write the folder with its model card, and print the card."""
    parser = argparse.ArgumentParser(prog="python -m defectlib.pretrain", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=backbone.HERE / "tiny")
    parser.add_argument("--work", type=Path, default=paths.RUNS / "backbone", help="pictures, checkpoints, curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, seed, device = options.work, options.seed, backbone.default_device()
    clock = time.perf_counter()

    def progress(part: str) -> recipe.Progress:
        return lambda step, loss: print(f"{part} {step}: {loss:.4f}, {time.perf_counter() - clock:.0f} s", flush=True)

    pixels, prompts = recipe.world_images(recipe.WORLD, seed, work)
    trained_on = pixels[recipe.HELD_OUT :]
    vae, curve = recipe.train_vae(trained_on, seed, work, device, progress("vae"))
    curves, tokenizer = {"vae": curve}, parts.new_tokenizer()
    tokens = parts.token_table(tokenizer, prompts, seed)[recipe.HELD_OUT :]
    latents = recipe.latents_of(vae, trained_on, work / "latents.safetensors")
    unet, text, curves["unet"] = recipe.train_unet(latents, tokens, tokenizer, seed, work, device, progress("unet"))
    parts.save(vae, unet, text, tokenizer, work / "tiny")
    shutil.copytree(work / "tiny", options.out, dirs_exist_ok=True)
    paths.write_text(options.out / "curves.json", json.dumps(curves))
    text = card.card(backbone.load(str(options.out)), pixels, recipe.HELD_OUT, seed, options.out, work)
    paths.write_text(options.out / "README.md", text)
    print(text)
    print("sha256 for defectlib/backbone/known.json:")
    print(json.dumps({file: paths.sha256(options.out / file) for file in backbone.files_of(options.out)}, indent=2))


if __name__ == "__main__":
    main()
