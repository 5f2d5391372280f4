"""The generated world that the ``tiny`` base model is trained on: surfaces, objects, marks on them, and words for it.

Nothing here draws a category of ``mini`` or reads a picture. Marks are painted flat on a tone, where ``mini`` cuts
them into a relief under a lamp; there is no gear or nut, and blocks in bond, fibres and pebbles are relatives of its
walls, lawns and gravel beds, drawn by other rules. What the base learns is what a large model would bring along:
materials, silhouettes, that a sentence names what is in the picture, and roughly what a crack or a stain is. What one
category's defects look like, and where they sit, few-shot adaptation has to add.

Five kinds of picture:

* ``surface`` and ``object``, clean or with a mark: "a photo of a grey weave with a scratch";
* ``part``: a mark alone on mid-grey: "a scratch on grey" (the second branch of dual-branch systems draws such);
* ``silhouette``: white on black, of an object or a mark: "a white mask of a scratch" (mask interpolation needs them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from defectlib.data import textures
from defectlib.data.textures import Array, Rng, step

SIZE = textures.SIZE
KINDS = {"surface": 0.38, "object": 0.32, "part": 0.1, "silhouette": 0.2}
MARKED = 0.6
# Things stand upright, lie on plain ground and have calm faces, mostly, as parts in photos do: a model this small then
# learns their forms. CALM is the share of them, and what is left of their material's contrast.
LEAN, PLAIN_GROUND = 0.1, 0.9
CALM, CONTRAST = 0.8, (0.05, 0.4)


class Picture(NamedTuple):
    """One picture of the world: image float32 (3, H, W) in [-1, 1], its prompt, the mark's mask bool (1, H, W)."""

    image: Tensor
    prompt: str
    mask: Tensor
    kind: str


def pebbles(rng: Rng, n: int) -> Array:
    """Rounded stones in a heap, each shaded from one side."""
    first, second, nearest = textures.voronoi(rng, n, int(rng.integers(25, 160)))
    tones = rng.uniform(0.35, 1, nearest.max() + 1)
    height = np.sqrt(np.clip(second - first, 0, None))
    slope = np.gradient(gaussian_filter(height, 0.6))
    turn = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.3, 0.9) * (np.cos(turn) * slope[0] + np.sin(turn) * slope[1])
    gap = step(second - first - rng.uniform(0.4, 1.2), 0.7)
    fine = 1 + 0.08 * textures.noise(rng, n, 0.6, 0.6)
    return np.clip(0.75 * tones[nearest] * light * fine * (0.25 + 0.75 * gap), 0, 1)


def fibres(rng: Rng, n: int) -> Array:
    """A felt of short straight fibres, laid one over another, with a main direction or without."""
    field = np.full((n, n), rng.uniform(0.1, 0.35))
    main, spread = rng.uniform(0, np.pi), rng.uniform(0.25, 1.6)
    for _ in range(5):
        turn = main + rng.normal(0, spread)
        strand = textures.noise(rng, n, rng.uniform(0.35, 0.6), rng.uniform(3, 8), turn)
        cover = step(strand - rng.uniform(0.5, 1.1), 0.25)
        field = field + cover * (np.clip(rng.uniform(0.35, 1.0) + 0.2 * strand, 0, 1) - field)
    return field


def blocks(rng: Rng, n: int) -> Array:
    """Rectangular blocks in bond, every row shifted by half a block, with rough faces."""
    pitch, joint, long = rng.uniform(9, 22), rng.uniform(0.6, 1.8), rng.uniform(1.4, 2.6)
    u, v = textures.grid(rng, n, pitch, turn=rng.uniform(-0.1, 0.1))
    u = u / long + 0.5 * (np.floor(v) % 2)
    face = rng.uniform(0.5, 1, (97, 89))[np.floor(u).astype(int) % 97, np.floor(v).astype(int) % 89]
    edge = np.minimum(long * np.abs(u - np.round(u)), np.abs(v - np.round(v))) * pitch
    rough = rng.uniform(0.02, 0.12) * textures.fractal(rng, n, rng.uniform(0.5, 1.4))
    return np.clip(rng.uniform(0.1, 0.4) + (face + rough - 0.25) * step(edge - joint, 0.8), 0, 1)


# The noun of each surface; two orientations or scales of one material share theirs.
SURFACES: dict[Callable[[Rng, int], Array], str] = {
    textures.clouds: "marble", textures.grain: "cast surface", textures.brushed_across: "brushed metal",
    textures.brushed_along: "brushed metal", textures.stripes_fine: "striped cloth",
    textures.stripes_coarse: "striped sheet", textures.checker: "checkered board", textures.tiles: "tile floor",
    textures.weave: "woven cloth", textures.twill: "twill fabric", textures.cells: "glaze",
    textures.wood: "wood", textures.dots: "perforated sheet", textures.speckle: "terrazzo",
    textures.rust: "weathered plate", textures.gradient: "plain sheet", pebbles: "stones", fibres: "felt",
    blocks: "masonry",
}  # fmt: skip


def _material(rng: Rng, n: int) -> tuple[str, Array]:
    """A surface's noun and its picture (n, n, 3) in [0, 1], at times in strong colour or with coloured grain."""
    surface, noun = list(SURFACES.items())[rng.integers(len(SURFACES))]
    image = textures.colourise(surface(rng, n), rng)
    if rng.uniform() < 0.25:
        image = image * (0.35 + 0.75 * _tint(rng))
    if rng.uniform() < 0.1:
        width = rng.uniform(0.5, 4)
        chroma = np.stack([textures.noise(rng, n, width, width) for _ in range(3)], -1)
        image = image * (1 + rng.uniform(0.02, 0.12) * chroma)
    return noun, np.clip(image, 0, 1)


def _axes(rng: Rng, n: int, reach: float) -> tuple[Array, Array]:
    """Coordinates (u, v) centred near the middle, leaning a little (sd ``LEAN`` rad), 1 at ``reach`` px."""
    y, x = np.mgrid[:n, :n] - (n - 1) / 2
    y, x = y - rng.uniform(-3, 3), x - rng.uniform(-3, 3)
    turn = rng.normal(0, LEAN)
    return (x * np.cos(turn) + y * np.sin(turn)) / reach, (-x * np.sin(turn) + y * np.cos(turn)) / reach


def _polygon(u: Array, v: Array, corners: int) -> Array:
    """Signed distance-like level of a regular polygon of apothem 1: negative inside."""
    turns = 2 * np.pi * np.arange(corners) / corners
    return np.max([u * np.cos(t) + v * np.sin(t) for t in turns], axis=0) - 1


def _box(u: Array, v: Array, half_u: float, half_v: float, corner: float = 0.15) -> Array:
    """Signed distance of a rectangle with rounded corners."""
    a, b = np.abs(u) - half_u + corner, np.abs(v) - half_v + corner
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner


# Levels over (u, v): negative inside the object, about 1 unit = 22 px.
SHAPES: dict[str, Callable[[Rng, Array, Array], Array]] = {
    "disc": lambda rng, u, v: np.hypot(u, v) - 1,
    "ring": lambda rng, u, v: np.abs(np.hypot(u, v) - 0.72) - rng.uniform(0.16, 0.3),
    "plate": lambda rng, u, v: _box(u, v, 1, rng.uniform(0.6, 1)),
    "bar": lambda rng, u, v: _box(u, v, 1.25, rng.uniform(0.2, 0.45)),
    "capsule": lambda rng, u, v: np.hypot(np.maximum(np.abs(u) - 0.7, 0), v) - rng.uniform(0.35, 0.55),
    "triangle": lambda rng, u, v: _polygon(1.6 * u, 1.6 * v, 3) / 1.6,
    "octagon": lambda rng, u, v: _polygon(u, v, 8),
    "cross": lambda rng, u, v: np.minimum(_box(u, v, 1, 0.36), _box(u, v, 0.36, 1)),
    "bottle": lambda rng, u, v: np.minimum(_box(u + 0.3, v, 0.85, 0.5), _box(u, v, 1.25, 0.2)),
    "flange": lambda rng, u, v: np.maximum(np.hypot(u, v) - 1, 0.16 - np.hypot(np.abs(u) - 0.62, np.abs(v) - 0.0)),
    "washer": lambda rng, u, v: np.maximum(np.hypot(u, v) - 1, rng.uniform(0.25, 0.5) - np.hypot(u, v)),
    "bracket": lambda rng, u, v: np.minimum(_box(u + 0.6, v, 0.35, 1), _box(u, v + 0.65, 0.95, 0.33)),
    "flower": lambda rng, u, v: np.hypot(u, v) - 0.8 - 0.2 * np.cos(rng.integers(4, 7) * np.arctan2(v, u)),
    "link": lambda rng, u, v: np.abs(_box(u, v, 0.95, 0.6, 0.5)) - 0.18,
}  # fmt: skip


def _spots(rng: Rng, n: int) -> Array:
    """A loose cluster of small round dots."""
    y, x = np.mgrid[:n, :n]
    centre, spread = rng.uniform(12, n - 12, 2), rng.uniform(3, 9)
    cover = np.zeros((n, n))
    for _ in range(int(rng.integers(2, 9))):
        cy, cx = centre + rng.normal(0, spread, 2)
        cover = np.maximum(cover, step(rng.uniform(0.8, 2.2) - np.hypot(y - cy, x - cx), 0.6))
    return cover


def _stroke(rng: Rng, n: int, wander: float, width: tuple[float, float], taper: bool) -> Array:
    """A line that wanders: straight at ``wander`` 0."""
    y, x = np.mgrid[:n, :n]
    count = int(rng.integers(10, 32))
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, wander, count)) * 0.5
    points = np.cumsum(1.6 * np.stack([np.sin(heading), np.cos(heading)], 1), axis=0)
    points += rng.uniform(0.3, 0.7, 2) * n - points.mean(0)
    half = rng.uniform(*width) * (np.linspace(1, 0.2, count) if taper else np.ones(count))
    away = np.hypot(y[..., None] - points[:, 0], x[..., None] - points[:, 1])
    return step((half - away).max(-1), 0.6)


def _round(rng: Rng, n: int) -> Array:
    """One disc of 2 to 7 px."""
    y, x = np.mgrid[:n, :n]
    cy, cx = rng.uniform(10, n - 10, 2)
    return step(rng.uniform(2, 7) - np.hypot(y - cy, x - cx), 0.7)


# Cover (n, n) in [0, 1] of each mark, and how it is painted.
MARKS: dict[str, tuple[Callable[[Rng, int], Array], str]] = {
    "crack": (lambda rng, n: np.maximum(*(_stroke(rng, n, 0.55, (0.8, 1.8), True) for _ in range(2))), "dark"),
    "scratch": (lambda rng, n: _stroke(rng, n, 0.03, (0.6, 1.4), False), "bright"),
    "hair": (lambda rng, n: _stroke(rng, n, 0.25, (0.7, 1.2), False), "colour"),
    "hole": (_round, "black"),
    "pitting": (_spots, "dark"),
    "stain": (textures.blob, "tint"),
    "patch": (textures.blob, "surface"),
    "spill": (textures.blob, "dark"),
    "frost": (lambda rng, n: gaussian_filter(textures.blob(rng, n), 1.0), "bright"),
    "dent": (textures.blob, "relief"),
}


def _tint(rng: Rng) -> Array:
    """A saturated colour (3,)."""
    hue = rng.uniform(0, 1)
    return np.clip(0.5 + 0.5 * np.cos(2 * np.pi * (hue + np.array([0, 1 / 3, 2 / 3]))), 0.05, 0.95)


def _paint(image: Array, cover: Array, how: str, rng: Rng) -> Array:
    """Lay a mark on a picture (n, n, 3) in [0, 1]; every way leaves a visible change."""
    share = cover[..., None] * rng.uniform(0.75, 1)
    mean = image.mean((0, 1))
    if how == "relief":
        lit = np.gradient(gaussian_filter(cover, 1.2))
        turn = rng.uniform(0, 2 * np.pi)
        return np.clip(image * (1 + 3.2 * (np.cos(turn) * lit[0] + np.sin(turn) * lit[1]))[..., None], 0, 1)
    if how == "surface":
        return image + share * (_material(rng, len(image))[1] - image)
    if how == "dark":
        target = image * rng.uniform(0.15, 0.45)
    elif how == "bright":
        target = np.clip(image + rng.uniform(0.3, 0.6), 0, 1)
    elif how == "black":
        target = np.full(3, rng.uniform(0, 0.12)) + 0.05 * image
    elif how == "tint":
        target = np.clip(image * (0.3 + 0.9 * _tint(rng)), 0, 1)
    else:  # "colour"
        target = _tint(rng) if rng.uniform() < 0.7 else np.round(1 - mean)
    return image + share * (target - image)


def _mark(rng: Rng, n: int, inside: Array | None = None) -> tuple[str, Array, str]:
    """A mark's name, cover and way of painting; with ``inside``, cut to the object (tried until it is hit)."""
    while True:
        name = list(MARKS)[rng.integers(len(MARKS))]
        draw, how = MARKS[name]
        cover = draw(rng, n)
        if inside is not None:
            cover = cover * inside
        if (cover > 0.5).sum() >= 6:
            return name, cover, how


def _object(rng: Rng, n: int) -> tuple[str, Array, Array]:
    """A shape's name, cover (n, n) and a level of depth that rises from its outline to 1."""
    name = list(SHAPES)[rng.integers(len(SHAPES))]
    reach = rng.uniform(15, 26)
    level = SHAPES[name](rng, *_axes(rng, n, reach)) * reach
    return name, step(-level, 0.7), np.clip(-level / rng.uniform(2, 5), 0, 1)


def _shaded(rng: Rng, n: int) -> tuple[str, str, Array, Array]:
    """An object of some material on some ground, lit from one side: name, material, image (n, n, 3), cover."""
    name, cover, depth = _object(rng, n)
    noun, face = _material(rng, n)
    if rng.uniform() < CALM:
        face = face.mean((0, 1)) + rng.uniform(*CONTRAST) * (face - face.mean((0, 1)))
    slope = np.gradient(gaussian_filter(depth, 0.8))
    turn = rng.uniform(0, 2 * np.pi)
    face = face * (1 + rng.uniform(0.3, 1.6) * (np.cos(turn) * slope[0] + np.sin(turn) * slope[1]))[..., None]
    plain = np.full((n, n, 3), rng.uniform(0, 1)) * rng.uniform(0.9, 1, 3)
    ground = plain if rng.uniform() < PLAIN_GROUND else _material(rng, n)[1]
    fallen = np.roll(gaussian_filter(cover, rng.uniform(0.8, 2)), rng.integers(-2, 3, 2), axis=(0, 1))
    ground = ground * (1 - rng.uniform(0, 0.6) * fallen)[..., None]
    return name, noun, np.clip(ground + cover[..., None] * (face - ground), 0, 1), cover


COLOURS = ("red", "yellow", "green", "cyan", "blue", "violet")


def _colour_word(image: Array) -> str:
    """A word for the mean colour of (m, 3) pixels in [0, 1]: a hue where it has one, else dark, grey or bright."""
    red, green, blue = image.mean(0)
    light, chroma = (red + green + blue) / 3, max(red, green, blue) - min(red, green, blue)
    if chroma < 0.12:
        return "dark" if light < 0.33 else "bright" if light > 0.66 else "grey"
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
    return COLOURS[round(hue * 6) % 6]


def _sentence(rng: Rng, thing: str, mark: str | None) -> str:
    """The thing and its mark in one of the forms that the four systems use."""
    if mark is None:
        forms = (f"a photo of a {thing}", f"a {thing}", f"a good {thing}")
    else:
        forms = (f"a photo of a {thing} with a {mark}", f"a {thing} with a {mark}", f"a {thing} with {mark} defects")
    return forms[rng.integers(len(forms))]


def draw(rng: Rng, size: int = SIZE) -> Picture:
    """One picture of the world, the same for the same generator."""
    kind = list(KINDS)[rng.choice(len(KINDS), p=list(KINDS.values()))]
    if kind == "silhouette":
        name, cover = _object(rng, size)[:2] if rng.uniform() < 0.4 else _mark(rng, size)[:2]
        if rng.uniform() < 0.15:  # two parts in one mask
            cover = np.maximum(cover, _mark(rng, size)[1])
        image, words, mask = (
            np.repeat((cover > 0.5).astype(float)[..., None], 3, -1),
            f"a white mask of a {name}",
            cover,
        )
    elif kind == "part":
        name, mask, how = _mark(rng, size)
        body = _material(rng, size)[1]
        grey = np.full((size, size, 3), 0.5)
        image, words = grey + (mask > 0.5)[..., None] * (_paint(body, mask, how, rng) - grey), f"a {name} on grey"
    else:
        if kind == "surface":
            (thing, image), cover = _material(rng, size), np.ones((size, size))
        else:
            name, noun, image, cover = _shaded(rng, size)
            thing = f"{name} of {noun}"
        thing = f"{_colour_word(image[cover > 0.5])} {thing}" if rng.uniform() < 0.6 else thing
        mark, mask = None, np.zeros((size, size))
        if rng.uniform() < MARKED:
            mark, mask, how = _mark(rng, size, cover)
            image = _paint(image, mask, how, rng)
        image, words = textures.camera(image, rng), _sentence(rng, thing, mark)
    pixels = np.round(np.clip(image, 0, 1) * 255) / 127.5 - 1
    tensor = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1).contiguous()
    return Picture(tensor, words, torch.from_numpy(mask > 0.5)[None], kind)


def pool(n: int, seed: int, start: int = 0, size: int = SIZE) -> list[Picture]:
    """Pictures ``start`` to ``start + n`` of the world of a seed; picture i depends on (seed, i) alone."""
    return [draw(np.random.default_rng([seed, i]), size) for i in range(start, start + n)]


def words() -> list[str]:
    """Every word that a sentence of the world can hold, sorted."""
    rest = "a photo of with good defects white mask on dark grey bright"
    text = [*SURFACES.values(), *SHAPES, *MARKS, *COLOURS, rest]
    return sorted({word for entry in text for word in entry.split()})
