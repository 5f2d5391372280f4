"""The five categories of ``mini`` without defects: three photographic textures and two rendered objects.

The photographs are scikit-image's bundled ``brick``, ``grass`` and ``gravel`` (512 px, grey, CC0); each image is
another crop, turned, zoomed and coloured. Gear and nut are drawn from their outline's distance and a relief over it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter, label, map_coordinates

from defectlib.data.mini_scene import (
    SIDE,
    Array,
    Lamp,
    Rng,
    Scene,
    axes,
    fractal,
    inside,
    mix,
    noise,
    profile,
    smoothstep,
)

GEAR_TEETH = 14


@lru_cache
def _picture(name: str) -> Array:
    """One bundled photograph (512, 512) in [0, 1]; it comes with scikit-image's wheel, nothing is downloaded."""
    from skimage import data

    return getattr(data, name)() / 255.0


@lru_cache
def _bricks() -> Array:
    """Number of the brick at each point of the photograph (512, 512), 0 on mortar."""
    return label(gaussian_filter(_picture("brick"), 1.0) < 0.46)[0].astype(np.float64)


def _crop(rng: Rng, n: int, side: tuple[float, float], turn: float, start: float = 0.0) -> Array:
    """Coordinates (2, n, n) of a random square of the 512 px photographs.

    Args:
        rng: Source of the crop.
        n: Points along a side.
        side: Range of the square's side in px of the photograph.
        turn: Largest rotation in radians; every second crop is mirrored too.
        start: Rotation about which ``turn`` varies.
    """
    length = rng.uniform(*side)
    angle = start + rng.uniform(-turn, turn)
    mirror = rng.choice([-1.0, 1.0])
    reach = 0.5 * length * (abs(np.cos(angle)) + abs(np.sin(angle))) + 1
    cy, cx = rng.uniform(reach, 511 - reach, 2)
    y, x = ((line / SIDE - 0.5) * length for line in axes(n))
    x = mirror * x
    return np.stack([cy + y * np.cos(angle) + x * np.sin(angle), cx + x * np.cos(angle) - y * np.sin(angle)])


def _read(picture: Array, at: Array, order: int = 1) -> Array:
    return map_coordinates(picture, at, order=order, mode="reflect")


def _surface(albedo: Array, **features: Array) -> Scene:
    flat = np.zeros(albedo.shape[:2])
    return Scene(albedo, flat, flat, flat, np.ones_like(flat), features=features)


def brick(rng: Rng, lamp: Lamp, n: int) -> Scene:
    """A brick wall, red to brown, every brick of its own tone."""
    at = _crop(rng, n, (165, 225), 0.12, np.pi / 2)
    light = _read(_picture("brick"), at)
    tones = rng.normal(0, 1, (2, int(_bricks().max()) + 1))
    # A few over-burnt bricks are nearly as dark as a crack, so that darkness alone finds no defect.
    burnt = 1 - 0.55 * (rng.random(tones.shape[1]) < 0.16) * rng.uniform(0.5, 1.0, tones.shape[1])
    number = _read(_bricks(), at, order=0).astype(int)
    mortar = smoothstep(0.44, 0.62, light)
    clay = np.array([0.60, 0.33, 0.24]) * (1 + rng.normal(0, 0.05, 3))
    grey = np.array([0.74, 0.71, 0.66]) * (1 + rng.normal(0, 0.03, 3))
    tone = 1 + np.where(number > 0, 0.10 * tones[0][number], 0) + 0.05 * fractal(rng, 24, n, 3)
    warm = np.where(number > 0, 0.05 * tones[1][number], 0)
    tone = tone * np.where(number > 0, burnt[number], 1)
    stone = (light / 0.40)[..., None] * clay * np.stack([tone, tone - warm, tone - 1.3 * warm], -1)
    return _surface(mix(stone, (light / 0.72)[..., None] * grey, mortar), mortar=mortar)


def grass(rng: Rng, lamp: Lamp, n: int) -> Scene:
    """Turf from above, in greens that drift over the picture."""
    at = _crop(rng, n, (200, 290), np.pi)
    light = _read(_picture("grass"), at)
    dark, mid, pale = np.array([[0.08, 0.12, 0.06], [0.34, 0.46, 0.18], [0.78, 0.84, 0.52]])
    colour = mix(
        mix(np.broadcast_to(dark, (n, n, 3)), mid, smoothstep(0.12, 0.52, light)), pale, smoothstep(0.5, 0.95, light)
    )
    drift = 0.06 * fractal(rng, 4, n, 3) + rng.normal(0, 0.05)
    return _surface(colour * np.stack([1 + drift, 1 + 0.3 * drift, 1 - 0.3 * drift], -1), light=light)


def gravel(rng: Rng, lamp: Lamp, n: int) -> Scene:
    """Crushed stone, grey to sand."""
    at = _crop(rng, n, (190, 270), np.pi)
    light = _read(_picture("gravel"), at)
    warm = 0.04 * fractal(rng, 14, n, 2) + 0.015 * noise(rng, 4, n) + rng.normal(0, 0.03)
    tint = np.stack([1.02 + warm, 0.985 + 0.2 * warm, 0.93 - warm], -1)
    return _surface((1.08 * light)[..., None] * tint, light=light)


def _mat(rng: Rng, n: int, colour: tuple[float, float, float]) -> Array:
    """A plain matt surface (n, n, 3): a tone that drifts a little and a fine fibre."""
    grain = 0.035 * noise(rng, 64, n) + 0.025 * fractal(rng, 3, n, 2)
    return np.asarray(colour) * (1 + rng.normal(0, 0.04)) * (1 + grain)[..., None]


def _polar(rng: Rng, n: int) -> tuple[Array, Array, dict[str, float]]:
    """Coordinates (y, x) about an object's centre in its own turned frame, and its pose."""
    cy, cx = SIDE / 2 + rng.uniform(-5, 5, 2)
    turn = rng.uniform(0, 2 * np.pi)
    y, x = axes(n)
    y, x = y - cy, x - cx
    return y * np.cos(turn) - x * np.sin(turn), x * np.cos(turn) + y * np.sin(turn), {"y": cy, "x": cx, "turn": turn}


def _even(distance: Array) -> Array:
    """Divide by the gradient's length, so that a level function measures px near its zero."""
    gy, gx = np.gradient(distance, SIDE / distance.shape[0])
    return distance / np.maximum(np.hypot(gy, gx), 0.5)


def _bow_tie(angle: Array, lamp: Lamp, turn: float, sharpness: float) -> Array:
    """The two-winged glint of a turned face: brightest where its rings run across the lamp's direction."""
    return np.abs(np.cos(angle + turn - lamp.azimuth)) ** sharpness


def gear(rng: Rng, lamp: Lamp, n: int) -> Scene:
    """A turned steel spur gear with hub, recessed web, bore and keyway on a green mat."""
    y, x, pose = _polar(rng, n)
    tip = rng.uniform(46, 54)
    r, angle = np.hypot(y, x), np.arctan2(y, x)
    root, rim, hub, bore = 0.82 * tip, 0.66 * tip, 0.40 * tip, 0.20 * tip
    place = (angle * GEAR_TEETH / (2 * np.pi)) % 1.0 - 0.5
    edge = _even(r - root - (tip - root) * smoothstep(-0.33, -0.17, -np.abs(place)))
    key = np.maximum(np.abs(y) - 0.055 * tip, np.abs(x - bore) - 0.085 * tip)
    hole = np.minimum(r - bore, key)
    depth = np.minimum(-edge, hole)
    relief = 1.1 * smoothstep(0, 2.2, depth)
    relief = relief - 2.2 * smoothstep(0, 2.6, r - hub) * smoothstep(0, 2.6, rim - r)
    steel = np.array([0.56, 0.57, 0.60]) * (1 + rng.normal(0, 0.05))
    marks = 0.035 * profile(rng, 0.5, r) + 0.03 * profile(rng, 1.7, r) + 0.025 * fractal(rng, 8, n, 4)
    wings = _bow_tie(angle, lamp, pose["turn"], 14)
    sheen = (0.05 + 0.26 * wings) * (1 + 2.5 * marks)
    albedo = (1 + marks)[..., None] * (
        steel * (0.80 + 0.20 * smoothstep(0, 3, np.abs(r - 0.53 * tip) - 0.1 * tip))[..., None]
    )
    pose |= {"tip": tip, "root": root, "rim": rim, "hub": hub, "bore": bore}
    features = {"radius": r, "angle": angle, "face": smoothstep(0, 1.5, depth)}
    mat = _mat(rng, n, (0.20, 0.33, 0.27))
    return Scene(albedo, relief, np.full((n, n), 0.55), sheen, inside(-depth), mat, pose, features)


def nut(rng: Rng, lamp: Lamp, n: int) -> Scene:
    """A chamfered, zinc-plated hexagon nut with a threaded hole on a dark mat."""
    y, x, pose = _polar(rng, n)
    flat = rng.uniform(38, 45)
    r, angle = np.hypot(y, x), np.arctan2(y, x)
    turns = np.deg2rad([0, 60, 120])
    edge = np.max([np.abs(x * np.cos(t) + y * np.sin(t)) for t in turns], axis=0) - flat
    bore, thread = 0.57 * flat, 0.45 * flat
    depth = np.minimum(-edge, r - thread)
    relief = 0.8 * smoothstep(0, 1.6, -edge) - 0.42 * np.clip(r - 0.94 * flat, 0, None)
    relief = relief - 1.0 * np.clip(1.12 * bore - r, 0, 0.12 * bore)
    spiral = np.sin(2 * np.pi * 3 * (bore - r) / (bore - thread) + angle)
    threaded = smoothstep(0, 0.8, bore - r)
    relief = relief + 0.55 * threaded * spiral
    zinc = np.array([0.66, 0.65, 0.60]) * (1 + rng.normal(0, 0.05)) * (1 + rng.normal(0, 0.007, 3))
    marks = 0.03 * profile(rng, 0.6, y) + 0.02 * profile(rng, 2.0, y) + 0.04 * fractal(rng, 10, n, 3)
    sheen = (0.05 + 0.10 * _bow_tie(angle, lamp, pose["turn"], 8)) * (1 - threaded) * (1 + 2 * marks)
    albedo = (zinc * (1 - 0.45 * threaded)[..., None]) * (1 + marks)[..., None]
    pose |= {"flat": flat, "bore": bore, "thread": thread}
    features = {"radius": r, "angle": angle, "y": y, "x": x, "face": smoothstep(0, 1, -edge) * (r > 1.02 * bore)}
    mat = _mat(rng, n, (0.15, 0.155, 0.17))
    return Scene(albedo, relief, np.full((n, n), 0.5), sheen, inside(-depth), mat, pose, features)


SUBJECTS = {"brick": brick, "gear": gear, "grass": grass, "gravel": gravel, "nut": nut}
