"""IC-LPIPS from cached embeddings against the released scripts' way: one LPIPS call a pair, two forward passes each.

    python benchmarks/ic_lpips.py

The last line is JSON; ``ratio`` is ours / reference in one run, ``max_abs_diff`` the check that both give one number.
"""

import itertools
import json
import time

import numpy as np
import torch

from defectlib.data import textures
from defectlib.metrics import perceptual
from defectlib.metrics.features import load_perceptual

N, REFERENCES = 40, 5


def main() -> None:
    """Both ways on textures, with the shipped trunk and the protocol `anomalydiffusion`."""
    torch.set_num_threads(1)
    pictures = list(textures.batch(N + REFERENCES, np.random.default_rng(0))[0])
    generated, references = pictures[:N], pictures[N:]
    trunk, protocol = load_perceptual("tiny"), perceptual.PROTOCOLS["anomalydiffusion"]
    trunk.embed(references)

    clock = time.perf_counter()
    ours = perceptual.ic_lpips(trunk.embed(generated), trunk.embed(references), protocol)["value"]
    ours_s = time.perf_counter() - clock

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return (trunk.embed([a]) - trunk.embed([b])).square().sum().item()

    clock = time.perf_counter()
    nearest = [min(range(REFERENCES), key=lambda k: distance(x, references[k])) for x in generated]
    clusters = [[x for x, k in zip(generated, nearest) if k == c] for c in range(REFERENCES)]
    means = [
        sum(distance(a, b) for a, b in pairs) / len(pairs)
        for pairs in (list(itertools.combinations(cluster, 2)) for cluster in clusters)
        if pairs
    ]
    reference = sum(means) / len(means)
    reference_s = time.perf_counter() - clock

    print(json.dumps({
        "name": "ic_lpips", "n": N, "references": REFERENCES, "ours_s": round(ours_s, 4),
        "reference_s": round(reference_s, 3), "ratio": round(ours_s / reference_s, 4),
        "max_abs_diff": abs(ours - reference),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
