"""CSB-LoRA on a mixed-class batch against one shared LoRA, and against merging and running class by class.

    python benchmarks/class_conditioned_lora.py

The small base's branches with SAIM, 8 pairs of 4 classes, a forward and backward pass each, one thread, CPU seconds
taken in turn. The last line is JSON; ``ratio`` is ours / one shared LoRA, ``merged_s`` a pass for every class with its
LoRA multiplied out (forward only and without SAIM, against ``forward_s``), ``max_abs_diff`` its departure from the
mixed pass. Training mixes classes in a batch; drawing, which asks for one class at a time, multiplies out.
"""

import json
import statistics
import time

import torch

from defectlib import backbone
from defectlib.branches import BranchUNet

PAIRS, CLASSES, RANK, ROUNDS = 8, 4, 32, 7


def main() -> None:
    """Mixed, shared, and class by class, in turn."""
    torch.set_num_threads(1)
    base = backbone.load("tiny", device="cpu")
    shared, mixed = (BranchUNet(base.unet, RANK, 0, classes=n) for n in (0, CLASSES))
    alone = BranchUNet(base.unet, RANK, 0, classes=CLASSES, interaction=False)  # folding multiplies SAIM out besides
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in [value for model in (mixed, alone) for value in model.parameters()]:
            if value.requires_grad:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    noisy = torch.randn(2 * PAIRS, *base.latent_shape(64), generator=generator)
    text, timestep = base.embed(["a vfx with sks"] * PAIRS + ["sks"] * PAIRS), torch.tensor(500)
    classes = torch.arange(PAIRS) % CLASSES

    def timed(function) -> tuple[float, torch.Tensor]:
        clock = time.process_time()
        result = function()
        return time.process_time() - clock, result

    def step(model: BranchUNet, of: torch.Tensor | None) -> None:
        model(noisy, timestep, text, classes=of).square().mean().backward()

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return alone(noisy, timestep, text, classes=classes)

    @torch.no_grad()
    def one_by_one() -> torch.Tensor:
        found = torch.empty_like(noisy)
        for k in range(CLASSES):
            own = torch.cat([torch.nonzero(classes == k)[:, 0] + half for half in (0, PAIRS)])
            alone.fold(torch.tensor([k]))
            found[own] = alone(noisy[own], timestep, text[own])
            alone.unfold()
        return found

    times: dict[str, list[float]] = {"ours": [], "shared": [], "forward": [], "merged": []}
    for _ in range(ROUNDS):
        times["ours"].append(timed(lambda: step(mixed, classes))[0])
        times["shared"].append(timed(lambda: step(shared, None))[0])
        together, apart = timed(forward), timed(one_by_one)
        times["forward"].append(together[0])
        times["merged"].append(apart[0])
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    print(json.dumps({
        "name": "class_conditioned_lora", "pairs": PAIRS, "classes": CLASSES, "rank": RANK,
        "ours_s": round(middle["ours"], 4), "reference_s": round(middle["shared"], 4),
        "ratio": round(middle["ours"] / middle["shared"], 4), "forward_s": round(middle["forward"], 4),
        "merged_s": round(middle["merged"], 4), "max_abs_diff": (together[1] - apart[1]).abs().max().item(),
        "coefficients_a_class": mixed.counts()["CSB"] // CLASSES,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
