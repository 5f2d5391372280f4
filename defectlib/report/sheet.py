"""Image sheets: rows of images, masks and maps with crisp pixels, outlines and labels that do not overlap.

The layout is in pixels of a 100 dpi screen: an image pixel covers a whole number of them, so nothing is resampled
unevenly.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from PIL import Image
from torch import Tensor

from defectlib import images

DPI = 100
# Of a figure on a notebook's page; its file has 256.
PAGE_COLOURS = 48
WIDEST = 1100
LARGEST_CELL = 192
OUTLINE = "#E8432E"
FRAME = "#999999"
GAP = 4
FONT = 8.5
LINE = FONT * DPI / 72 * 1.25

Cell = Tensor | np.ndarray | None


class Picture(Figure):
    """A Figure that notebooks display without pyplot, in few colours: an executed notebook is read on the web."""

    def _repr_png_(self) -> bytes:
        return png(self, DPI, PAGE_COLOURS)


def png(figure: Figure, dpi: int, colours: int = 256) -> bytes:
    """A figure as PNG in at most so many colours, without dates; a thin blue scratch among much grey stays blue."""
    drawn, shown = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as picture:
        whole = picture.convert("RGB")
    half = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.NEAREST)  # the palette takes long
    palette = half.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1)
    few = whole.quantize(palette=palette, dither=Image.Dither.NONE)
    few.save(shown, format="png", optimize=True, dpi=(dpi, dpi))
    return shown.getvalue()


def pixels(cell: Tensor | np.ndarray) -> np.ndarray:
    """Any cell as uint8 (H, W, 3).

    Args:
        cell: An image, float32 (3, H, W) in [-1, 1]; a mask, bool (1, H, W) or (H, W), True is white; or a map, float
            (1, H, W) or (H, W) in [0, 1].

    Raises:
        ValueError: Another shape, or values outside the range.
    """
    tensor = torch.as_tensor(cell)
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3) or (tensor.shape[0] == 3 and not tensor.is_floating_point()):
        raise ValueError(
            f"a sheet takes images (3, H, W), masks and maps (1, H, W), got {tensor.dtype} {tuple(tensor.shape)}"
        )
    if tensor.dtype == torch.bool:
        tensor = tensor.float()
    low = -1.0 if tensor.shape[0] == 3 else 0.0
    if not (tensor.min() >= low - 1e-3 and tensor.max() <= 1 + 1e-3):
        found = f"[{tensor.min().item():.3g}, {tensor.max().item():.3g}]"
        raise ValueError(f"a sheet takes {'images in [-1, 1]' if low else 'masks and maps in [0, 1]'}, got {found}")
    image = tensor.float() if low else tensor.float().expand(3, -1, -1) * 2 - 1
    return images.to_uint8(image)


def outline(mask: Tensor) -> np.ndarray:
    """The border of a mask along pixel edges: segments (N, 2, 2) of (x, y) in pixels, the origin at the top left.

    Args:
        mask: bool (1, H, W) or (H, W).
    """
    inside = np.pad(torch.as_tensor(mask).numpy().astype(bool).reshape(mask.shape[-2:]), 1)
    y, x = np.nonzero(inside[1:, :] != inside[:-1, :])
    flat = np.stack([np.stack([x - 1, y], -1), np.stack([x, y], -1)], 1)
    y, x = np.nonzero(inside[:, 1:] != inside[:, :-1])
    upright = np.stack([np.stack([x, y - 1], -1), np.stack([x, y], -1)], 1)
    return np.concatenate([flat, upright]).astype(float)


def sheet(
    rows: Sequence[Sequence[Cell]],
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    outline_masks: Sequence[Sequence[Tensor | None]] | None = None,
    scale: float | None = None,
    title: str | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    fold: int | None = None,
    missing: str = "",
) -> Figure:
    """A sheet of images, masks and maps.

    Args:
        rows: Rows of cells as :func:`pixels` takes them; None leaves a place empty, rows may differ in length.
        row_labels: One a row; may hold line breaks.
        column_labels: One a column.
        outline_masks: Masks to draw as outlines, in the places of ``rows``.
        scale: Screen pixels an image pixel; default: the largest whole number (or whole fraction) that fits the page.
        title: Over the whole sheet; may hold line breaks.
        captions: A text under each cell, in the places of ``rows``; may hold line breaks.
        fold: So many rows stay together; such groups go on beside each other, under the same headings, as often as the
            page is wide.
        missing: What is written in the place of a None.

    Raises:
        ValueError: Nothing to show, labels, outlines or captions that do not fit the rows, or cells out of range.
    """
    shapes = [np.shape(cell)[-2:] for row in rows for cell in row if cell is not None]
    if not shapes:
        raise ValueError("a sheet needs at least one image")
    columns = max(len(row) for row in rows)
    _check_labels(rows, columns, row_labels, column_labels, outline_masks, captions)
    height, width = (max(s[i] for s in shapes) for i in (0, 1))
    scale = scale or _fitting(height, width, columns)
    cell_w, cell_h = width * scale, height * scale
    left = max((_text_width(line) for label in row_labels or [] for line in str(label).split("\n")), default=0)
    heads, top, overhang = _headings(column_labels, cell_w)
    lead = ceil(left) + 13 if row_labels else 2
    over = (title.count("\n") + 1) * LINE + 4 if title else 0
    under = [max((len(text.splitlines()) for text in row), default=0) for row in captions or [[]] * len(rows)]
    pitch = [cell_h + GAP + ceil(lines * LINE) for lines in under]
    # Whole screen pixels, so that every cell starts on one.
    top, block = ceil(top + over), ceil(lead + columns * (cell_w + GAP) - GAP + max(2, overhang))
    apart = block + (4 * GAP if row_labels else GAP)
    groups = ceil(len(rows) / (fold or len(rows)))
    deep = ceil(groups / min(groups, max(1, WIDEST // apart))) * (fold or len(rows))
    beside = ceil(len(rows) / deep)
    over_w = max(lead + ceil(_text_width(line)) + 8 for line in (title or "").split("\n"))
    full_w = max(apart * (beside - 1) + block, over_w)
    starts = [top + sum(pitch[r - r % deep : r]) for r in range(len(rows))]
    full_h = ceil(max(map(sum, zip(starts, pitch))) - GAP + 2)

    figure = Picture(figsize=(full_w / DPI, full_h / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, full_w), ylim=(full_h, 0))
    axes.axis("off")
    for r, row in enumerate(rows):
        left, y = lead + r // deep * apart, starts[r]
        for c, cell in enumerate(row):
            x = left + c * (cell_w + GAP)
            if cell is None:
                place = {"ha": "center", "va": "center", "fontsize": FONT, "color": FRAME}
                axes.text(x + cell_w / 2, y + cell_h / 2, missing, **place)
                continue
            _place(axes, cell, outline_masks[r][c] if outline_masks else None, x, y, scale)
            if captions:
                axes.text(x + cell_w / 2, y + cell_h + 2, captions[r][c], ha="center", va="top", fontsize=FONT)
        if row_labels:
            axes.text(left - 7, y + cell_h / 2, row_labels[r], ha="right", va="center", fontsize=FONT)
    for b, (c, (text, angle)) in itertools.product(range(beside), enumerate(heads)):
        middle = lead + b * apart + c * (cell_w + GAP) + cell_w / 2
        axes.text(
            middle, top - 5, text, ha="left" if angle else "center", va="bottom", rotation=angle,
            rotation_mode="anchor" if angle else None, fontsize=FONT,
        )  # fmt: skip
    if title:
        axes.text(lead, 2, title, ha="left", va="top", fontsize=FONT)
    axes.set(xlim=(0, full_w), ylim=(full_h, 0))
    return figure


def _place(axes: Axes, cell: Tensor | np.ndarray, mask: Tensor | None, x: float, y: float, scale: float) -> None:
    """A cell with its top left corner at (x, y): a mask or map with a frame, and with the outline of ``mask``."""
    h, w = np.shape(cell)[-2] * scale, np.shape(cell)[-1] * scale
    axes.imshow(_shown(cell, scale), extent=(x, x + w, y + h, y), interpolation="nearest", aspect="auto")
    if len(np.shape(cell)) == 2 or np.shape(cell)[0] == 1:
        axes.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=FRAME, linewidth=0.8))
    if mask is not None:
        edges = outline(mask) * scale + [x, y]
        axes.add_collection(LineCollection(edges, colors=OUTLINE, linewidths=1.0, capstyle="projecting"))


def overlay(image: Tensor, mask: Tensor, scale: float | None = None) -> Figure:
    """An image with the outline of its mask.

    Args:
        image: float32 (3, H, W) in [-1, 1].
        mask: bool (1, H, W).
        scale: As for :func:`sheet`.
    """
    return sheet([[image]], outline_masks=[[mask]], scale=scale)


def _check_labels(rows, columns, row_labels, column_labels, outline_masks, captions) -> None:
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"the sheet has {len(rows)} rows but {len(row_labels)} row labels")
    if column_labels is not None and len(column_labels) != columns:
        raise ValueError(f"the sheet has {columns} columns but {len(column_labels)} column labels")
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError("captions must have a text for every cell of the sheet")
    if outline_masks is None:
        return
    if [len(row) for row in outline_masks] != [len(row) for row in rows]:
        raise ValueError("outline_masks must have a place (a mask or None) for every cell of the sheet")
    for row, masks in zip(rows, outline_masks):
        for cell, mask in zip(row, masks):
            if mask is not None and (cell is None or np.shape(mask)[-2:] != np.shape(cell)[-2:]):
                raise ValueError(f"an outline of {np.shape(mask)} does not fit a cell of {np.shape(cell)}")


def _fitting(height: int, width: int, columns: int) -> float:
    """A whole number of screen pixels an image pixel, or one over a whole number, that fits the page."""
    room = min(LARGEST_CELL, (WIDEST - columns * GAP) / columns)
    largest = max(height, width)
    return float(int(room // largest)) if largest <= room else 1 / ceil(largest / room)


def _shown(cell: Tensor | np.ndarray, scale: float) -> np.ndarray:
    """The cell's pixels; where they are more than the page has, averaged down by PIL beforehand."""
    array = pixels(cell)
    if scale >= 1:
        return array
    # Two pixels a screen pixel: as many as the saved PNG has.
    size = (max(1, round(array.shape[1] * scale * 2)), max(1, round(array.shape[0] * scale * 2)))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))


def _text_width(text: str) -> float:
    """Width in screen pixels; hinting draws a line some 4 % wider than its outlines are."""
    if not text.strip():
        return 0.0
    path = TextPath((0, 0), text, size=FONT, prop=FontProperties(family="DejaVu Sans"))
    return 1.05 * path.get_extents().width * DPI / 72


def _headings(labels: Sequence[str] | None, cell_w: float) -> tuple[list[tuple[str, float]], float, float]:
    """Column headings as (text, angle), the room above the first row, and the room beside the last column.

    Headings that are too wide break at spaces and underscores; if one still does not fit, all are turned by 40 degrees.
    """
    if not labels:
        return [], 2.0, 0.0
    broken = [_broken(str(label), cell_w) for label in labels]
    if all(_text_width(part) <= cell_w for text in broken for part in text.split("\n")):
        return [(text, 0.0) for text in broken], max(t.count("\n") + 1 for t in broken) * LINE + 8, 0.0
    flat = [str(label).replace("\n", " ") for label in labels]
    turned = np.deg2rad(40)
    rise = max(map(_text_width, flat)) * np.sin(turned) + LINE * np.cos(turned)
    beside = max(0.0, _text_width(flat[-1]) * np.cos(turned) - cell_w / 2 + 4)
    return [(text, 40.0) for text in flat], rise + 8, beside


def _broken(label: str, room: float) -> str:
    lines, current = [], ""
    for word in label.replace("_", "_ ").split():
        joined = word if not current else current + ("" if current.endswith("_") else " ") + word
        if current and _text_width(joined) > room:
            lines.append(current)
            joined = word
        current = joined
    return "\n".join([*lines, current])
