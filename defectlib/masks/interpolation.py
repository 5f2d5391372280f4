"""Masks between two real masks: stage 1 of DefectSynth in image space, what is kept of them, and what is reported.

A frame is made from paired pixel coordinates, paired in one of two forms:

* ``raster``, the paper's: coordinates in reading order, the shorter list resampled linearly to the longer one's length,
  points inserted where consecutive ones are far apart.
* ``transport``, the default: the masks are brought to one centre, size and direction, a sample of their pixels is
  assigned by optimal transport, and every pixel of the larger mask follows the sample; points are inserted between
  adjacent pixels. Turn, size and place are then interpolated apart from the remaining shape.

Both pair the pieces of the two masks first where they have equally many (nearest centroids in sum): without it
(``by_piece=False``, as printed in the paper) reading order draws lines between pieces and nothing is kept.

Share of frames kept of 100 random pairs a kind (raster as printed, raster by piece, transport; all of it by
``python benchmarks/mask_interpolation.py``): cracks 0.96, 0.96, 1.00; two pieces 0.00, 0.99, 1.00; areas of 0.001 and
0.05 0.62, 0.62, 1.00; one piece and two 0.86, 0.86, 1.00; a crack and a blob 0.99, 0.99, 0.96; blobs 1.00. Between
cracks, the width is off by a factor of 1.5 in the worst tenth of raster's frames and of 1.3 in transport's: reading
order smears a crack that turns into a blot, transport turns it. Hence the default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from defectlib.masks import alignment, points, trimap
from defectlib.types import Shot

Form = Literal["transport", "raster"]
TAU = 0.053
"""Mean area ratio from which the paper interpolates in latent space."""
FRAMES = 10
"""Masks a pair (the released code: 8 in image space)."""
KEEP = (0.5, 2.0)
"""A frame's area as a multiple of the interpolated area."""
OUTSIDE = 0.1
"""Share of a mask that may lie outside the foreground: hand-drawn masks reach over contours."""
NOT_KEPT = "not kept between its endpoints"
ATTEMPTS = 32
_EIGHT = np.ones((3, 3), int)


class Frames(NamedTuple):
    """Masks between two masks.

    Attributes:
        masks: bool (n, 1, H, W).
        alphas: Their weights, n values.
        refused: Why each is not kept, "" where it is.
    """

    masks: Tensor
    alphas: tuple[float, ...]
    refused: tuple[str, ...]

    @property
    def kept(self) -> Tensor:
        """The masks that are kept, bool (k, 1, H, W)."""
        return self.masks[[not reason for reason in self.refused]]


# DefectSynth's choice of space: latent if the mean area ratio of the defect's masks is at least tau, else image.
def branch(masks: Sequence[Tensor], tau: float = TAU) -> Literal["image", "latent"]:
    """Where to interpolate the masks of one defect, each bool (1, H, W)."""
    return "latent" if np.mean([area_of(mask) for mask in masks]) >= tau else "image"


def area_of(mask: Tensor) -> float:
    """Share of the frame that a mask covers."""
    return mask.sum().item() / mask.numel()


def weights(n: int = FRAMES) -> NDArray[np.float64]:
    """Alphas of ``n`` frames, evenly spaced between the endpoints: i / (n + 1) for i = 1..n."""
    return np.arange(1, n + 1) / (n + 1)


# Eq. 4: z_alpha = Slerp(z_0, z_1, alpha) = (sin((1 - alpha) w) z_0 + sin(alpha w) z_1) / sin w, w the angle between.
def slerp(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """Spherical interpolation of latents float (..., C, h, w), each sample along its own arc, computed in float64.

    Where no arc is defined (a latent of zeros, parallel or opposite latents) the straight line is taken.
    """
    a, b = first.double(), second.double()
    dims = (-3, -2, -1)
    norms = torch.linalg.vector_norm(a, dim=dims, keepdim=True) * torch.linalg.vector_norm(b, dim=dims, keepdim=True)
    cosine = (a * b).sum(dims, keepdim=True) / norms.clamp_min(1e-300)
    sine = (1 - cosine.square()).clamp_min(0).sqrt()
    angle = torch.atan2(sine, cosine)
    arc = (norms > 0) & (sine > 1e-6)
    sine = sine.where(arc, 1.0)
    left = torch.where(arc, torch.sin((1 - alpha) * angle) / sine, 1 - alpha)
    right = torch.where(arc, torch.sin(alpha * angle) / sine, alpha)
    return (left * a + right * b).to(first.dtype)


# The paper states no threshold. The released code's is 50 of 255, which counts a decoder's haze as defect.
def threshold(image: Tensor) -> Tensor:
    """The mask that a drawn silhouette shows, bool (1, H, W): where the mean of the channels is above mid-grey.

    Args:
        image: float32 (3, H, W) in [-1, 1], white on black; what lies outside the range is only brighter or darker.
    """
    return image.mean(0, keepdim=True) > 0


def mask_iou(mask: Tensor, real: Sequence[Tensor], size: int = 64, angles: int = 60) -> float:
    """How much a generated mask has the shape of a real one, in [0, 1]: 1 for a moved copy on the grid.

    The paper prints a "Mask IoU" (Table VI) without defining it. Here it is the largest intersection over union with
    any real mask of the defect after the motion of Eq. 5 that lays the real one on the generated one: place and
    direction do not count, shape and size do. Both are compared as coverage of ``size`` x ``size`` cells
    (sum of minima over sum of maxima), so that a thin crack is not lost to a step of rounding; 0 for an empty mask.

    Args:
        mask: Generated, bool (1, H, W).
        real: All real masks of the defect, each bool (1, H, W); empty ones are an error.
        size: Cells along a side, at most the mask's own.
        angles: Steps of a full turn.
    """
    if not mask.any():
        return 0.0
    cells = tuple(min(size, side) for side in mask.shape[1:])
    found, best = alignment.coverage(mask, cells), 0.0
    for other in real:
        known = alignment.coverage(other, cells)
        moved = alignment.apply(known, alignment.align(known, found, angles))
        moved = moved[0] * moved[1]
        best = max(best, (torch.minimum(moved, found).sum() / torch.maximum(moved, found).sum()).item())
    return best


def interpolate(
    first: Tensor,
    second: Tensor,
    alphas: ArrayLike | None = None,
    form: Form = "transport",
    by_piece: bool = True,
) -> Frames:
    """The masks between two masks, all weights at once.

    Args:
        first: bool (1, H, W), not empty; the frame at weight 0.
        second: The same size; the frame at weight 1.
        alphas: Weights in [0, 1]; :func:`weights` by default, which leaves the endpoints out.
        form: How pixels are paired, see the top of this file.
        by_piece: Pair the pieces first where both masks have equally many.

    Raises:
        ValueError: A mask is empty, the sizes differ, a weight or the form is unknown.
    """
    alphas = np.atleast_1d(np.asarray(weights() if alphas is None else alphas, float))
    require_pair(first, second)
    if form not in ("transport", "raster") or alphas.min() < 0 or alphas.max() > 1:
        raise ValueError(f"form must be transport or raster and weights in [0, 1], got {form} and {alphas}")
    pixels, pieces, counts = zip(*(_pieces(mask[0].numpy()) for mask in (first, second)))
    frames = np.zeros((len(alphas), *first.shape[1:]), bool)
    if by_piece and counts[0] == counts[1]:
        parts = [[p[piece == k + 1] for k in range(n)] for p, piece, n in zip(pixels, pieces, counts)]
        cost = points.squares(*(np.array([part.mean(0) for part in side]) for side in parts))
        pairs = [(parts[0][i], parts[1][j]) for i, j in zip(*linear_sum_assignment(cost))]
        pieces = (None, None)
    else:
        pairs = [pixels]
    for pair in pairs:
        if form == "raster":
            points.draw(points.positions(points.raster(*pair), alphas), frames)
        elif len(pair[0]) >= len(pair[1]):
            points.draw(points.positions(points.transport(*pair, *pieces), alphas), frames)
        else:
            points.draw(points.positions(points.transport(*pair[::-1], *pieces[::-1]), 1 - alphas), frames)
    for alpha, frame in zip(alphas, frames):
        if alpha in (0.0, 1.0):
            frame[:] = (first, second)[int(alpha)][0].numpy()
    areas, masks = [area_of(mask) for mask in (first, second)], torch.from_numpy(frames)[:, None]
    refused = [refusal(mask, (1 - alpha) * areas[0] + alpha * areas[1], counts) for alpha, mask in zip(alphas, masks)]
    return Frames(masks, tuple(alphas.tolist()), tuple(refused))


def require_pair(first: Tensor, second: Tensor) -> None:
    """Two masks, bool (1, H, W), of one size and not empty; ValueError otherwise."""
    if first.shape != second.shape:
        raise ValueError(f"the masks are {tuple(first.shape[1:])} and {tuple(second.shape[1:])}: resize one of them")
    if not (first.any() and second.any()):
        raise ValueError("there is nothing to interpolate in an empty mask; leave the pair out")


def require_two(shots: Sequence[Shot]) -> str:
    """The defect of the shots as "category/defect", of which there are at least two; ValueError otherwise."""
    defect = f"{shots[0].category}/{shots[0].defect}"
    if len(shots) < 2:
        raise ValueError(
            f"interpolation needs two masks of {defect} and there is one: give a second shot, or take the mask source "
            "'affine', which varies a single mask"
        )
    return defect


def _pieces(mask: NDArray[np.bool_]) -> tuple[NDArray, NDArray, int]:
    """Pixels (n, 2) of a mask, not empty, in reading order, the label of each pixel's piece, and the pieces' number."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    labels, n = ndimage.label(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], _EIGHT)
    return np.argwhere(labels) + (rows[0], columns[0]), labels[labels > 0], n


def count_pieces(mask: Tensor) -> int:
    """Connected pieces of a mask, bool (1, H, W), corners touching."""
    return ndimage.label(mask[0].numpy(), _EIGHT)[1]


def refusal(mask: Tensor, area: float, counts: Sequence[int]) -> str:
    """Why a frame is not kept, "" if it is: its area, or more or fewer pieces than both endpoints have.

    Args:
        mask: The frame, bool (1, H, W).
        area: The interpolated area ratio.
        counts: Pieces of the two endpoints.
    """
    ratio = area_of(mask) / area
    if not KEEP[0] <= ratio <= KEEP[1]:
        return f"its area is {ratio:.2f} times the interpolated area"
    pieces = count_pieces(mask)
    fewest, most = min(counts), max(counts)
    wanted = str(most) if fewest == most else f"{fewest} to {most}"
    return "" if fewest <= pieces <= most else f"it has {pieces} pieces instead of {wanted}"


def flaws(mask: Tensor, allowed: Tensor, areas: tuple[float, float]) -> tuple[str, ...]:
    """What is wrong with a mask, in words that a report can count; nothing for a good one.

    Args:
        mask: bool (1, H, W).
        allowed: The normal's foreground, bool (1, H, W).
        areas: Smallest and largest area ratio of the defect's real masks.

    Returns:
        ``("empty",)``, or any of ``"outside the foreground"`` (more than :data:`OUTSIDE` of it) and
        ``"area outside the real range"`` (with :data:`KEEP` of the ends as slack).
    """
    area = area_of(mask)
    if area == 0:
        return ("empty",)
    found = []
    if (mask & ~allowed).sum().item() > OUTSIDE * mask.sum().item():
        found.append("outside the foreground")
    if not KEEP[0] * areas[0] <= area <= KEEP[1] * areas[1]:
        found.append("area outside the real range")
    return tuple(found)


def settled(mask: Tensor, allowed: Tensor) -> Tensor:
    """A mask where it can be: one of which too much lies outside is shifted to where it overlaps the foreground most.

    Objects do not lie where the shots' did; of equally good places the nearest is taken. bool (1, H, W), both.
    """
    if not allowed.any() or (mask & ~allowed).sum().item() <= OUTSIDE * mask.sum().item():
        return mask
    moved, inside = alignment.apply(mask.float(), alignment.align(mask, allowed, angles=1))
    return (moved > 0.5) & inside


class NoMask(ValueError):
    """No draw was without flaws; ``counts`` says what was wrong with them."""

    def __init__(self, message: str, counts: Counter[str]) -> None:
        super().__init__(message)
        self.counts = counts


def redraw(
    draw: Callable[[np.random.Generator], Tensor | str],
    rng: np.random.Generator,
    check: Callable[[Tensor], Sequence[str]],
    defect: str,
    attempts: int = ATTEMPTS,
) -> tuple[Tensor, Counter[str]]:
    """Draw masks until one has no flaws, and count what was wrong with the others.

    Args:
        draw: A mask, bool (1, H, W), or the reason why there is none.
        rng: Handed to ``draw``.
        check: The flaws of a mask, as :func:`flaws` names them.
        defect: For the message.
        attempts: Draws at most.

    Raises:
        NoMask: No draw was without flaws; the message names the defect and counts the flaws.
    """
    counts: Counter[str] = Counter()
    for _ in range(attempts):
        drawn = draw(rng)
        wrong = [drawn] if isinstance(drawn, str) else check(drawn)
        if not wrong:
            return drawn, counts
        counts.update(wrong)
    listed = ", ".join(f"{reason} {n} x" for reason, n in counts.most_common())
    raise NoMask(f"none of {attempts} masks drawn for {defect} could be used: {listed}", counts)


def hmi_image(
    rng: np.random.Generator,
    shots: Sequence[Shot],
    normal: Tensor,
    refused: Counter[str] | None = None,
    form: Form = "transport",
) -> Tensor:
    """A mask between two random shots' masks at a random weight: the image branch of Hybrid Mask Interpolation.

    A frame that is not kept, or has a flaw, is drawn again from another pair, at most :data:`ATTEMPTS` times.

    Args:
        rng: Source of pair and weight.
        shots: The shots of one defect, at least two.
        normal: float32 (3, H, W), of the shots' size; the mask, bool (1, H, W), is cut to its foreground.
        refused: Why draws were refused is counted here.
        form: As in :func:`interpolate`.

    Raises:
        ValueError: There is one shot only, or every draw was refused.
    """
    defect = require_two(shots)
    allowed = trimap.foreground(normal)
    areas = [area_of(shot.mask) for shot in shots]

    def draw(source: np.random.Generator) -> Tensor | str:
        i, j = source.choice(len(shots), 2, replace=False)
        alpha = source.choice(weights())
        frames = interpolate(shots[i].mask, shots[j].mask, alpha, form)
        return NOT_KEPT if frames.refused[0] else settled(frames.masks[0], allowed)

    mask, counts = redraw(draw, rng, lambda drawn: flaws(drawn, allowed, (min(areas), max(areas))), defect)
    if refused is not None:
        refused.update(counts)
    return mask & allowed
