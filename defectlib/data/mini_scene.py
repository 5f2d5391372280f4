"""The optics of ``mini``: a surface with colour and relief, a lamp, a camera.

A defect of ``mini`` is a change of the *material* (colour, relief, gloss, outline) made before the lamp is switched
on, so that a groove gets its shadow and its bright lip from the same light as everything around it.

Lengths and heights are in px of a 128 px image whatever the size that is rendered; images are rendered at twice their
size and shrunk by area. Colours are floats in [0, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.float64]
Rng = np.random.Generator

SIDE = 128.0
SUPERSAMPLING = 2


@dataclass(frozen=True)
class Scene:
    """What lies under the camera, on a grid of (n, n) points.

    ``albedo`` (n, n, 3), ``relief`` in px, ``gloss`` >= 0 and ``sheen`` (light added by fine grooves) describe the
    surface; ``cover`` in [0, 1] is where the object is and ``backdrop`` (n, n, 3) what lies behind it. ``pose`` holds
    numbers and ``features`` maps that defects orient themselves by.
    """

    albedo: Array
    relief: Array
    gloss: Array
    sheen: Array
    cover: Array
    backdrop: Array | None = None
    pose: dict[str, float] = field(default_factory=dict)
    features: dict[str, Array] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Grid points along a side."""
        return self.relief.shape[0]


@dataclass(frozen=True)
class Lamp:
    """A far lamp: ``azimuth`` and ``elevation`` in radians (azimuth 0 lights from the right, pi/2 from below)."""

    azimuth: float
    elevation: float

    @property
    def direction(self) -> tuple[float, float, float]:
        """Unit vector (x, y, z) towards the lamp; z towards the camera."""
        flat = np.cos(self.elevation)
        return flat * np.cos(self.azimuth), flat * np.sin(self.azimuth), np.sin(self.elevation)


def draw_lamp(rng: Rng) -> Lamp:
    """Any side, 38 to 60 degrees above the table."""
    return Lamp(rng.uniform(0, 2 * np.pi), np.deg2rad(rng.uniform(38, 60)))


def axes(n: int) -> tuple[Array, Array]:
    """Column of y and row of x of the grid points, in px of 128."""
    line = (np.arange(n) + 0.5) * SIDE / n
    return line[:, None], line[None, :]


def smoothstep(low: float, high: float, value: Array) -> Array:
    """0 below ``low``, 1 above ``high``, a cubic between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _spline_weights(cells: int, n: int) -> tuple[NDArray[np.int64], Array]:
    position = (np.arange(n) + 0.5) / n * cells
    start = np.floor(position).astype(np.int64)
    f = position - start
    weights = np.stack([(1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3]) / 6
    return start, weights


def noise(rng: Rng, cells: int | tuple[int, int], n: int) -> Array:
    """Smooth noise (n, n) of mean 0 and variance about 1: a cubic B-spline over ``cells`` (rows, columns)."""
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    values = rng.standard_normal((rows + 3, columns + 3))
    start, weights = _spline_weights(rows, n)
    values = sum(weights[k][:, None] * values[start + k] for k in range(4))
    start, weights = _spline_weights(columns, n)
    return sum(weights[k][None, :] * values[:, start + k] for k in range(4)) / 0.479


def fractal(rng: Rng, cells: int, n: int, octaves: int = 4, gain: float = 0.55) -> Array:
    """Sum of noises, each twice as fine and ``gain`` as strong as the one before; mean 0, variance about 1."""
    weights = gain ** np.arange(octaves)
    total = sum(weight * noise(rng, cells * 2**k, n) for k, weight in enumerate(weights))
    return total / np.sqrt((weights**2).sum())


def profile(rng: Rng, pitch: float, at: Array, reach: float = 200.0) -> Array:
    """One-dimensional noise read at positions ``at`` (px): lathe rings along a radius, brush marks across."""
    knots = np.arange(-reach, reach, pitch)
    return np.interp(at, knots, rng.standard_normal(len(knots)))


def capsules(n: int, strokes: Sequence[tuple[Array, Array]], margin: float = 5.0) -> Array:
    """Signed distance (n, n) in px to tapering strokes, negative inside, no larger than ``margin`` outside.

    Args:
        n: Grid points along a side.
        strokes: Pairs of points (k, 2) as (y, x) and half widths (k,), both in px.
        margin: How far around a stroke the distance is worked out.
    """
    step = SIDE / n
    y, x = axes(n)
    distance = np.full((n, n), margin)
    for points, radii in strokes:
        for (ay, ax), (by, bx), ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:]):
            pad = margin + max(ra, rb)
            rows = slice(max(0, int((min(ay, by) - pad) / step)), max(0, int((max(ay, by) + pad) / step) + 2))
            columns = slice(max(0, int((min(ax, bx) - pad) / step)), max(0, int((max(ax, bx) + pad) / step) + 2))
            py, px = y[rows] - ay, x[:, columns] - ax
            length = max((by - ay) ** 2 + (bx - ax) ** 2, 1e-9)
            t = np.clip((py * (by - ay) + px * (bx - ax)) / length, 0, 1)
            away = np.hypot(py - t * (by - ay), px - t * (bx - ax)) - (ra + t * (rb - ra))
            distance[rows, columns] = np.minimum(distance[rows, columns], away)
    return distance


def inside(distance: Array, soft: float | None = None) -> Array:
    """Coverage in [0, 1] of the points with negative signed distance; the edge is ``soft`` px wide (one grid step)."""
    return np.clip(0.5 - distance / (soft or SIDE / distance.shape[0]), 0, 1)


def mix(a: Array, b: Array | Sequence[float], share: Array) -> Array:
    """``share`` (n, n) of colour ``b`` over ``a`` (n, n, 3)."""
    return a + share[..., None] * (np.asarray(b) - a)


def illuminate(scene: Scene, lamp: Lamp, ambient: float = 0.35) -> Array:
    """Colour (n, n, 3) under the lamp: Lambert and Blinn-Phong terms, and the object's shadow on the backdrop.

    A flat matt surface keeps its albedo, so photographs pass unchanged where nothing was added to them.
    """
    step = SIDE / scene.n
    slope_y, slope_x = np.gradient(scene.relief, step)
    norm = np.sqrt(slope_x**2 + slope_y**2 + 1)
    lx, ly, lz = lamp.direction
    lambert = np.clip((-slope_x * lx - slope_y * ly + lz) / norm, 0, None) / lz
    hx, hy, hz = np.array([lx, ly, lz + 1]) / np.sqrt(2 + 2 * lz)
    facing = np.clip((-slope_x * hx - slope_y * hy + hz) / norm, 0, 1)
    # The flat face's own highlight is taken off: a telecentric lens does not see it.
    highlight = np.clip(facing**30 - 0.6 * hz**30, 0, None)
    colour = scene.albedo * (ambient + (1 - ambient) * lambert)[..., None]
    colour = colour + (scene.gloss * highlight + scene.sheen)[..., None]
    if scene.backdrop is None:
        return colour
    shadow = np.roll(scene.cover, (-round(3.5 * ly / step), -round(3.5 * lx / step)), axis=(0, 1))
    shadow = gaussian_filter(shadow, 2.0 / step, truncate=3)
    ground = scene.backdrop * (1 - 0.4 * shadow)[..., None]
    return mix(ground, colour, scene.cover)


def photograph(colour: Array, rng: Rng, size: int, blur: float = 0.45) -> Array:
    """The camera: uneven light, gain, vignetting, white balance, defocus, noise; (size, size, 3) in [0, 1]."""
    n = colour.shape[0]
    y, x = (line / SIDE * 2 - 1 for line in axes(n))
    turn, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.2)
    light = 1 + tilt * (np.cos(turn) * x + np.sin(turn) * y)
    light = light * (1 - rng.uniform(0, 0.12) * (x**2 + y**2)) * rng.uniform(0.86, 1.12)
    colour = colour * light[..., None] * (1 + rng.normal(0, 0.018, 3))
    sigma = rng.uniform(0.1, blur) * n / SIDE
    colour = gaussian_filter(colour, (sigma, sigma, 0), truncate=3)
    colour = shrink(colour, size)
    grain = rng.uniform(0.006, 0.016) * np.sqrt(0.4 + np.clip(colour, 0, 1))
    return np.clip(colour + grain * rng.standard_normal(colour.shape), 0, 1)


def shrink(field: Array, size: int) -> Array:
    """Mean over the grid points of each pixel: (n, n[, 3]) to (size, size[, 3])."""
    k = field.shape[0] // size
    return field.reshape(size, k, size, k, *field.shape[2:]).mean(axis=(1, 3))
