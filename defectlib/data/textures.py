"""Procedural textures: what the small feature extractor of ``metrics.tiny`` learns to tell apart.

Thirty-two classes: sixteen surfaces, each clean and with defect-like marks (blobs, scratches, cracks) on it. Within a
class colour, contrast, scale, phase and lighting vary; families that differ in orientation or scale alone
(``brushed_across`` and ``brushed_along``, ``stripes_fine`` and ``stripes_coarse``) are classes of their own, so that
features see both.

Nothing here draws a category of ``mini`` or reads a picture: the extractor has not seen what it later measures.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Rng = np.random.Generator
SIZE = 64


def unit(field: Array) -> Array:
    """Stretch to mean 0.5 and standard deviation 0.22, clipped to [0, 1]."""
    return np.clip(0.5 + 0.22 * (field - field.mean()) / (field.std() + 1e-9), 0, 1)


def noise(rng: Rng, n: int, sigma_y: float, sigma_x: float, turn: float = 0.0) -> Array:
    """White noise under a Gaussian filter of the given widths in px, its axes turned; periodic, made in one FFT."""
    fy, fx = np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None]
    gy, gx = fy * np.cos(turn) - fx * np.sin(turn), fy * np.sin(turn) + fx * np.cos(turn)
    gain = np.exp(-2 * np.pi**2 * ((sigma_y * gy) ** 2 + (sigma_x * gx) ** 2))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * gain, s=(n, n))
    return field / (field.std() + 1e-9)


def fractal(rng: Rng, n: int, slope: float) -> Array:
    """Noise whose amplitude falls with frequency to the power ``slope``; mean 0, variance 1."""
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    f[0, 0] = 1.0
    gain = f**-slope
    gain[0, 0] = 0.0
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((n, n))) * gain, s=(n, n))
    return field / field.std()


def grid(rng: Rng, n: int, pitch: float, turn: float | None = None, warp: float = 0.4) -> tuple[Array, Array]:
    """Coordinates (u, v) in units of ``pitch`` px, turned, shifted at random and bent by up to about ``warp`` px."""
    turn = rng.uniform(0, np.pi) if turn is None else turn
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    y = y + warp * noise(rng, n, 9, 9)
    x = x + warp * noise(rng, n, 9, 9)
    du, dv = rng.uniform(0, 8, 2)
    u = (x * np.cos(turn) + y * np.sin(turn)) / pitch + du
    v = (-x * np.sin(turn) + y * np.cos(turn)) / pitch + dv
    return u, v


def step(field: Array, soft: float) -> Array:
    """A soft step at 0: 0 below ``-soft``, 1 above ``soft``."""
    return np.clip(0.5 + field / (2 * soft), 0, 1)


def wave(u: Array, sharp: float) -> Array:
    """A wave of period 1 in [0, 1], from a sine (``sharp`` 1) towards a square."""
    return 0.5 + 0.5 * np.tanh(sharp * np.sin(2 * np.pi * u)) / np.tanh(sharp)


def clouds(rng: Rng, n: int) -> Array:
    """Fractal noise, strongest at low frequencies."""
    return unit(fractal(rng, n, rng.uniform(1.4, 2.2)))


def grain(rng: Rng, n: int) -> Array:
    """Fine isotropic grain, as of a blasted or cast surface."""
    sigma = rng.uniform(0.4, 1.3)
    return unit(noise(rng, n, sigma, sigma) + 0.3 * noise(rng, n, 8, 8))


def _brushed(rng: Rng, n: int, turn: float) -> Array:
    long, fine = rng.uniform(10, 30), rng.uniform(0.3, 0.9)
    turn = turn + rng.uniform(-0.2, 0.2)
    return unit(noise(rng, n, fine, long, turn) + 0.5 * noise(rng, n, 3 * fine, long, turn))


def brushed_across(rng: Rng, n: int) -> Array:
    """Metal brushed from side to side."""
    return _brushed(rng, n, 0.0)


def brushed_along(rng: Rng, n: int) -> Array:
    """Metal brushed from top to bottom."""
    return _brushed(rng, n, np.pi / 2)


def stripes_fine(rng: Rng, n: int) -> Array:
    """Stripes of 3 to 6 px in any direction."""
    u, _ = grid(rng, n, rng.uniform(3, 6))
    return wave(u, rng.uniform(0.5, 3))


def stripes_coarse(rng: Rng, n: int) -> Array:
    """Stripes of 10 to 24 px in any direction."""
    u, _ = grid(rng, n, rng.uniform(10, 24), warp=1.0)
    return wave(u, rng.uniform(0.5, 4))


def checker(rng: Rng, n: int) -> Array:
    """A chess board of 5 to 14 px squares."""
    u, v = grid(rng, n, 2 * rng.uniform(5, 14))
    return 0.5 + 0.5 * np.tanh(6 * np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v))


def tiles(rng: Rng, n: int) -> Array:
    """Square tiles in line, each of its own tone, with joints."""
    pitch, joint = rng.uniform(10, 26), rng.uniform(0.7, 1.6)
    u, v = grid(rng, n, pitch, turn=rng.uniform(-0.3, 0.3))
    tones = rng.uniform(0.45, 1, (97, 89))
    face = tones[np.floor(u).astype(int) % 97, np.floor(v).astype(int) % 89]
    edge = np.minimum(np.abs(u - np.round(u)), np.abs(v - np.round(v))) * pitch
    return np.clip(face + 0.05 * noise(rng, n, 1, 1), 0, 1) * step(edge - joint, 0.6)


def weave(rng: Rng, n: int) -> Array:
    """Plain weave: threads over and under each other in turn."""
    u, v = grid(rng, n, rng.uniform(5, 11), turn=rng.uniform(-0.5, 0.5))
    over = (np.floor(u) + np.floor(v)) % 2 < 1
    across, along = np.sin(np.pi * (u % 1)), np.sin(np.pi * (v % 1))
    warp = across**0.7 * (0.55 + 0.45 * along)
    weft = along**0.7 * (0.55 + 0.45 * across) * rng.uniform(0.6, 0.95)
    return np.clip(np.where(over, warp, weft), 0, 1)


def twill(rng: Rng, n: int) -> Array:
    """Twill fabric: diagonal ribs broken by the threads."""
    side = rng.choice([-1, 1])
    u, v = grid(rng, n, rng.uniform(3, 5), turn=rng.uniform(-0.25, 0.25))
    ribs = wave((np.floor(u) + side * v) / 4, 1.5)
    return np.clip(0.75 * ribs + 0.25 * np.sin(np.pi * (u % 1)), 0, 1)


def voronoi(rng: Rng, n: int, count: int) -> tuple[Array, Array, NDArray[np.int64]]:
    """Distances (n, n) in px to the nearest and second nearest of ``count`` scattered points, and which is nearest."""
    side = int(np.ceil(np.sqrt(count)))
    pitch = (n + 16) / side
    points = (
        np.stack(np.mgrid[:side, :side], -1).reshape(-1, 2) + rng.uniform(0.05, 0.95, (side * side, 2))
    ) * pitch - 8
    y, x = np.arange(n)[:, None, None], np.arange(n)[None, :, None]
    squared = (y - points[:, 0]) ** 2 + (x - points[:, 1]) ** 2
    nearest = squared.argmin(-1)
    first, second = np.sqrt(np.partition(squared, 1, axis=-1)[..., :2]).transpose(2, 0, 1)
    return first, second, nearest


def cells(rng: Rng, n: int) -> Array:
    """Flat Voronoi cells with dark borders, as of a glaze or a grain boundary picture."""
    count = int(rng.integers(9, 50))
    first, second, nearest = voronoi(rng, n, count)
    tones = rng.uniform(0.4, 1, 4 * count + 16)
    return tones[nearest] * (1 - rng.uniform(0.5, 1) * (1 - step(second - first - rng.uniform(0.7, 1.5), 0.8)))


def wood(rng: Rng, n: int) -> Array:
    """Growth rings cut lengthwise, with pores."""
    turn = rng.uniform(0, np.pi)
    u, v = grid(rng, n, n, turn=turn, warp=0.0)
    rings = rng.uniform(4, 10) * np.hypot(u - u.mean() + rng.uniform(0.2, 1.0), 0.25 * (v - v.mean()))
    rings = rings + rng.uniform(0.15, 0.4) * noise(rng, n, 5, 22, turn + np.pi / 2)
    late = (rings % 1) ** rng.uniform(1.5, 3)
    pores = np.maximum(noise(rng, n, 0.5, 5, turn + np.pi / 2) - 1.2, 0)
    return np.clip(0.9 - 0.65 * late - 0.25 * pores, 0, 1)


def dots(rng: Rng, n: int) -> Array:
    """A perforated sheet: round holes on a regular grid."""
    pitch = rng.uniform(6, 15)
    u, v = grid(rng, n, pitch)
    u = u + 0.5 * (np.floor(v) % 2) * rng.integers(0, 2)
    away = np.hypot(u % 1 - 0.5, v % 1 - 0.5) * pitch
    return step(away - rng.uniform(0.22, 0.36) * pitch, 0.7)


def speckle(rng: Rng, n: int) -> Array:
    """Flecks of three tones on plain ground, as of terrazzo."""
    size = rng.uniform(0.8, 2.0)
    field = np.full((n, n), rng.uniform(0.4, 0.6))
    for tone in rng.permutation([0.0, 0.25, 0.8, 1.0])[:3]:
        flecks = step(noise(rng, n, size, size) - rng.uniform(1.3, 1.9), 0.15)
        field = field + flecks * (tone - field)
    return field


def rust(rng: Rng, n: int) -> Array:
    """Two materials in ragged patches, one of them pitted."""
    patch = step(fractal(rng, n, rng.uniform(1.2, 1.6)) + rng.uniform(-0.5, 0.5), rng.uniform(0.1, 0.4))
    pits = np.maximum(noise(rng, n, 0.6, 0.6), 0)
    return np.clip(0.8 - 0.5 * patch - 0.25 * patch * pits + 0.04 * pits, 0, 1)


def gradient(rng: Rng, n: int) -> Array:
    """Smooth shading of a plain sheet, linear and radial."""
    y, x = np.mgrid[:n, :n] / (n - 1) - 0.5
    turn, (cy, cx) = rng.uniform(0, 2 * np.pi), rng.uniform(-0.6, 0.6, 2)
    share = rng.uniform(0, 1)
    return unit(share * (x * np.cos(turn) + y * np.sin(turn)) + (1 - share) * np.hypot(y - cy, x - cx))


SURFACES: tuple[Callable[[Rng, int], Array], ...] = (
    clouds, grain, brushed_across, brushed_along, stripes_fine, stripes_coarse, checker, tiles,
    weave, twill, cells, wood, dots, speckle, rust, gradient,
)  # fmt: skip
CLASSES = tuple(f"{s.__name__}{mark}" for s in SURFACES for mark in ("", "_marked"))


def colourise(tone: Array, rng: Rng) -> Array:
    """A tone in [0, 1] along a ramp of three colours of one hue and little saturation, as of materials; (n, n, 3)."""
    hue, saturation = rng.uniform(0, 1), rng.uniform(0, 0.55) * rng.integers(0, 2)
    low = rng.uniform(0.05, 0.6)
    levels = np.array([low, 0, low + rng.uniform(0.18, 0.95 - low)])
    levels[1] = levels[[0, 2]].mean() + rng.uniform(-0.08, 0.08)
    hues = hue + np.array([0, 0.02, 0.05]) * rng.normal(0, 1, 3)
    tint = 0.5 + 0.5 * np.cos(2 * np.pi * (hues[:, None] + np.array([0, 1 / 3, 2 / 3])))
    ramp = levels[:, None] * (1 - saturation * (1 - tint))
    return np.stack([np.interp(tone, [0, 0.5, 1], ramp[:, c]) for c in range(3)], -1)


def blob(rng: Rng, n: int) -> Array:
    """Coverage (n, n) of one to three ragged blobs with radii of 2 to 9 px."""
    y, x = np.mgrid[:n, :n]
    ragged = rng.uniform(0.3, 2.0) * noise(rng, n, 2.5, 2.5)
    cover = np.zeros((n, n))
    for _ in range(rng.integers(1, 4)):
        cy, cx = rng.uniform(6, n - 6, 2)
        radius, squash, turn = rng.uniform(2, 9), rng.uniform(0.5, 1), rng.uniform(0, np.pi)
        a = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        b = (-(x - cx) * np.sin(turn) + (y - cy) * np.cos(turn)) / squash
        cover = np.maximum(cover, step(radius - np.hypot(a, b) + ragged, rng.uniform(0.6, 2.0)))
    return cover


def line(rng: Rng, n: int) -> Array:
    """Coverage (n, n) of one or two scratches (straight) or cracks (wandering), 1 to 4 px wide."""
    cover = np.zeros((n, n))
    y, x = np.mgrid[:n, :n]
    wander = rng.uniform(0, 0.6)
    for _ in range(rng.integers(1, 3)):
        count = int(rng.integers(14, 40))
        heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wander, count)) * 0.5
        points = np.cumsum(1.6 * np.stack([np.sin(heading), np.cos(heading)], 1), axis=0)
        points += rng.uniform(0.25, 0.75, 2) * n - points.mean(0)
        squared = (y[..., None] - points[:, 0]) ** 2 + (x[..., None] - points[:, 1]) ** 2
        cover = np.maximum(cover, step(rng.uniform(0.6, 2.0) - np.sqrt(squared.min(-1)), 0.7))
    return cover


def mark(image: Array, rng: Rng) -> Array:
    """Draw a blob, a line or both in a colour that stands out from the surface by at least a quarter of the range."""
    n, kind = image.shape[0], rng.integers(0, 5)
    cover = np.maximum(blob(rng, n) if kind != 1 and kind != 3 else 0.0, line(rng, n) if kind not in (0, 2) else 0.0)
    mean = image.mean((0, 1))
    shift = rng.uniform(0.25, 0.5) * (1 if mean.mean() < 0.4 or (mean.mean() < 0.6 and rng.integers(0, 2)) else -1)
    colour = np.clip(mean + shift + rng.normal(0, 0.06, 3) * rng.integers(0, 2), 0, 1)
    return image + cover[..., None] * rng.uniform(0.75, 1) * (colour - image)


def camera(image: Array, rng: Rng) -> Array:
    """Uneven light, gain and sensor noise; (n, n, 3) in [0, 1]."""
    n = image.shape[0]
    y, x = np.mgrid[:n, :n] / (n - 1) - 0.5
    turn = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.85, 1.1) * (1 + rng.uniform(0, 0.3) * (x * np.cos(turn) + y * np.sin(turn)))
    return np.clip(image * light[..., None] + rng.uniform(0.003, 0.025) * rng.standard_normal(image.shape), 0, 1)


def draw(label: int, rng: Rng, size: int = SIZE) -> Tensor:
    """One texture of class ``CLASSES[label]``, float32 (3, size, size) in [-1, 1], the same for the same generator.

    Raises:
        ValueError: There is no such class.
    """
    if not 0 <= label < len(CLASSES):
        raise ValueError(f"there is no texture class {label}; there are {len(CLASSES)}")
    image = colourise(SURFACES[label // 2](rng, size), rng)
    if label % 2:
        image = mark(image, rng)
    pixels = np.round(camera(image, rng) * 255) / 127.5 - 1
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()


def batch(n: int, rng: Rng, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """``n`` textures (n, 3, size, size) in [-1, 1] and their labels (n,) int64, classes drawn evenly."""
    labels = rng.permutation(np.arange(n) % len(CLASSES)) if n >= len(CLASSES) else rng.integers(0, len(CLASSES), n)
    return torch.stack([draw(int(label), rng, size) for label in labels]), torch.from_numpy(labels.astype(np.int64))
