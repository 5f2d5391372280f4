"""What the defects of ``mini`` are made of: paths, cracks, pores, blobs, and things that lie on a surface.

Lengths are in px of a 128 px image; points are (y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter

from defectlib.data.mini_scene import (
    SIDE,
    Array,
    Lamp,
    Rng,
    Scene,
    axes,
    capsules,
    fractal,
    inside,
    mix,
)

Drawn = tuple[Scene, Array]
Stroke = tuple[Array, Array]


def walk(rng: Rng, start: Sequence[float], heading: float, length: float, wander: float, step: float = 3.0) -> Array:
    """Points (k, 2) as (y, x) of a random walk that keeps to its heading."""
    count = max(3, round(length / step))
    turns = np.zeros(count)
    for i in range(1, count):
        turns[i] = 0.6 * turns[i - 1] + rng.normal(0, wander)
    turns += heading
    moves = step * np.stack([np.sin(turns), np.cos(turns)], 1)
    return np.concatenate([[start], start + np.cumsum(moves, 0)])


def taper(points: Array, width: float, blunt: float = 0.6) -> Array:
    """Half widths (k,) along a path, from ``width`` down to 0."""
    return width * (1 - np.linspace(0, 1, len(points))) ** blunt


def crack_strokes(rng: Rng, start: Sequence[float], heading: float, length: float, width: float) -> list[Stroke]:
    """A jagged crack that tapers, with one to three thinner branches."""
    main = walk(rng, start, heading, length, 0.33)
    strokes = [(main, width * np.minimum(1, np.linspace(0.35, 6, len(main))) * taper(main, 1.0))]
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(len(main) // 5, max(len(main) * 3 // 4, len(main) // 5 + 1))
        away = heading + rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)
        branch = walk(rng, main[at], away, length * rng.uniform(0.15, 0.4), 0.35)
        strokes.append((branch, taper(branch, 0.75 * strokes[0][1][at])))
    return strokes


def groove(scene: Scene, distance: Array, depth: float, dark: float, lip: float) -> Scene:
    """Cut a groove where ``distance`` is negative: deep, dark inside, with a slightly raised lip."""
    relief = scene.relief - depth * inside(distance, 1.4) + lip * np.exp(-(((distance - 0.8) / 0.6) ** 2))
    shade = 1 - dark * inside(distance, 0.9)
    return replace(scene, albedo=scene.albedo * shade[..., None], relief=relief, sheen=scene.sheen * shade)


def pores(scene: Scene, holes: Sequence[tuple[Array, float]]) -> Drawn:
    """Round bowls, given as (point, radius), dark inside and with a thin bright rim."""
    strokes = [(np.stack([p, p + 0.1]), np.full(2, radius)) for p, radius in holes]
    distance = capsules(scene.n, strokes)
    bowl = np.clip(-distance / 1.6, 0, 1)
    shade = 1 - 0.72 * inside(distance, 1.0) * (0.55 + 0.45 * bowl)
    relief = scene.relief - 2.2 * bowl + 0.18 * np.exp(-(((distance - 0.6) / 0.5) ** 2))
    changed = replace(scene, albedo=scene.albedo * shade[..., None], relief=relief, sheen=scene.sheen * shade)
    return changed, inside(distance - 0.3)


def blob(rng: Rng, n: int, centre: Sequence[float], radius: float, ragged: float, cells: int = 6) -> Array:
    """A level (n, n), about 1 in the middle and 0 at a ragged, oblong outline of mean radius ``radius``."""
    y, x = axes(n)
    y, x = y - centre[0], x - centre[1]
    turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.5)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    far = np.hypot(along / np.sqrt(stretch), across * np.sqrt(stretch)) / radius
    return 1 - far**2 + ragged * fractal(rng, cells, n, 4) * np.minimum(1, 0.3 + far)


def shadowed(scene: Scene, cover: Array, lamp: Lamp, reach: float, strength: float) -> Array:
    """The scene's albedo with the shadow of something lying on it."""
    step = SIDE / scene.n
    lx, ly, _ = lamp.direction
    moved = np.roll(cover, (-round(reach * ly / step), -round(reach * lx / step)), axis=(0, 1))
    return scene.albedo * (1 - strength * gaussian_filter(moved, 0.9 / step, truncate=3))[..., None]


def laid(scene: Scene, lamp: Lamp, cover: Array, distance: Array, colour: Array, height: float, reach: float) -> Scene:
    """Something round lying on the surface, with its shadow."""
    albedo = mix(shadowed(scene, cover, lamp, reach, 0.6), colour, cover)
    round_top = np.sqrt(np.clip(-distance, 0, None))
    return replace(scene, albedo=albedo, relief=scene.relief + height * round_top)


def anywhere(rng: Rng, edge: float) -> Array:
    """A point (y, x) at least ``edge`` px inside the frame."""
    return rng.uniform(edge, SIDE - edge, 2)


def on_object(scene: Scene, radius: float, angle: float) -> Array:
    """Point (y, x) at polar coordinates of the object's own frame."""
    turn = angle + scene.pose["turn"]
    return np.array([scene.pose["y"] + radius * np.sin(turn), scene.pose["x"] + radius * np.cos(turn)])
