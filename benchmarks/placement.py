"""1,000 masks, turned and scaled, placed inside each of three foregrounds of 512 x 512: all legal, in what time.

    python benchmarks/placement.py

The foregrounds are the full frame, a compact disc, and a thin ring. Ours counts the illegal pixels of every corner by
one correlation whose one half is computed once a foreground. Beside it stands plain rejection by trial on the ring:
the same moved masks, each put at random corners until one is legal, at most 1,000 times. The last line is JSON:
``legal`` is how many of the 3,000 lie wholly inside (checked pixel by pixel), ``ours_s`` the time of all, moving
included; ``ratio`` is ours / rejection on the ring without the moving, and ``rejection_gave_up`` how often no legal
corner was met. Rejection is quick where it succeeds; what it cannot do is end in bounded time.
"""

import json
import time

import numpy as np
import torch

from defectlib.masks import random

SIDE, N, TRIALS = 512, 1000, 1000


def shapes() -> list[torch.Tensor]:
    """Blobs, bars and a cracked line, bool (1, SIDE, SIDE), that fit into the ring in some direction."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    found = [np.hypot(y / a, x / b) < 1 for a, b in ((6, 6), (5, 12), (3, 22), (2, 40))]
    found.append((np.abs(y - 8 * np.sin(x / 9)) < 1.5) & (np.abs(x) < 45))
    return [torch.from_numpy(mask)[None] for mask in found]


def foregrounds() -> dict[str, torch.Tensor]:
    """Bool (1, SIDE, SIDE) each."""
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5
    radius = np.hypot(y, x)
    found = {"full": radius >= 0, "compact": radius < 120, "ring": (radius < 250) & (radius > 230)}
    return {name: torch.from_numpy(mask)[None] for name, mask in found.items()}


def by_trial(mask: torch.Tensor, allowed: np.ndarray, rng: np.random.Generator) -> bool:
    """Whether random corners met a legal one."""
    values = mask[0].numpy()
    height, width = values.shape
    for _ in range(TRIALS):
        y, x = rng.integers(SIDE - height + 1), rng.integers(SIDE - width + 1)
        if allowed[y : y + height, x : x + width][values].all():
            return True
    return False


def main() -> None:
    """Ours in all three, then rejection on the ring."""
    masks, legal, ours_s, placing_s, on_ring = shapes(), 0, 0.0, 0.0, []
    for name, allowed in foregrounds().items():
        rng = np.random.default_rng(0)
        clock = time.perf_counter()
        places = random.Places(allowed)
        placed = []
        for k in range(N):
            corner = None
            while corner is None:  # drawn again only where no corner at all is legal
                patch = random.affine(masks[k % len(masks)], rng)
                started = time.perf_counter()
                corner = random.place(patch, places, rng)
                placing_s += (time.perf_counter() - started) * (name == "ring")
            placed.append((patch, corner))
        ours_s += time.perf_counter() - clock
        whole = [(random.at(patch, corner, (SIDE, SIDE)), patch) for patch, corner in placed]
        legal += sum(bool((at <= allowed).all()) and at.sum() == patch.sum() for at, patch in whole)
        on_ring = [patch for patch, _ in placed]
    rng, allowed = np.random.default_rng(0), foregrounds()["ring"][0].numpy()
    clock = time.perf_counter()
    met = [by_trial(patch, allowed, rng) for patch in on_ring]
    reference_s = time.perf_counter() - clock
    print(json.dumps({
        "name": "placement", "placements": 3 * N, "legal": int(legal), "ours_s": round(ours_s, 2),
        "placing_on_ring_s": round(placing_s, 2), "reference_s": round(reference_s, 2),
        "ratio": round(placing_s / reference_s, 3), "rejection_gave_up": met.count(False),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
