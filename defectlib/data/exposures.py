"""Repeated exposures of one piece, found from names, masks and pictures, so that they stay on one side of a split.

The magnetic tile set shows each tile under up to six exposures (``exp1`` ... ``exp6``) and states nowhere which belong
together. Its names tell: ``num`` is a frame counter, the exposures of a tile follow each other some 20 frames apart,
and a tile that was taken again lies at most some 1,200 frames on. Masks alone mislead: joining all that overlap by more
than 0.4 makes one group of 70 images, because large uneven areas overlap by chance. Pictures tell the rest: of the
pairs that names and masks leave apart, 94 are alike by more than ``ALIKE``, and only one of these 94 is of two defects,
where half of all pairs are; within ``NEAR`` frames seven are alike by more than ``ALIKE_NEAR``, none of two defects.
Below these bounds different tiles begin to join, so a repeat that looks otherwise can stay apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd
from PIL import Image

from defectlib.data import likeness

FRAME = re.compile(r"^exp(\d+)_num_(\d+)$")
FRAME_GAP = 150
FRAME_REACH = 2000
OVERLAP = 0.4
ALIKE, NEAR, ALIKE_NEAR, SHIFT = 0.9, 400, 0.6, 2
"""Likeness above which two pictures show one piece, wherever and within NEAR frames; px they may be shifted by."""
GRID = 128


class UnionFind:
    """Sets of integers that can be joined; the smallest member names its set."""

    def __init__(self, n: int):
        self.parent = list(range(n))

    def find(self, i: int) -> int:
        """The smallest member of the set of ``i``."""
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        """Make one set of the sets of ``i`` and ``j``."""
        low, high = sorted((self.find(i), self.find(j)))
        self.parent[high] = low


def coverage(mask: np.ndarray, side: int = GRID) -> np.ndarray:
    """Bool (H, W) -> float32 (side * side,): the covered share of each cell of a common grid."""
    values = Image.fromarray(mask.astype(np.float32))
    return np.asarray(values.resize((side, side), Image.Resampling.BOX)).ravel()


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two coverages: sum of minima over sum of maxima; 0 where both are empty."""
    union = float(np.maximum(first, second).sum())
    return float(np.minimum(first, second).sum()) / union if union else 0.0


def groups(ids: list[str], masks: list[np.ndarray | None], structures: np.ndarray) -> list[int]:
    """Which images show the same piece.

    Two images are joined where their frame numbers follow each other within ``FRAME_GAP`` in the sorted list of all
    frames, where their masks overlap by more than ``OVERLAP`` and they lie at most ``FRAME_REACH`` frames apart, or
    where the pictures are alike by more than ``ALIKE``, or by ``ALIKE_NEAR`` within ``NEAR`` frames. Images whose name
    gives no frame are joined by their masks and by ``ALIKE``.

    Args:
        ids: Names such as ``exp1_num_108719``.
        masks: Bool (H, W) mask of each, of any size, compared on a ``GRID`` x ``GRID`` grid; None for normals.
        structures: Of each picture, from ``likeness.structure``.

    Returns:
        For each image the index of the first image of its group.
    """
    frames = [int(match[2]) if (match := FRAME.match(name)) else None for name in ids]
    sets = UnionFind(len(ids))
    known = sorted((frame, i) for i, frame in enumerate(frames) if frame is not None)
    for (frame, i), (following, j) in zip(known, known[1:]):
        if following - frame <= FRAME_GAP:
            sets.join(i, j)
    covered = [(i, coverage(mask)) for i, mask in enumerate(masks) if mask is not None and mask.any()]
    for at, (i, own) in enumerate(covered):
        for j, other in covered[:at]:
            near = frames[i] is None or frames[j] is None or abs(frames[i] - frames[j]) <= FRAME_REACH
            if near and sets.find(i) != sets.find(j) and overlap(own, other) > OVERLAP:
                sets.join(i, j)
    alike = likeness.among(structures, SHIFT)
    for i, j in np.argwhere(np.triu(alike > ALIKE_NEAR, 1)).tolist():
        near = frames[i] is not None and frames[j] is not None and abs(frames[i] - frames[j]) <= NEAR
        if near or alike[i, j] > ALIKE:
            sets.join(i, j)
    return [sets.find(i) for i in range(len(ids))]


def regroup(table: pd.DataFrame, masks: list[np.ndarray | None], pictures: Iterable[Image.Image]) -> pd.DataFrame:
    """The table with ``group`` set to the image path of the first member of each row's group."""
    structures = np.stack([likeness.structure(picture) for picture in pictures])
    first = groups(list(table["id"]), masks, structures)
    names = list(table["image"])
    return table.assign(group=[names[i] for i in first])
