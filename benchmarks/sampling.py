"""DefectSynth's sampling, SAE and SFF on, against diffusers' own ``StableDiffusionControlNetPipeline``.

    python benchmarks/sampling.py

Same weights, DDIM steps, batch, sizes and float32; requests are new in every round. Encoding the normal images and
blending them in, aligning a real defect, its weights at every step and the fusion of the group all count as ours; the
latents of the shots and the text embeddings, made once a category, do not, and the pipeline is handed its embeddings.
Times are CPU seconds on one thread, in turn. The last line is JSON; ``ratio`` is ours / reference of the medians with
Stable Diffusion 1.5's layers at a quarter of their width and random weights at 256 px; ``tiny`` is the same with the
base model that ships. ``max_abs_diff`` is the check: how far the images (in [0, 1]) are apart without SAE and SFF and
with a mask of the whole frame, so that nothing is blended in; ``hint_moves`` is how far that ControlNet's residuals
move them.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from torch import Tensor, nn
from training_step import stable_diffusion

from defectlib import backbone
from defectlib.backbone import Backbone
from defectlib.control import new_controlnet
from defectlib.diffusion import noise_like
from defectlib.methods.defectsynth import DefectSynth, DefectSynthConfig
from defectlib.types import Request, Shot

BATCH, STEPS, SHOTS = 4, 20, 8
PROMPT = "a metal plate with a hole"


def picture(seed: int, size: int) -> Tensor:
    """Noise in [-1, 1], (3, size, size)."""
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def disc(seed: int, size: int) -> Tensor:
    """A disc of a tenth of the side as radius, bool (1, size, size)."""
    y, x = torch.rand(2, 1, 1, generator=torch.Generator().manual_seed(seed)) * 0.6 + 0.2
    line = torch.arange(size) / size
    return ((line[:, None] - y) ** 2 + (line - x) ** 2 < 0.01)[None]


def requests(seed: int, size: int) -> list[Request]:
    """A batch that is one group."""
    seeds = range(BATCH * seed, BATCH * (seed + 1))
    return [Request(picture(k, size), disc(k, size), "plate", "hole", PROMPT, k, seed) for k in seeds]


def controlnet(method: DefectSynth) -> ControlNetModel:
    """A ControlNet whose residuals are not zero, as they are before training: else the check would not see it."""
    net = new_controlnet(method.backbone, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            nn.init.normal_(layer.weight, std=0.02)
    return net.eval().requires_grad_(False)


def timed(function: Callable[[list[Request]], Tensor], asked: list[Request]) -> float:
    clock = time.process_time()
    function(asked)
    return time.process_time() - clock


def measure(base: Backbone, size: int, rounds: int) -> dict[str, float]:
    """Median seconds a batch of both, in turn, and the check."""
    method = DefectSynth(DefectSynthConfig(num_inference_steps=STEPS, batch_size=BATCH), base)
    method.controlnet = controlnet(method)
    method.shots = [Shot(picture(-k - 1, size), disc(-k - 1, size), "plate", "hole", f"{k}") for k in range(SHOTS)]
    pipeline = StableDiffusionControlNetPipeline(
        vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer, unet=base.unet,
        controlnet=method.controlnet, scheduler=DDIMScheduler.from_config(base.scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    shape = base.latent_shape(size)

    def reference(asked: list[Request]) -> Tensor:
        return pipeline(
            prompt_embeds=base.embed([r.prompt for r in asked]),
            image=torch.stack([r.mask for r in asked]).float().expand(-1, 3, -1, -1),
            latents=noise_like([r.seed for r in asked], shape), num_inference_steps=STEPS, guidance_scale=1.0,
            output_type="pt",
        ).images  # fmt: skip

    def images(**changes) -> Tensor:
        options = {"sae": False, "sff": False} | changes
        plain = DefectSynth(method.config.model_copy(update=options), base)
        plain.controlnet, plain.shots = method.controlnet, method.shots
        return torch.stack([sample.image for sample in plain.sample(whole)]) / 2 + 0.5

    whole = [replace(r, mask=torch.ones_like(r.mask)) for r in requests(0, size)]
    drawn = images()
    difference = (drawn - reference(whole)).abs().max().item()
    moved = (drawn - images(controlnet_scale=0.0)).abs().max().item()
    for shot in method.shots:
        method._encoded(shot)
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for k in range(rounds):
        asked = requests(k, size)
        times["ours"].append(timed(method.sample, asked))
        times["reference"].append(timed(reference, asked))
    ours_s, reference_s = (statistics.median(values) for values in times.values())
    return {
        "ours_s": round(ours_s, 4), "reference_s": round(reference_s, 4), "ratio": round(ours_s / reference_s, 4),
        "images_per_s": round(BATCH / ours_s, 4), "max_abs_diff": difference,
        "hint_moves": round(moved, 4),
    }  # fmt: skip


def main() -> None:
    """The small base, then a quarter of Stable Diffusion 1.5's width."""
    torch.set_num_threads(1)
    tiny = measure(backbone.load("tiny", device="cpu"), 64, 9)
    print(json.dumps({
        "name": "sampling", "size": 256, "batch": BATCH, "steps": STEPS, **measure(stable_diffusion(4), 256, 3),
        "tiny": tiny,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
