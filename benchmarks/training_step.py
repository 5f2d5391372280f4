"""A ControlNet training step on cached latents and text embeddings against one that encodes image and prompt each time.

    python benchmarks/training_step.py

Stable Diffusion 1.5's layer sizes with random weights (its public configuration), 128 px, batch 2, float32: about 13
GB, which the process keeps, as torch's own allocator does on a GPU (``KEEP_MEMORY``). Both are whole steps of the
project's fit loop, AdamW included, in turn on one model. The last line is JSON; ``ratio`` is ours / reference of the
medians, ``loss_diff`` the check: how far the two losses are apart for the same items, noise and timesteps. ``larger``
is the same at 256 px, where feature maps are large enough for the convolutions to outweigh the weights' way through
memory; ``tiny`` with the base model that ships, whose VAE is nearly free. On the CPU times are CPU seconds on one
thread. Where there is a GPU, ``gpu`` has steps a second and peak memory of our step at 512 px there.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from defectlib import backbone
from defectlib.backbone import Backbone, tokenize
from defectlib.control import denoising_loss, new_controlnet
from defectlib.diffusion import sd_scheduler
from defectlib.pretrain import parts
from defectlib.training import FitSettings, fit

SIZE, LARGER, BATCH, ITEMS = 128, 256, 2, 8
ROUNDS, WARM = 5, 2
# glibc gives large blocks back to the kernel after each operation and has them cleared again at the next, a third of
# the time of either form. Read where the process starts; other allocators ignore it.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**36)}
PROMPTS = ["a metal plate with a hole", "a metal plate with a scratch"] * (ITEMS // 2)


def stable_diffusion(share: int = 1, device: str = "cpu") -> Backbone:
    """Stable Diffusion 1.5's layers at one ``share``-th of their width, with random weights and a tokenizer of 77.

    Heads are narrowed in number, not in width, and group norms keep their channels a group.
    """
    widths, down = (320, 640, 1280, 1280), ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    tokenizer = parts.new_tokenizer()
    tokenizer.model_max_length = 77
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=64, in_channels=4, out_channels=4, block_out_channels=tuple(w // share for w in widths),
            down_block_types=down, up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, layers_per_block=2,
            cross_attention_dim=768 // share, attention_head_dim=8 // share, norm_num_groups=32 // share,
        )  # fmt: skip
        vae = AutoencoderKL(
            sample_size=512, latent_channels=4, layers_per_block=2, norm_num_groups=32 // share,
            block_out_channels=tuple(w // share for w in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768 // share, intermediate_size=3072 // share, num_hidden_layers=12,
            num_attention_heads=12 // share, max_position_embeddings=77, projection_dim=768 // share,
            hidden_act="quick_gelu", bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
    modules = [part.to(device).eval().requires_grad_(False) for part in (vae, unet, text)]
    return Backbone(f"sd15/{share}", *modules, tokenizer, sd_scheduler(), "random weights")


def clock(device: torch.device) -> float:
    """CPU seconds of this process, or wall seconds once the GPU has done what it was given."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def steps(base: Backbone, size: int, rounds: int, *, reference: bool = True) -> dict[str, float]:
    """Median seconds of a step: ours, and with ``reference`` in turn one that encodes; and the losses' difference."""
    net = new_controlnet(base, 0)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(ITEMS, 3, size, size, generator=generator) * 2 - 1
    hints = (torch.rand(ITEMS, 1, size, size, generator=generator) > 0.9).float().expand(-1, 3, -1, -1).to(base.device)
    latents, text = base.encode(images), base.embed(PROMPTS)
    weights = torch.ones(ITEMS, 1, *latents.shape[2:], device=base.device)

    def cached(items: Tensor, generator: torch.Generator) -> Tensor:
        return denoising_loss(net, base, latents[items], text[items], hints[items], weights[items], generator)

    def encoding(items: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            ids = tokenize(base.tokenizer, [PROMPTS[i] for i in items]).to(base.device)
            embedded, encoded = base.text_encoder(ids)[0], base.encode(images[items])
        return denoising_loss(net, base, encoded, embedded, hints[items], weights[items], generator)

    forms = [cached, encoding] if reference else [cached]
    with torch.no_grad():
        losses = [form(torch.arange(BATCH), torch.Generator().manual_seed(1)).item() for form in forms]
    starts: list[float] = []

    def in_turn(items: Tensor, generator: torch.Generator) -> Tensor:
        starts.append(clock(base.device))
        return forms[(len(starts) - 1) % len(forms)](items, generator)

    # A step lasts from one call of the loss to the next, so one more is run than counted.
    settings = FitSettings(steps=len(forms) * (WARM + rounds) + 1, batch_size=BATCH, learning_rate=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        fit(net, in_turn, ITEMS, settings, seed=0, folder=Path(folder) / "checkpoints")
    lasted = [after - before for before, after in zip(starts, starts[1:])]
    medians = [statistics.median(lasted[k :: len(forms)][WARM:]) for k in range(len(forms))]
    if not reference:
        return {"ours_s": medians[0]}
    return {
        "ours_s": round(medians[0], 4), "reference_s": round(medians[1], 4),
        "ratio": round(medians[0] / medians[1], 4), "loss_diff": abs(losses[0] - losses[1]),
    }  # fmt: skip


def on_gpu(size: int = 512) -> dict[str, float | str]:
    """Steps a second and peak memory in GB of our step at full size."""
    seconds = steps(stable_diffusion(device="cuda"), size, 20, reference=False)["ours_s"]
    peak = torch.cuda.max_memory_allocated() / 1e9
    name = torch.cuda.get_device_name()
    return {"device": name, "size": size, "steps_per_s": round(1 / seconds, 2), "peak_gb": round(peak, 1)}


def main() -> None:
    """The small base first, then Stable Diffusion 1.5's sizes, then the GPU."""
    torch.set_num_threads(1)
    tiny = steps(backbone.load("tiny", device="cpu"), 64, 15)
    base = stable_diffusion()
    large, larger = steps(base, SIZE, ROUNDS), steps(base, LARGER, 3)
    # Linux counts kilobytes, macOS bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    gpu = on_gpu() if torch.cuda.is_available() else None
    print(json.dumps(
        {"name": "training_step", "size": SIZE, "batch": BATCH} | large
        | {"peak_gb": round(peak, 1), "larger": {"size": LARGER} | larger, "tiny": tiny, "gpu": gpu}
    ))  # fmt: skip


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)
    main()
