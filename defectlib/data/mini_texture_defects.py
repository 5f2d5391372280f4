"""The defects of brick, grass and gravel.

Every function takes the defect-free scene, the lamp (for cast shadows) and a generator, and returns the changed scene
and the coverage (n, n) in [0, 1] that the mask is made of. Lengths are in px of a 128 px image.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defectlib.data.mini_scene import (
    Lamp,
    Rng,
    Scene,
    axes,
    capsules,
    fractal,
    inside,
    mix,
    noise,
    smoothstep,
)
from defectlib.data.mini_tools import (
    Drawn,
    anywhere,
    blob,
    crack_strokes,
    groove,
    laid,
    pores,
    shadowed,
    walk,
)


def brick_crack(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A crack across bricks and joints."""
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(55, 105)
    start = anywhere(rng, 44) - 0.5 * length * np.array([np.sin(heading), np.cos(heading)])
    distance = capsules(scene.n, crack_strokes(rng, start, heading, length, rng.uniform(1.2, 2.0)))
    return groove(scene, distance, 1.3, rng.uniform(0.62, 0.80), 0.3), inside(distance - 0.3)


def brick_efflorescence(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """White salt bloom: soft, powdery, stronger along the joints."""
    level = blob(rng, scene.n, anywhere(rng, 34), rng.uniform(21, 34), 0.35)
    level = level + 0.25 * scene.features["mortar"]
    salt = smoothstep(0.0, 0.75, level) * np.clip(0.62 + 0.22 * fractal(rng, 26, scene.n, 3), 0, 1)
    salt = np.clip(rng.uniform(0.75, 1.2) * salt, 0, 0.92)
    return replace(scene, albedo=mix(scene.albedo, (0.90, 0.89, 0.86), salt)), smoothstep(0.12, 0.20, level)


def brick_pinhole(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A group of small round pores."""
    centre, spread = anywhere(rng, 30), rng.uniform(7, 15)
    points = centre + spread * rng.normal(0, 1, (rng.integers(4, 9), 2))
    return pores(scene, [(p, rng.uniform(1.2, 2.4)) for p in points])


def brick_spalling(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """The fired skin broken off: a sharp edge, and the paler, rough inside of the brick."""
    level = blob(rng, scene.n, anywhere(rng, 38), rng.uniform(24, 34), 0.34, 7)
    level = level - 0.9 * scene.features["mortar"] + 0.10 * np.abs(noise(rng, 22, scene.n))
    gone = smoothstep(-0.02, 0.06, level)
    rough = fractal(rng, 18, scene.n, 4)
    core = np.array([0.80, 0.56, 0.43]) * rng.uniform(0.86, 1.06) * (1 + 0.13 * rough)[..., None]
    relief = scene.relief - gone * (1.5 + 0.7 * np.clip(level, 0, 1) - 0.42 * rough)
    return replace(scene, albedo=mix(scene.albedo, core, rng.uniform(0.75, 0.92) * gone), relief=relief), gone


def grass_burn(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A scorched patch: straw at the soft edge, charred in the middle; the blades still show."""
    level = blob(rng, scene.n, anywhere(rng, 34), rng.uniform(23, 35), 0.42)
    level = level + 0.55 * (0.42 - scene.features["light"])
    light = scene.features["light"][..., None]
    straw = (0.25 + 1.05 * light) * np.array([0.66, 0.54, 0.30])
    charred = (0.10 + 0.55 * light) * np.array([0.36, 0.29, 0.24])
    burnt = mix(straw, charred, smoothstep(0.3, rng.uniform(0.8, 1.3), level))
    share = smoothstep(-0.08, 0.30, level)
    return replace(scene, albedo=mix(scene.albedo, burnt, rng.uniform(0.8, 0.96) * share)), smoothstep(0.0, 0.12, level)


def grass_cut(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A slit made by a blade: straight, down to dark earth, pale frayed blade ends along it."""
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(45, 85)
    start = anywhere(rng, 42) - 0.5 * length * np.array([np.sin(heading), np.cos(heading)])
    path = walk(rng, start, heading, length, 0.05)
    widths = rng.uniform(1.9, 2.8) * np.sin(np.linspace(0.12, np.pi - 0.12, len(path))) ** 0.5
    distance = capsules(scene.n, [(path, widths)])
    light = scene.features["light"]
    distance = distance + 0.55 * noise(rng, 44, scene.n) + 2.6 * (light - 0.42)
    fringe = np.exp(-(((distance - 1.1) / 0.8) ** 2)) * smoothstep(0.35, 0.6, light)
    albedo = mix(scene.albedo, (0.80, 0.78, 0.52), 0.7 * fringe)
    albedo = mix(albedo, (0.085, 0.065, 0.05), 0.92 * inside(distance, 1.6))
    changed = replace(scene, albedo=albedo, relief=scene.relief - 0.8 * inside(distance, 2.0))
    return changed, inside(distance - 0.7)


def grass_thread(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A loose coloured thread, curled, half hidden by single blades."""
    colours = [(0.86, 0.84, 0.80), (0.78, 0.16, 0.14), (0.20, 0.36, 0.80), (0.92, 0.52, 0.12)]
    colour = np.array(colours[rng.integers(len(colours))])
    path = walk(rng, anywhere(rng, 34), rng.uniform(0, 2 * np.pi), rng.uniform(55, 100), 0.42)
    distance = capsules(scene.n, [(path, np.full(len(path), rng.uniform(1.0, 1.35)))])
    seen = inside(distance) * (1 - 0.9 * smoothstep(0.66, 0.76, scene.features["light"]))
    changed = laid(scene, lamp, seen, distance, colour * np.ones((scene.n, scene.n, 1)), 1.1, 1.6)
    return changed, inside(distance - 0.15)


def gravel_oil(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A spill: stones wet, dark and saturated, with glints on the ones that stand out."""
    light = scene.features["light"]
    level = blob(rng, scene.n, anywhere(rng, 34), rng.uniform(21, 33), 0.28)
    level = level - 0.45 * (light - 0.5)
    wet = smoothstep(-0.02, 0.16, level)
    dark = rng.uniform(0.4, 0.58) * scene.albedo**1.25 * np.array([1.06, 0.98, 0.86])
    glint = wet * smoothstep(0.62, 0.86, light) * rng.uniform(0.25, 0.5)
    return replace(scene, albedo=mix(scene.albedo, dark, 0.94 * wet), sheen=scene.sheen + glint), wet


def gravel_plastic(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A fragment of coloured plastic: a flat polygon with a crease."""
    colours = [(0.13, 0.35, 0.72), (0.80, 0.17, 0.15), (0.93, 0.72, 0.12), (0.16, 0.58, 0.38)]
    colour = np.array(colours[rng.integers(len(colours))])
    y, x = axes(scene.n)
    centre, size = anywhere(rng, 18), rng.uniform(5.5, 10)
    corners = np.sort(rng.uniform(0, 2 * np.pi / 5, 5) + 2 * np.pi / 5 * np.arange(5))[: rng.integers(4, 6)]
    planes = [(y - centre[0]) * np.sin(a) + (x - centre[1]) * np.cos(a) - size * rng.uniform(0.5, 1.0) for a in corners]
    distance = np.maximum(np.max(planes, axis=0), np.hypot(y - centre[0], x - centre[1]) - 1.25 * size)
    crease = rng.uniform(0, 2 * np.pi)
    fold = np.abs((y - centre[0]) * np.sin(crease) + (x - centre[1]) * np.cos(crease) - rng.normal(0, 1.5))
    cover = inside(distance)
    body = colour * (1 + 0.04 * fractal(rng, 12, scene.n, 2))[..., None]
    albedo = mix(shadowed(scene, cover, lamp, 2.6, 0.65), body, cover)
    relief = scene.relief + cover * (1.0 + 0.22 * fold) + 0.5 * np.clip(-distance, 0, 1.2)
    return replace(scene, albedo=albedo, relief=relief, gloss=scene.gloss + 0.35 * cover), cover


def gravel_twig(scene: Scene, lamp: Lamp, rng: Rng) -> Drawn:
    """A dry twig, bent and forked."""
    heading, length = rng.uniform(0, 2 * np.pi), rng.uniform(45, 80)
    start = anywhere(rng, 42) - 0.5 * length * np.array([np.sin(heading), np.cos(heading)])
    main = walk(rng, start, heading, length, 0.10, 4.0)
    strokes = [(main, rng.uniform(1.7, 2.4) * np.linspace(1, 0.45, len(main)))]
    for _ in range(rng.integers(1, 3)):
        at = rng.integers(len(main) // 4, len(main) * 3 // 4)
        fork = walk(rng, main[at], heading + rng.choice([-1, 1]) * rng.uniform(0.4, 0.8), rng.uniform(10, 24), 0.1)
        strokes.append((fork, 0.75 * strokes[0][1][at] * np.linspace(1, 0.5, len(fork))))
    distance = capsules(scene.n, strokes)
    bark = np.array([0.33, 0.20, 0.11]) * rng.uniform(0.75, 1.25) * (1 + 0.16 * fractal(rng, 40, scene.n, 2))[..., None]
    return laid(scene, lamp, inside(distance), distance, bark, 1.3, 2.4), inside(distance)
