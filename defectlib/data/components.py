"""The pieces of a mask and how far apart they are: what belongs to one defect at a given tile size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from defectlib.data.exposures import UnionFind

_EIGHT = np.ones((3, 3), dtype=int)


@dataclass(frozen=True, eq=False)
class Components:
    """The 8-connected pieces of a mask.

    Attributes:
        labels: int (H, W); 0 is surface, piece k has label k + 1.
        areas: Pixels of each piece.
        boxes: int (n, 4): y0, x0, y1, x1 of each piece (y1, x1 exclusive).
        links: (piece, piece, distance in px) between pieces that are neighbours; the shortest paths between all pieces
            run through these, so joining links below a gap joins all pieces nearer than it.
    """

    labels: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray
    links: list[tuple[int, int, float]]


@dataclass(frozen=True, eq=False)
class Cluster:
    """Pieces that belong together: their indices, total area in px, and box y0, x0, y1, x1."""

    pieces: tuple[int, ...]
    area: int
    box: tuple[int, int, int, int]

    @property
    def extent(self) -> int:
        """The longer side of the box, in px."""
        y0, x0, y1, x1 = self.box
        return max(y1 - y0, x1 - x0)


def components(mask: np.ndarray) -> Components:
    """Label a bool (H, W) mask and measure the gaps between neighbouring pieces."""
    labels, n = ndimage.label(mask, structure=_EIGHT)
    areas = np.bincount(labels.ravel(), minlength=n + 1)[1:]
    slices = ndimage.find_objects(labels)
    boxes = np.array([[s[0].start, s[1].start, s[0].stop, s[1].stop] for s in slices], dtype=int).reshape(-1, 4)
    return Components(labels, areas, boxes, _links(mask, labels) if n > 1 else [])


def _links(mask: np.ndarray, labels: np.ndarray) -> list[tuple[int, int, float]]:
    """Shortest distance between pieces whose zones (the pixels nearest to them) touch."""
    distance, (rows, columns) = ndimage.distance_transform_edt(~mask, return_indices=True)
    zone = labels[rows, columns]
    best: dict[tuple[int, int], float] = {}
    for axis in (0, 1):
        first = np.take(zone, range(zone.shape[axis] - 1), axis)
        second = np.take(zone, range(1, zone.shape[axis]), axis)
        gap = np.take(distance, range(zone.shape[axis] - 1), axis) + np.take(distance, range(1, zone.shape[axis]), axis)
        touch = first != second
        low, high = np.minimum(first, second)[touch], np.maximum(first, second)[touch]
        for i, j, d in zip(low.tolist(), high.tolist(), gap[touch].tolist()):
            if d < best.get((i, j), np.inf):
                best[i, j] = d
    return [(i - 1, j - 1, d) for (i, j), d in sorted(best.items())]


def clusters(found: Components, gap: float) -> list[Cluster]:
    """Pieces closer than ``gap`` px belong together; the largest cluster comes first."""
    n = len(found.areas)
    sets = UnionFind(n)
    for i, j, distance in found.links:
        if distance < gap:
            sets.join(i, j)
    members: dict[int, list[int]] = {}
    for i in range(n):
        members.setdefault(sets.find(i), []).append(i)
    made = []
    for pieces in members.values():
        box = found.boxes[pieces]
        made.append(
            Cluster(
                tuple(pieces),
                int(found.areas[pieces].sum()),
                (int(box[:, 0].min()), int(box[:, 1].min()), int(box[:, 2].max()), int(box[:, 3].max())),
            )
        )
    return sorted(made, key=lambda cluster: (-cluster.area, cluster.box))


def cluster_mask(found: Components, cluster: Cluster) -> np.ndarray:
    """Bool (H, W): the pixels of a cluster."""
    return np.isin(found.labels, np.array(cluster.pieces) + 1)
