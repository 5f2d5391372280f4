"""Eight masks between two of 1024 x 1024 at an area ratio of 0.05, against a plain per-pixel form in Python loops.

    python benchmarks/mask_interpolation.py

The reference is the released scheme as described (reading order, linear resampling, gaps above 2 px filled, pieces of
every frame counted), a point at a time. Times are the process's own, on one thread, so that other load does not count.
The last line is JSON; the check is that every frame of two-piece pairs is kept in the default form. ``kept`` is the
share of frames kept of 100 random pairs a kind at 256 x 256 in three forms: the paper's order as printed, the same
piece by piece, and transport. ``crack_width`` is the factor by which the widths of the worst tenth of the cracks
between two cracks are off the interpolated width, in the last two.
"""

import json
import math
import statistics
import time

import numpy as np
import torch
from scipy import ndimage
from skimage.morphology import skeletonize

from defectlib.masks.interpolation import interpolate, weights

SIZE, AREA, FRAMES, REPEATS, PAIRS = 1024, 0.05, 8, 5, 100
FORMS = ({"form": "raster", "by_piece": False}, {"form": "raster"}, {"form": "transport"})


def blob(rng: np.random.Generator, size: int, area: float, centre: tuple[float, float]) -> np.ndarray:
    """A lobed disc, bool (size, size), that covers about ``area`` of the image."""
    y, x = np.mgrid[0:size, 0:size]
    angle, radius = np.arctan2(y - centre[0], x - centre[1]), math.sqrt(area / math.pi) * size
    lobes = sum(rng.uniform(0, 0.15) * np.cos(k * angle + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
    return np.hypot(y - centre[0], x - centre[1]) < radius * (1 + lobes)


def crack(rng: np.random.Generator, size: int, length: float, centre: tuple[float, float]) -> np.ndarray:
    """A wandering line one pixel wide, bool (size, size)."""
    n = int(2 * length)
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, 0.03, n))
    path = np.cumsum(0.5 * np.stack([np.sin(heading), np.cos(heading)], 1), 0)
    at = np.clip(np.rint(path - path.mean(0) + centre).astype(int), 0, size - 1)
    mask = np.zeros((size, size), bool)
    mask[at[:, 0], at[:, 1]] = True
    return mask


def two_pieces(rng: np.random.Generator, size: int) -> torch.Tensor:
    """A crack in one half of the frame and a blob in the other, or two blobs: bool (1, size, size)."""
    left, right = ((size * rng.uniform(0.3, 0.7), size * (at + rng.uniform(-0.05, 0.05))) for at in (0.25, 0.75))
    first = crack(rng, size, size / 4, left) if rng.random() < 0.5 else blob(rng, size, 0.01, left)
    return torch.from_numpy(first | blob(rng, size, rng.uniform(0.003, 0.02), right))[None]


def one_piece(rng: np.random.Generator, size: int, kind: str) -> torch.Tensor:
    """A crack, or a blob that is tiny, large or any size between: bool (1, size, size)."""
    if kind == "crack":
        mask = crack(rng, size, size * rng.uniform(0.15, 0.6), tuple(size * rng.uniform(0.35, 0.65, 2)))
        width = rng.integers(1, 4)
        return torch.from_numpy(ndimage.binary_dilation(mask, np.ones((width, width))))[None]
    area = {"tiny": 0.001, "large": 0.05, "blob": math.exp(rng.uniform(math.log(0.002), math.log(0.05)))}[kind]
    return torch.from_numpy(blob(rng, size, area, tuple(size * rng.uniform(0.2, 0.8, 2))))[None]


KINDS = {
    "cracks": lambda rng: (one_piece(rng, 256, "crack"), one_piece(rng, 256, "crack")),
    "blobs": lambda rng: (one_piece(rng, 256, "blob"), one_piece(rng, 256, "blob")),
    "two_pieces": lambda rng: (two_pieces(rng, 256), two_pieces(rng, 256)),
    "sizes": lambda rng: (one_piece(rng, 256, "tiny"), one_piece(rng, 256, "large")),
    "crack_and_blob": lambda rng: (one_piece(rng, 256, "crack"), one_piece(rng, 256, "blob")),
    "one_and_two": lambda rng: (one_piece(rng, 256, "blob"), two_pieces(rng, 256)),
}


def width(mask: torch.Tensor) -> float:
    """Mean width of a line in px: its area over the length of its skeleton."""
    return mask.sum().item() / int(skeletonize(mask[0].numpy()).sum())


def plain(first: np.ndarray, second: np.ndarray, alphas: np.ndarray) -> list[np.ndarray]:
    """The frames that are kept of the released scheme, pixel by pixel."""
    height, width = first.shape
    lists = [[(y, x) for y in range(height) for x in range(width) if mask[y, x]] for mask in (first, second)]
    n = max(map(len, lists))
    resampled = []
    for points in lists:
        out = []
        for k in range(n):
            at = k * (len(points) - 1) / max(n - 1, 1)
            low = min(int(at), len(points) - 2) if len(points) > 1 else 0
            share, high = at - low, points[min(low + 1, len(points) - 1)]
            out.append(tuple((1 - share) * a + share * b for a, b in zip(points[low], high)))
        resampled.append(out)
    kept, pieces = [], [ndimage.label(mask, np.ones((3, 3)))[1] for mask in (first, second)]
    for alpha in alphas:
        moved = [tuple((1 - alpha) * a + alpha * b for a, b in zip(p, q)) for p, q in zip(*resampled)]
        frame = np.zeros((height, width), bool)
        for (y0, x0), (y1, x1) in zip(moved, moved[1:] + moved[-1:]):
            steps = max(1, math.ceil(math.hypot(y1 - y0, x1 - x0))) if math.hypot(y1 - y0, x1 - x0) > 2 else 1
            for k in range(steps):
                frame[round(y0 + (y1 - y0) * k / steps), round(x0 + (x1 - x0) * k / steps)] = True
        ratio = frame.sum() / ((1 - alpha) * first.sum() + alpha * second.sum())
        if 0.5 <= ratio <= 2 and (pieces[0] != pieces[1] or ndimage.label(frame, np.ones((3, 3)))[1] == pieces[0]):
            kept.append(frame)
    return kept


def main() -> None:
    """Both forms in turn; medians."""
    torch.set_num_threads(1)
    rng, alphas = np.random.default_rng(0), weights(FRAMES)
    pair = [torch.from_numpy(blob(rng, SIZE, AREA, at))[None] for at in ((380.0, 420.0), (600.0, 640.0))]
    ours, reference = [], []
    for repeat in range(REPEATS):
        clock = time.process_time()
        frames = interpolate(*pair, alphas)
        ours.append(time.process_time() - clock)
        if repeat < 2:
            clock = time.process_time()
            plain(*(mask[0].numpy() for mask in pair), alphas)
            reference.append(time.process_time() - clock)
    assert len(frames.kept) == FRAMES, frames.refused

    kept = {}
    off: list[list[float]] = [[], [], []]
    for kind, draw in KINDS.items():
        pairs = [draw(np.random.default_rng(index)) for index in range(PAIRS)]
        kept[kind] = []
        for form, factors in zip(FORMS, off):
            drawn = [interpolate(*pair, alphas, **form) for pair in pairs]
            kept[kind].append(round(sum(len(frames.kept) for frames in drawn) / (PAIRS * FRAMES), 3))
            if kind == "cracks":
                for (a, b), frames in zip(pairs, drawn):
                    ends = width(a), width(b)
                    for mask, alpha in zip(frames.masks, alphas):
                        factors.append(abs(math.log(width(mask) / ((1 - alpha) * ends[0] + alpha * ends[1]))))
    ours_s, reference_s = statistics.median(ours), statistics.median(reference)
    print(json.dumps({
        "name": "mask_interpolation", "size": SIZE, "area": round(pair[0].float().mean().item(), 4), "frames": FRAMES,
        "ours_s": round(ours_s, 4), "reference_s": round(reference_s, 3), "ratio": round(ours_s / reference_s, 4),
        "two_piece_kept": kept["two_pieces"][-1], "kept": kept,
        "crack_width": [round(math.exp(np.quantile(factors, 0.9)), 2) for factors in off[1:]],
    }))  # fmt: skip
    assert kept["two_pieces"][-1] == 1, "a frame of a two-piece pair is not kept"


if __name__ == "__main__":
    main()
