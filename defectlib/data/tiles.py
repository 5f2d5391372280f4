"""Square crops around the defects and from normal surface, for images that are large beside their defects.

At 64 px most real defects are smaller than one latent cell of 4 px. DefectSynth crops square sub-images of GDXray and
does not give its boxes. Tiles are rows of the same index table, with the box filled in and the parent image's group, so
that crops of one image never fall on both sides of a split.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor

from defectlib.data import layouts
from defectlib.data.boxes import defect_boxes, surface_boxes, worth_a_tile
from defectlib.data.components import Components, components
from defectlib.data.inpaint import dilate
from defectlib.data.readers import GOOD
from defectlib.images import Box

MIN_SIDE, SIDE_STEP = 32, 8
MEDIAN_MASKS = 40
"""``auto_side`` looks at this many masks of a defect type, evenly spaced by id."""
ROOM = 0.75
"""Where normals are cropped from defect images, at least this share of them must have room for a tile."""
MARGIN = 1 / 8
"""Normal crops keep clear of a mask by this share of the side: hand-drawn masks cut the rim of a defect."""
PARENT_NORMALS = 24
"""Normal crops from one defect image, where a category has no normal images."""

Foreground = Callable[[Tensor], Tensor]


def auto_side(index: pd.DataFrame, root: Path | str, size: int = 64, cell: int = 4, cells: int = 4) -> int:
    """The largest tile side at which the median defect of every type covers at least ``cells`` latent cells.

    A defect is a cluster of mask pieces closer than half a tile, and its largest piece must be that large: many specks
    are not one visible defect. Of a piece longer than the tile only the part inside counts. For compact defects this is
    side <= size * sqrt(median area / (cells * cell ** 2)).

    Args:
        index: Rows of an index table, usually of one category.
        root: The data set's folder.
        size: Side in px that tiles are resized to.
        cell: Side of a latent cell in px at ``size``.
        cells: Latent cells that the median defect must cover.

    Returns:
        A multiple of 8 px, at least 32 and at most the median of the images' shorter sides; where there are no normal
        images, also small enough that three quarters of the defect images have room for a normal tile.

    Raises:
        ValueError: No row has a mask with a defect.
    """
    by_defect: dict[str, list[Components]] = {}
    shorter, clear = [], []
    for defect, rows in index[(index["defect"] != GOOD) & (index["mask"] != "")].groupby("defect"):
        rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, MEDIAN_MASKS).round().astype(int))]
        for row in rows.itertuples():
            mask = layouts.read_mask(row, root)[0].numpy()
            if mask.any():
                by_defect.setdefault(str(defect), []).append(components(mask))
                shorter.append(min(mask.shape))
                clear.append(_clear_side(mask))
    if not shorter:
        raise ValueError(f"{root}: no mask shows a defect, so no tile size can be chosen; give a side in px")
    limit = float(np.median(shorter))
    if not (index["defect"] == GOOD).any():
        limit = min(limit, float(np.quantile(clear, 1 - ROOM, method="lower")) / (1 + 2 * MARGIN))
    longest = max(MIN_SIDE, int(limit) // SIDE_STEP * SIDE_STEP)
    for side in range(longest, MIN_SIDE, -SIDE_STEP):
        if all(_median_share(found, side) >= cells * cell**2 / size**2 for found in by_defect.values()):
            return side
    return MIN_SIDE


def _clear_side(mask: np.ndarray) -> int:
    """Side in px of the largest square inside the image that holds no defect."""
    return 2 * int(ndimage.distance_transform_cdt(np.pad(~mask, 1), metric="chessboard").max()) - 1


def _median_share(masks: list[Components], side: int) -> float:
    """The share of a tile that the largest piece of the median defect covers, inside the tile."""
    shares = []
    for found in masks:
        for cluster in worth_a_tile(found, side):
            piece = max(cluster.pieces, key=lambda i: found.areas[i])
            y0, x0, y1, x1 = found.boxes[piece]
            inside = found.areas[piece] * min(1.0, side / max(y1 - y0, x1 - x0))
            shares.append(inside / side**2)
    return float(np.median(shares))


def cut(
    index: pd.DataFrame,
    root: Path | str,
    side: int | Literal["auto"],
    seed: int,
    per_image: int = 4,
    normals: int | None = None,
    size: int = 64,
    cell: int = 4,
    foreground: Foreground | None = None,
) -> pd.DataFrame:
    """Cut every image of an index into tiles.

    Each defect gets a crop with seeded jitter; one larger than the tile gets crops centred on its boundary, so that
    defect and surface both show. Every tile holds at least one latent cell of defect pixels; rows without a usable mask
    give none. Normal images give crops inside the foreground. A category without normal images (GDXray) takes its
    normals from elsewhere on the defect images, clear of the widened mask and at the height of its defects; they carry
    the parent's group.

    Args:
        index: Rows of :func:`layouts.index`.
        root: The data set's folder.
        side: Tile side in px of the files, or "auto" for :func:`auto_side` per category. Smaller images give tiles of
            their shorter side.
        seed: Boxes depend on it and on the row alone, not on the other rows.
        per_image: At most this many defect tiles an image.
        normals: Crops from each normal image (default 1), or from each defect image where there are no normals (24).
        size: Side in px that tiles are resized to; as ``cell`` it matters to "auto" only.
        cell: Side of a latent cell in px at ``size``.
        foreground: float32 (3, H, W) image -> bool (1, H, W); None takes the whole image.

    Returns:
        An index table with one row a tile: id = parent id + "_t0", or "_n0" for normal crops of defect images.

    Raises:
        ValueError: No tile of a defect type holds enough defect; the sentence says which side to try.
    """
    made: list[dict[str, Any]] = []
    for category, rows in index.groupby("category", sort=True):
        own = auto_side(rows, root, size, cell) if side == "auto" else side
        bare = not (rows["defect"] == GOOD).any()
        shown: set[str] = set()
        for row in rows.itertuples(index=False):
            rng = np.random.default_rng([seed, zlib.crc32(f"{category}/{row.defect}/{row.id}".encode())])
            if row.defect == GOOD:
                boxes = _from_normal(row, root, own, rng, 1 if normals is None else normals, foreground)
                made += [_tile(row, box, f"_t{i}") for i, box in enumerate(boxes)]
                continue
            mask = layouts.read_mask(row, root)[0].numpy() if row.mask else np.zeros((1, 1), dtype=bool)
            if not mask.any():
                continue
            shown.add(row.defect)
            boxes = defect_boxes(mask, own, rng, per_image, (cell / size) ** 2)
            made += [_tile(row, box, f"_t{i}") for i, box in enumerate(boxes)]
            if bare:
                count = PARENT_NORMALS if normals is None else normals
                legal = _near_rows(~dilate(mask, own * MARGIN), own, boxes)
                crops = surface_boxes(legal, own, rng, count, whole=True)
                made += [
                    _tile(row, box, f"_n{i}") | {"defect": GOOD, "mask": "", "role": ""} for i, box in enumerate(crops)
                ]
        lost = shown - {row["defect"] for row in made if row["category"] == category}
        if lost:
            raise ValueError(
                f"{root}: no tile of {own} px holds enough of the defect {category}/{sorted(lost)[0]}; "
                f"try a smaller side than {own} px, or correct its masks"
            )
    return layouts.sort(pd.DataFrame(made, columns=layouts.COLUMNS))


def _tile(row: Any, box: Box, suffix: str) -> dict[str, str]:
    return row._asdict() | {"id": row.id + suffix, "box": ",".join(map(str, box))}


def _from_normal(
    row: Any, root: Path | str, side: int, rng: np.random.Generator, count: int, foreground: Foreground | None
) -> list[Box]:
    image = layouts.read_image(row, root)
    inside = torch.ones(1, *image.shape[1:], dtype=torch.bool) if foreground is None else foreground(image)
    return surface_boxes(inside[0].numpy(), side, rng, count)


def _near_rows(legal: np.ndarray, side: int, boxes: list[Box]) -> np.ndarray:
    """``legal`` in the rows that the defect tiles span: a normal crop of a strip then shows the weld, not the edge."""
    if not boxes:
        return legal
    rows = np.zeros(legal.shape[0], dtype=bool)
    for _, y0, _, y1 in boxes:
        rows[max(0, y0 - side // 8) : y1 + side // 8] = True
    return legal & rows[:, None]
