"""Where square crops are taken from an image: around its defects, or on its surface. Boxes are x0, y0, x1, y1 in px."""

from __future__ import annotations

import numpy as np

from defectlib.data.components import Cluster, Components, cluster_mask, clusters, components
from defectlib.images import Box

MAX_SHARE = 0.75
"""The largest share of defect in a tile, where the defect allows it: surface must show too."""
SPECK = 0.05
"""Clusters below this share of their image's largest cluster are specks: they get no tile of their own."""
TRIES = 48


def worth_a_tile(found: Components, side: int) -> list[Cluster]:
    """The clusters of a mask at a tile side, specks left out, the largest first."""
    made = clusters(found, side / 2)
    return [cluster for cluster in made if cluster.area >= SPECK * made[0].area]


def defect_boxes(
    mask: np.ndarray, side: int, rng: np.random.Generator, count: int, least: float = 1 / 256
) -> list[Box]:
    """Boxes (x0, y0, x1, y1) around the defects of a bool (H, W) mask, the largest defect first.

    Args:
        mask: True is defect.
        side: Tile side in px; at most the shorter side of the mask is used.
        rng: Draws the jitter.
        count: At most this many boxes.
        least: The least share of defect pixels of a tile; boxes with less are left out.
    """
    height, width = mask.shape
    side = min(side, height, width)
    total = np.pad(mask.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    found = components(mask)
    boxes: list[Box] = []
    for cluster in worth_a_tile(found, side):
        wanted = 1 if cluster.extent <= side else int(np.ceil(cluster.extent / side))
        corners = _corners(cluster_mask(found, cluster), cluster.box, side, rng)
        for _ in range(min(wanted, count - len(boxes))):
            box = _pick(corners, side, total, boxes, least)
            if box is None:
                break
            boxes.append(box)
    return boxes


def _corners(
    mask: np.ndarray, box: tuple[int, int, int, int], side: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Candidate upper left corners (y, x): the defect anywhere inside the tile, or the tile centred on its boundary."""
    height, width = mask.shape
    y0, x0, y1, x1 = box
    margin = side // 8
    room_y, room_x = side - (y1 - y0), side - (x1 - x0)
    if min(room_y, room_x) >= 0:
        # Keep a margin around the defect where the tile has room for one.
        m_y, m_x = min(margin, room_y // 2), min(margin, room_x // 2)
        y = rng.integers(y1 + m_y - side, y0 - m_y + 1, TRIES)
        x = rng.integers(x1 + m_x - side, x0 - m_x + 1, TRIES)
    else:
        # The image's own border is not a boundary of the defect: nothing shows beyond it.
        edge = mask & ~_erode(mask)
        ys, xs = np.nonzero(edge if edge.any() else mask)
        at = rng.integers(len(ys), size=TRIES)
        jitter = rng.integers(-(side // 6), side // 6 + 1, (2, TRIES))
        y, x = ys[at] - side // 2 + jitter[0], xs[at] - side // 2 + jitter[1]
    return list(zip(np.clip(y, 0, height - side).tolist(), np.clip(x, 0, width - side).tolist()))


def _erode(mask: np.ndarray) -> np.ndarray:
    """3 x 3 erosion that takes what lies beyond the image as defect."""
    padded = np.pad(mask, 1, constant_values=True)
    height, width = mask.shape
    return np.logical_and.reduce([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)])


def _pick(corners: list[tuple[int, int]], side: int, total: np.ndarray, taken: list, least: float) -> Box | None:
    """The first candidate with a good share of defect, away from earlier tiles; None if all have too little."""
    best = None
    for y, x in corners:
        share = _sum(total, y, x, side) / side**2
        if share < least:
            continue
        overlap = max((_overlap((x, y), (b[0], b[1]), side) for b in taken), default=0.0)
        score = (overlap > 0.5, share > MAX_SHARE, overlap > 0.25, max(0.0, share - MAX_SHARE))
        if best is None or score < best[0]:
            best = (score, (x, y, x + side, y + side))
    if best is None or (best[0][0] and taken):
        return None
    return best[1]


def _sum(total: np.ndarray, y: int, x: int, side: int) -> int:
    return int(total[y + side, x + side] - total[y, x + side] - total[y + side, x] + total[y, x])


def _overlap(first: tuple[int, int], second: tuple[int, int], side: int) -> float:
    """The share of a tile that another of the same side covers."""
    across = max(0, side - abs(first[0] - second[0])) * max(0, side - abs(first[1] - second[1]))
    return across / side**2


def surface_boxes(legal: np.ndarray, side: int, rng: np.random.Generator, count: int, whole: bool = False) -> list[Box]:
    """Boxes (x0, y0, x1, y1) on the surface, drawn uniformly among the positions that hold the most of it.

    Args:
        legal: bool (H, W), where the surface is.
        side: Tile side in px, at most the shorter side is used.
        rng: Draws the positions.
        count: How many; fewer come back where further ones would overlap an earlier one by more than half.
        whole: Every pixel of a tile must be legal; otherwise at least 0.9 of the best share that any tile has.
    """
    height, width = legal.shape
    side = min(side, height, width)
    total = np.pad(legal.astype(np.int64), ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    held = total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]
    needed = side**2 if whole else max(1, int(np.ceil(0.9 * held.max())))
    ys, xs = np.nonzero(held >= needed)
    boxes: list[Box] = []
    for at in rng.permutation(len(ys))[: max(TRIES, 20 * count)] if len(ys) else []:
        y, x = int(ys[at]), int(xs[at])
        if all(_overlap((x, y), (b[0], b[1]), side) <= 0.5 for b in boxes):
            boxes.append((x, y, x + side, y + side))
        if len(boxes) == count:
            break
    return boxes
