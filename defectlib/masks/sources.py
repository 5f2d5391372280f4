"""Where the masks of requests come from: functions of (generator, shots of one defect, normal) -> bool (1, H, W).

Each takes a counter ``refused``, to which it adds why a drawn mask was thrown away and another one drawn.
A table over mask strategies changes one argument of :func:`defectlib.sampling.plan`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from defectlib.masks import interpolation, random, trimap
from defectlib.types import Shot


def affine(
    rng: np.random.Generator, shots: Sequence[Shot], normal: Tensor, refused: Counter[str] | None = None
) -> Tensor:
    """A real mask flipped, turned and scaled, placed inside the normal's foreground (AdaBLDM's synthetic masks).

    A mask that fits nowhere whole is drawn again, at most eight times; the last one is then centred on the foreground
    and cut to it.
    """
    return _moved(rng, shots, trimap.foreground(normal), refused)


def affine_as_shots(
    rng: np.random.Generator, shots: Sequence[Shot], normal: Tensor, refused: Counter[str] | None = None
) -> Tensor:
    """As :func:`affine`, but as deep inside the object as one of the shots' own masks: a rim's defects stay there."""
    return _moved(rng, shots, trimap.foreground(normal), refused, trimap.depths_of(tuple(shots)))


def _moved(
    rng: np.random.Generator,
    shots: Sequence[Shot],
    allowed: Tensor,
    refused: Counter[str] | None,
    depths: Sequence[float] | None = None,
) -> Tensor:
    places = random.Places(allowed, None if depths is None else trimap.depth(allowed))
    (patch,), corner = random.settle(
        lambda: (random.affine(shots[rng.integers(len(shots))].mask, rng),), allowed, rng,
        places=places, depths=depths, refused=refused,
    )  # fmt: skip
    return random.at(patch, corner, allowed.shape[1:]) & allowed


def perlin(
    rng: np.random.Generator, shots: Sequence[Shot], normal: Tensor, refused: Counter[str] | None = None
) -> Tensor:
    """Perlin noise inside the normal's foreground, with areas in the range of the real masks (Table VI's baseline)."""
    areas = [shot.mask.float().mean().item() for shot in shots]
    return random.perlin(rng, normal.shape[1], (min(areas), max(areas)), allowed=trimap.foreground(normal))


MaskSource = Callable[..., Tensor]
SOURCES: dict[str, MaskSource] = {
    "affine": affine, "affine_as_shots": affine_as_shots, "perlin": perlin, "hmi_image": interpolation.hmi_image,
}  # fmt: skip
