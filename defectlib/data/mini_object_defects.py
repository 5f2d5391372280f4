"""The defects of gear and nut; they lie on the object.

Every function takes the defect-free scene, the lamp (for cast shadows) and a generator, and returns the changed scene
and the coverage (n, n) in [0, 1] that the mask is made of. Lengths are in px of a 128 px image.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defectlib.data.mini_scene import (
    SIDE,
    Lamp,
    Rng,
    Scene,
    capsules,
    fractal,
    inside,
    mix,
    noise,
    smoothstep,
)
from defectlib.data.mini_subjects import GEAR_TEETH
from defectlib.data.mini_tools import (
    Drawn,
    blob,
    crack_strokes,
    groove,
    on_object,
    pores,
    walk,
)


def gear_corrosion(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """Rust: patchy, brown to orange, dull and rough, with specks around it."""
    tip = scene.pose["tip"]
    centre = on_object(scene, tip * rng.uniform(0.35, 0.75), rng.uniform(0, 2 * np.pi))
    level = blob(rng, scene.n, centre, rng.uniform(25, 36), 0.30) + 0.30 * fractal(rng, 16, scene.n, 3)
    rust = smoothstep(0.0, 0.35, level) * scene.cover
    fine = fractal(rng, 22, scene.n, 3)
    tone = smoothstep(-1.3, 1.5, fine - 0.9 * level + 0.5)
    colour = mix(np.broadcast_to(np.array([0.24, 0.12, 0.07]), scene.albedo.shape), (0.68, 0.36, 0.14), tone)
    return replace(
        scene,
        albedo=mix(scene.albedo, colour, 0.94 * rust),
        relief=scene.relief + 0.28 * rust * fine,
        gloss=scene.gloss * (1 - 0.9 * rust),
        sheen=scene.sheen * (1 - 0.95 * rust),
    ), rust


def gear_crack(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A fatigue crack from the bore outwards or from a tooth root inwards."""
    pose, angle = scene.pose, rng.uniform(0, 2 * np.pi)
    inwards = rng.random() < 0.4
    if inwards:
        angle = 2 * np.pi * (rng.integers(GEAR_TEETH)) / GEAR_TEETH
    start = on_object(scene, pose["root"] - 0.3 if inwards else pose["bore"] + 0.3, angle)
    heading = angle + scene.pose["turn"] + np.pi * inwards + rng.normal(0, 0.3)
    length = pose["tip"] * rng.uniform(0.5, 0.75)
    distance = capsules(scene.n, crack_strokes(rng, start, heading, length, rng.uniform(1.1, 1.7)))
    return groove(scene, distance, 1.1, 0.88, 0.2), inside(distance - 0.3) * scene.cover


def gear_missing_tooth(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """One tooth or two neighbours broken off above the root; the stump shows grainy fresh metal."""
    count = 1 + (rng.random() < 0.35)
    middle = (rng.integers(GEAR_TEETH) + 0.5 * count) * 2 * np.pi / GEAR_TEETH
    away = np.abs(np.angle(np.exp(1j * (scene.features["angle"] - middle))))
    pose, r = scene.pose, scene.features["radius"]
    height = pose["tip"] - pose["root"]
    line = pose["root"] + height * rng.uniform(0.05, 0.25) + 0.7 * noise(rng, 30, scene.n)
    line = line + rng.uniform(-0.1, 0.1) * SIDE * np.angle(np.exp(1j * (scene.features["angle"] - middle)))
    sector = (away < count * np.pi / GEAR_TEETH).astype(float)
    gone = sector * inside(line - r)
    stump = sector * inside(line - r - 2.6) * (1 - gone) * scene.cover
    grain = fractal(rng, 50, scene.n, 2)
    return replace(
        scene,
        albedo=mix(scene.albedo, (0.42 + 0.14 * grain)[..., None] * np.ones(3), 0.85 * stump),
        relief=scene.relief - 0.5 * stump * (r - line + 2.6),
        sheen=scene.sheen * (1 - stump),
        cover=scene.cover * (1 - gone),
    ), np.maximum(gone * scene.cover, stump)


def nut_broken_corner(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A corner broken off: outline gone, and a coarse grey fracture face sloping down to the break."""
    angle = np.deg2rad(30 + 60 * rng.integers(6)) + rng.normal(0, 0.12)
    along = scene.features["x"] * np.cos(angle) + scene.features["y"] * np.sin(angle)
    far = 1.155 * scene.pose["flat"] * rng.uniform(0.66, 0.80)
    past = along - far + 1.0 * fractal(rng, 10, scene.n, 3)
    width = rng.uniform(3.5, 7)
    gone, broken = inside(width - past), inside(-past)
    grain = fractal(rng, 26, scene.n, 3)
    face = broken * (1 - gone)
    return replace(
        scene,
        albedo=mix(scene.albedo, (0.60 + 0.12 * grain)[..., None] * np.ones(3), 0.9 * face),
        relief=scene.relief - face * (0.55 * np.clip(past, 0, None) - 0.12 * grain),
        gloss=scene.gloss * (1 - 0.5 * face),
        sheen=scene.sheen * (1 - face),
        cover=scene.cover * (1 - gone),
    ), broken * scene.cover


def nut_heat_tint(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """Tempering colours of an overheated face: straw, bronze, purple, blue towards the hottest point."""
    centre = on_object(scene, scene.pose["flat"] * rng.uniform(0.5, 0.95), rng.uniform(0, 2 * np.pi))
    level = blob(rng, scene.n, centre, rng.uniform(30, 42), 0.14, 4)
    stops = np.array([0.0, 0.25, 0.5, 0.72, 1.0])
    tints = np.array(
        [[1.0, 0.96, 0.84], [1.06, 0.80, 0.38], [0.84, 0.46, 0.26], [0.52, 0.32, 0.56], [0.34, 0.48, 0.82]]
    )
    tint = np.stack([np.interp(level, stops, tints[:, channel]) for channel in range(3)], -1)
    share = smoothstep(-0.02, 0.16, level) * scene.cover
    albedo = mix(scene.albedo, scene.albedo * tint, share)
    return replace(scene, albedo=albedo, sheen=scene.sheen * (1 - 0.6 * share)), smoothstep(
        0.03, 0.1, level
    ) * scene.cover


def nut_pinhole(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """Casting pores on one part of the face."""
    angle, low, high = rng.uniform(0, 2 * np.pi), 1.18 * scene.pose["bore"], 0.93 * scene.pose["flat"]
    holes = []
    for _ in range(rng.integers(3, 8)):
        point = on_object(scene, rng.uniform(low, high), angle + rng.normal(0, 0.38))
        holes.append((point, rng.uniform(1.1, 2.1)))
    changed, cover = pores(scene, holes)
    return changed, cover * scene.cover


def nut_scratch(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """One to three long scratches side by side: bright bare metal with a dark edge."""
    centre = on_object(scene, 0.76 * scene.pose["flat"], rng.uniform(0, 2 * np.pi))
    heading, strokes = rng.uniform(0, np.pi), []
    for _ in range(rng.integers(1, 4)):
        length, turn = rng.uniform(30, 62), heading + rng.normal(0, 0.12)
        start = centre + rng.normal(0, 3.5, 2) - 0.5 * length * np.array([np.sin(turn), np.cos(turn)])
        path = walk(rng, start, turn, length, 0.05)
        strokes.append((path, rng.uniform(0.75, 1.15) * np.sin(np.linspace(0.1, np.pi - 0.1, len(path))) ** 0.8))
    face = scene.features["face"]
    distance = np.where(face > 0.5, capsules(scene.n, strokes), 5.0)
    bare, side = inside(distance), np.exp(-(((distance - 0.85) / 0.6) ** 2))
    albedo = mix(scene.albedo * (1 - 0.58 * side * face)[..., None], (0.92, 0.92, 0.90), 0.8 * bare)
    relief = scene.relief - 0.6 * inside(distance, 1.2) * face
    return replace(scene, albedo=albedo, relief=relief, sheen=scene.sheen + 0.15 * bare), inside(distance - 0.5) * face
