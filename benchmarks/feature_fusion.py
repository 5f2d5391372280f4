"""SFF limited to a mask against a plain double loop that matches every drawn point and writes only those inside.

    python benchmarks/feature_fusion.py

A group of four at 64 x 64 latents, a mask of 10 % of the area, float32 on one thread, CPU seconds. The last line is
JSON; ``ratio`` is ours / reference of the medians, timed in turn; the checks are that both wrote the same positions
(``same_positions``: the same draws) and how far their values are apart (``max_abs_diff``).
"""

import json
import statistics
import time

import torch
from torch import Tensor

from defectlib.fusion import fuse

GROUP, CHANNELS, SIDE, RATE, BASE = 4, 4, 64, 0.2, 0.7
ROUNDS = 11


def plain(latents: Tensor, generator: torch.Generator, masks: Tensor) -> Tensor:
    """Equation 9 in the paper's order: for every sample, for every other sample, the match of all drawn points."""
    fused = latents.clone()
    for i in range(GROUP):
        base = fused[i].flatten(1)
        drawn = torch.randperm(SIDE * SIDE, generator=generator)[: round(RATE * SIDE * SIDE)]
        selected = base[:, drawn]
        result = BASE * selected
        for j in range(GROUP):
            if j != i:
                others = fused[j].flatten(1)
                best = (selected.T @ others).argmax(1)
                result = result + (1 - BASE) / (GROUP - 1) * others[:, best]
        base[:, drawn] = torch.where(masks[i].flatten()[drawn], result, selected)
    return fused


def main() -> None:
    """Both forms from equal generators, in turn."""
    torch.set_num_threads(1)
    latents = torch.randn(GROUP, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(GROUP, 1, SIDE, SIDE, dtype=torch.bool)
    # 410 of 4096 pixels, somewhere else in each sample.
    for i in range(GROUP):
        masks[i, 0, 8 * i : 8 * i + 10, 5 : 5 + 41] = True

    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for _ in range(ROUNDS):
        clock = time.process_time()
        ours = fuse(latents, torch.Generator().manual_seed(1), rate=RATE, base_weight=BASE, masks=masks)
        times["ours"].append(time.process_time() - clock)
        clock = time.process_time()
        reference = plain(latents, torch.Generator().manual_seed(1), masks)
        times["reference"].append(time.process_time() - clock)
    ours_s, reference_s = (statistics.median(values) for values in times.values())
    written = [(fused != latents).any(1) for fused in (ours, reference)]

    print(json.dumps({
        "name": "feature_fusion", "group": GROUP, "side": SIDE, "mask_area": round(masks.float().mean().item(), 3),
        "written": int(written[0].sum()), "ours_s": round(ours_s, 4), "reference_s": round(reference_s, 4),
        "ratio": round(ours_s / reference_s, 4), "same_positions": torch.equal(*written),
        "max_abs_diff": (ours - reference).abs().max().item(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
