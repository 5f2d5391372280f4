"""DefectSynth's stage 1, latent branch: masks between two masks, by interpolation of inverted latents (Eq. 4).

A mask is drawn white on black, encoded, and carried to noise by DDIM inversion; two noises are interpolated along a
sphere, denoised and decoded, and the picture is thresholded. What comes out black is counted and refused; where all
draws of the hybrid source are refused, it turns to image space and counts that too. The model is handed in as a
:class:`Space`: masks come before models here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from defectlib.masks import shape, trimap
from defectlib.masks.interpolation import (
    NOT_KEPT,
    Frames,
    NoMask,
    area_of,
    branch,
    count_pieces,
    flaws,
    hmi_image,
    redraw,
    refusal,
    require_pair,
    require_two,
    settled,
    slerp,
    threshold,
    weights,
)
from defectlib.types import Shot

BLACK = "all black"
SPECK = 0.05
"""Pieces of a decoded frame below this share of its largest are the autoencoder's. The released code drops those below
50 pixels at 512 x 512, which is less than one at 64 x 64."""
FELL_BACK = "latent space gave none: drawn in image space"


@dataclass(frozen=True, eq=False)
class Space:
    """A way to noise and back: images (N, 3, H, W) in [-1, 1] to noise (N, C, h, w), and noise to images.

    Each mask is inverted once, and each frame between two is drawn once: a few shots serve many requests.
    """

    to_noise: Callable[[Tensor], Tensor]
    from_noise: Callable[[Tensor], Tensor]
    _known: dict[bytes, Tensor] = field(default_factory=dict, repr=False)
    _frames: dict[tuple[bytes, bytes, float], Frames] = field(default_factory=dict, repr=False)

    def noise(self, mask: Tensor) -> Tensor:
        """The noise (C, h, w) that a mask, bool (1, H, W), comes from."""
        key = _key(mask)
        if key not in self._known:
            self._known[key] = self.to_noise(mask.float().expand(3, -1, -1)[None] * 2 - 1)[0]
        return self._known[key]

    def frame(self, first: Tensor, second: Tensor, alpha: float) -> Frames:
        """The one frame that :func:`interpolate` draws between two masks at a weight."""
        key = _key(first), _key(second), alpha
        if key not in self._frames:
            self._frames[key] = interpolate(first, second, self, [alpha])
        return self._frames[key]


def _key(mask: Tensor) -> tuple[torch.Size, bytes]:
    return mask.shape, np.packbits(mask.numpy()).tobytes()


def interpolate(first: Tensor, second: Tensor, space: Space, alphas: Sequence[float] | None = None) -> Frames:
    """The masks between two masks in latent space; arguments and result as in ``interpolation.interpolate``.

    A frame is refused as "all black" where nothing is white in the rectangle that holds both masks: specks that an
    autoencoder leaves at the border are no mask. Specks beside a larger piece are dropped and not
    counted, in frames as in the two masks (:data:`SPECK`).
    """
    require_pair(first, second)
    alphas = tuple(float(a) for a in (weights() if alphas is None else alphas))
    ends = space.noise(first), space.noise(second)
    drawn = space.from_noise(torch.stack([slerp(*ends, alpha) for alpha in alphas]))
    masks = torch.stack([shape.without_specks(threshold(image), SPECK) for image in drawn])
    y, x = (first | second)[0].nonzero().T
    between = masks[..., y.min() : y.max() + 1, x.min() : x.max() + 1].flatten(1).any(1)
    areas = [area_of(mask) for mask in (first, second)]
    counts = [count_pieces(shape.without_specks(mask, SPECK)) for mask in (first, second)]
    refused = [
        refusal(mask, (1 - alpha) * areas[0] + alpha * areas[1], counts) if white else BLACK
        for alpha, mask, white in zip(alphas, masks, between)
    ]
    return Frames(masks, alphas, tuple(refused))


def hmi_latent(space: Space) -> Callable[..., Tensor]:
    """The mask source that interpolates two random shots' masks in latent space, whatever their area.

    A request draws one of the pairs and one of its ten weights, with replacement; the paper makes about 1,000 masks a
    defect from about 100 pairs.
    """

    def source(
        rng: np.random.Generator, shots: Sequence[Shot], normal: Tensor, refused: Counter[str] | None = None
    ) -> Tensor:
        defect = require_two(shots)
        allowed, areas = trimap.foreground(normal), [area_of(shot.mask) for shot in shots]

        def draw(generator: np.random.Generator) -> Tensor | str:
            i, j = sorted(generator.choice(len(shots), 2, replace=False))
            frame = space.frame(shots[i].mask, shots[j].mask, float(generator.choice(weights())))
            if frame.refused[0]:
                return BLACK if frame.refused[0] == BLACK else NOT_KEPT
            return settled(frame.masks[0], allowed)

        mask, counts = redraw(draw, rng, lambda drawn: flaws(drawn, allowed, (min(areas), max(areas))), defect)
        if refused is not None:
            refused.update(counts)
        return mask & allowed

    return source


def hmi(space: Space) -> Callable[..., Tensor]:
    """Hybrid Mask Interpolation: latent space where the mean area ratio reaches tau = 0.053, else image space.

    Where latent space gives none in all its draws, the mask is drawn in image space, and ``refused`` says so under
    ``FELL_BACK``, besides what was wrong with the draws.
    """
    latent = hmi_latent(space)

    def source(
        rng: np.random.Generator, shots: Sequence[Shot], normal: Tensor, refused: Counter[str] | None = None
    ) -> Tensor:
        if branch([shot.mask for shot in shots]) == "image":
            return hmi_image(rng, shots, normal, refused)
        try:
            return latent(rng, shots, normal, refused)
        except NoMask as error:
            if refused is not None:
                refused.update(error.counts + Counter({FELL_BACK: 1}))
            return hmi_image(rng, shots, normal, refused)

    return source
