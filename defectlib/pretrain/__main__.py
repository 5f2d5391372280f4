"""``python -m defectlib.pretrain``: train the small base model, or go on where a run stopped."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from defectlib import backbone, paths
from defectlib.pretrain import card, parts, recipe


def main() -> None:
    """Train VAE, UNet and text encoder, write the folder with its model card beside them, and say how it is used."""
    parser = argparse.ArgumentParser(prog="python -m defectlib.pretrain", description=main.__doc__)
    parser.add_argument("--work", type=Path, default=paths.RUNS / "backbone", help="pictures, checkpoints, curves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, made, seed, device = options.work, options.work / "tiny", options.seed, backbone.default_device()
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
    parts.save(vae, unet, text, tokenizer, made)
    paths.write_text(made / "curves.json", json.dumps(curves))
    text = card.card(backbone.load(str(made)), pixels, recipe.HELD_OUT, seed, made, work)
    paths.write_text(made / "README.md", text)
    print(text)
    print(f"`backbone: {made}` in a profile draws with it. To ship it as tiny, copy the folder over")
    print(f"{backbone.HERE / 'tiny'}, and these sha256 into {backbone.HERE / 'known.json'}:")
    print(json.dumps({file: paths.sha256(made / file) for file in backbone.files_of(made)}, indent=2))


if __name__ == "__main__":
    main()
