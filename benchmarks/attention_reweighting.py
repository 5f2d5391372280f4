"""SAE's re-weighted cross-attention against the same layer without it, at Stable Diffusion 1.5's 64 x 64 level.

    python benchmarks/attention_reweighting.py

A layer with its projections, float32 on one thread; weights are set, and resized, anew for each call, although a step
of SD 1.5 shares them among 16 layers. Times are CPU seconds, taken in turn. The last line is JSON; ``ratio`` is
ours / reference of the medians, ``max_abs_diff`` the check against Equation 8 as printed, with the weighted
(queries x keys) matrix formed, whose time is ``materialised_s``. ``weights_s`` is Equation 7, once a step.
The weights are cut at 73, the median of the largest in a simulation with 373 pixels inside the mask; ``uncapped`` is
the same check on the whole tail, where outputs are a hundred times as large as without SAE and float32 rounds them.
"""

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from defectlib.attention import AttentionWeights, ReweightedAttnProcessor, selective_weights

BATCH, SIDE, CHANNELS, HEADS, TOKENS, TEXT = 2, 64, 320, 8, 77, 768
CAP = 73
ROUNDS = 25


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    clock = time.process_time()
    result = function()
    return time.process_time() - clock, result


def keep_memory() -> None:
    """Have glibc keep freed blocks.

    Whether it hands 10 MB back to the system after a call, to fault them in again in the next, is an accident of where
    small objects lie on the heap. It is worth 25 % of a call, to either form.
    """
    if sys.platform == "linux":
        trim_threshold, mmap_threshold = -1, -3
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


@torch.inference_mode()
def main() -> None:
    """With and without SAE, in turn, then the materialised form for the check."""
    torch.set_num_threads(1)
    keep_memory()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = Attention(query_dim=CHANNELS, cross_attention_dim=TEXT, heads=HEADS, dim_head=CHANNELS // HEADS).eval()
    hidden = torch.randn(BATCH, SIDE * SIDE, CHANNELS, generator=generator)
    text = torch.randn(BATCH, TOKENS, TEXT, generator=generator)
    latents, reference = torch.randn(2, BATCH, 4, SIDE, SIDE, generator=generator)
    mask = torch.zeros(BATCH, 1, SIDE, SIDE, dtype=torch.bool)
    mask[..., 20:40, 10:30] = True
    tail = selective_weights(reference, latents, mask)
    weights_s, weights = timed(lambda: selective_weights(reference, latents, mask, cap=CAP))
    holder = AttentionWeights()
    stock, ours = AttnProcessor2_0(), ReweightedAttnProcessor(holder)

    def plain() -> Tensor:
        return stock(layer, hidden, text)

    def reweighted(weights: Tensor = weights) -> Tensor:
        holder.set(weights)
        return ours(layer, hidden, text)

    def materialised(weights: Tensor = weights) -> Tensor:
        query, key, value = (
            to(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for to, x in ((layer.to_q, hidden), (layer.to_k, text), (layer.to_v, text))
        )
        scores = torch.softmax(query @ key.transpose(-1, -2) * layer.scale, -1)
        rows = weights.flatten(2)[..., None]
        return layer.to_out[0](((rows * scores) @ value).transpose(1, 2).flatten(2))

    times: dict[str, list[float]] = {"plain": [], "reweighted": [], "materialised": []}
    for _ in range(ROUNDS):
        for function in (plain, reweighted, reweighted, plain):
            times[function.__name__].append(timed(function)[0])
    for _ in range(5):
        times["materialised"].append(timed(materialised)[0])
    middle = {name: statistics.median(values) for name, values in times.items()}
    difference, far = ((reweighted(w) - materialised(w)).abs().max().item() for w in (weights, tail))
    uncapped = {
        "largest_weight": round(tail.max().item(), 1), "largest_output": round(reweighted(tail).abs().max().item(), 1),
        "max_abs_diff": far,
    }  # fmt: skip

    print(json.dumps({
        "name": "attention_reweighting", "batch": BATCH, "queries": SIDE * SIDE, "channels": CHANNELS, "heads": HEADS,
        "tokens": TOKENS, "ours_s": round(middle["reweighted"], 4), "reference_s": round(middle["plain"], 4),
        "ratio": round(middle["reweighted"] / middle["plain"], 4), "materialised_s": round(middle["materialised"], 4),
        "weights_s": round(weights_s, 5), "max_abs_diff": difference, "uncapped": uncapped,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
