"""IC-LPIPS from cached embeddings against the released scripts' way: one call of lpips a pair.

    python benchmarks/ic_lpips.py

60 images of 64 px and 7 references, textures; AlexNet's trunk with seeded random weights, lpips' own heads. The last
line is JSON; ``ratio`` is ours / reference in one run, ``max_abs_diff`` the check that both give one number.
``forwards`` is how many images passed through the trunk.
"""

import itertools
import json
import time
import warnings

import lpips
import numpy as np
import torch
from torch import Tensor

from defectlib import images
from defectlib.data import textures
from defectlib.metrics import perceptual
from defectlib.metrics.features import lpips_trunk

N, REFERENCES = 60, 7


def main() -> None:
    """Both ways, with the protocol `anomalydiffusion`; no cluster reaches its cap."""
    torch.set_num_threads(1)
    pictures = textures.batch(N + REFERENCES, np.random.default_rng(0))[0]
    pictures = [images.from_uint8(images.to_uint8(picture)) for picture in pictures]
    generated, references = pictures[:N], pictures[N:]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips 0.1.4 names torchvision's old arguments
        torch.manual_seed(0)
        model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    trunk, protocol = lpips_trunk(model, "alex", "random"), perceptual.PROTOCOLS["anomalydiffusion"]
    trunk.embed(references)  # the first pass is slower

    clock = time.perf_counter()
    ours = perceptual.ic_lpips(trunk.embed(generated), trunk.embed(references), protocol)["value"]
    ours_s = time.perf_counter() - clock

    calls = 0

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> float:
        nonlocal calls
        calls += 1
        return model(a[None], b[None]).item()

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
        "max_abs_diff": abs(ours - reference), "forwards": [N + REFERENCES, 2 * calls],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
