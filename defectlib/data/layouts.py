"""A folder -> one index table, and the image or mask of a row of it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from defectlib import images
from defectlib.data import catalog, inpaint, readers
from defectlib.data.catalog import DATASETS, Dataset
from defectlib.data.readers import GOOD

__all__ = ["COLUMNS", "DATASETS", "GOOD", "Dataset", "counts", "index", "natural", "read_image", "read_mask", "sort"]

COLUMNS = ["dataset", "category", "defect", "id", "role", "image", "mask", "group", "box", "derive"]


def index(name: str, root: Path | str) -> pd.DataFrame:
    """Read the layout of a data set as a table with one row an image, sorted by category, defect and id.

    All columns are strings: dataset, category, defect ("good" for normals), id (unique within category and defect),
    role ("train", "test" or "" as the folders say), image and mask (posix paths relative to ``root``; mask "" where
    there is none), group (what must stay on one side of a split; the image itself unless the data set repeats pieces),
    box ("" or "x0,y0,x1,y1"), derive ("", or "inpaint": a normal painted over the crack of image and mask).

    Args:
        name: A data set of :data:`~defectlib.data.catalog.DATASETS`.
        root: Its folder.

    Raises:
        ValueError: The name is unknown, or a mask that the index needs cannot be read.
        FileNotFoundError: The folder does not exist, holds nothing of this layout, or a part of it cannot be read.
    """
    entry, root = catalog.dataset(name), Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; to obtain {entry.title}: {entry.obtain}")
    scan = entry.reader(root)
    if scan.troubles:
        path, problem = scan.troubles[0]
        raise FileNotFoundError(
            f"{root / path}: {problem}; repair or remove it (all findings: python -m defectlib audit --dataset {name} "
            f"--data-root {shlex.quote(str(root))})"
        )
    if not scan.rows:
        raise FileNotFoundError(
            f"{root} holds nothing in the layout of {entry.title}; it should hold {expected(entry)}"
        )
    table = pd.DataFrame(scan.rows).assign(dataset=name, box="", derive="")
    return sort(_without_normal_masks(entry.complete(table, root, entry.mask_threshold)))[COLUMNS]


def expected(entry: Dataset) -> str:
    """What a data set's folder should hold; of a reader from outside, only how its data are obtained is known."""
    return readers.EXPECTED.get(entry.reader, f"the data set ({entry.obtain})")


def _without_normal_masks(table: pd.DataFrame) -> pd.DataFrame:
    """Normals have no mask, except those painted over: their mask says where."""
    unused = (table["defect"] == GOOD) & (table["derive"] == "")
    return table.assign(mask=table["mask"].where(~unused, ""))


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A sort key in which numbers inside a name count as numbers: img2 before img10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part)


def sort(table: pd.DataFrame) -> pd.DataFrame:
    """Rows by category, defect and id (numbers as numbers), with a fresh index."""
    keys = [(row.category, row.defect, natural(row.id)) for row in table.itertuples()]
    return table.iloc[sorted(range(len(keys)), key=keys.__getitem__)].reset_index(drop=True)


def counts(name: str, root: Path | str) -> pd.DataFrame:
    """Expected and found image counts of a release.

    Returns:
        Columns category ("" where the whole data set is counted), what (a key of ``Dataset.counts``, "each defect" as
        "defect <name>"), expected, found; empty where nothing is known. DeepCrack counts what was released, not the 21
        images that :func:`index` takes.
    """
    entry, root = catalog.dataset(name), Path(root)
    table = pd.DataFrame(entry.reader(root).rows, columns=["category", "defect", "id", "role", "image", "mask"])
    if entry.complete is catalog.by_mask:
        table = entry.complete(table, root, entry.mask_threshold)
    return compare_counts(entry, table)


def compare_counts(entry: Dataset, table: pd.DataFrame) -> pd.DataFrame:
    """:func:`counts` of rows that are already there."""
    parts = table.groupby("category") if entry.counts_per == "category" else [("", table)]
    lines = []
    for category, rows in parts:
        for what, expected in entry.counts.items():
            if what == "each defect":
                sizes = rows.loc[rows["defect"] != GOOD].groupby("defect").size()
                lines += [(category, f"defect {defect}", expected, int(n)) for defect, n in sizes.items()]
                continue
            lines.append((category, what, expected, _count(rows, what)))
    return pd.DataFrame(lines, columns=["category", "what", "expected", "found"])


def _count(rows: pd.DataFrame, what: str) -> int:
    kind, _, role = what.rpartition("/")
    if what in ("train", "test"):
        return int((rows["role"] == what).sum())
    if what == GOOD:
        return int((rows["defect"] == GOOD).sum())
    if what == "defect":
        return int(((rows["defect"] != GOOD) & (rows["mask"] != "")).sum())
    return int(((rows["defect"] == kind) & (rows["role"] == role)).sum())


def parse_box(text: str) -> images.Box | None:
    """``"x0,y0,x1,y1"`` -> four integers; "" -> None."""
    if not text:
        return None
    x0, y0, x1, y1 = (int(part) for part in text.split(","))
    return x0, y0, x1, y1


def _cell(row: Any, name: str) -> str:
    """A value of a row: ``row.mask`` of a Series is its method, not its value."""
    return row[name] if isinstance(row, pd.Series) else getattr(row, name)


def read_image(row: Any, root: Path | str, size: int | None = None) -> Tensor:
    """The image of a row as float32 (3, H, W) in [-1, 1]; its box is cut out, a derived normal is painted over.

    Args:
        row: A row of an index or manifest (a Series or a named tuple).
        root: The data set's folder.
        size: Optional side of the square result.

    Raises:
        ValueError: A file cannot be decoded; the sentence names it.
    """
    path, box = Path(root) / _cell(row, "image"), parse_box(_cell(row, "box"))
    if _cell(row, "derive") != "inpaint":
        return images.read_image(path, box, size)
    mask = images.read_mask(
        Path(root) / _cell(row, "mask"), threshold=catalog.dataset(_cell(row, "dataset")).mask_threshold
    )
    image = inpaint.remove_defect(images.read_image(path), mask)
    if box is not None:
        x0, y0, x1, y1 = box
        image = image[:, y0:y1, x0:x1].contiguous()
    return image if size is None else images.resize_image(image, size)


def read_mask(row: Any, root: Path | str, size: int | None = None) -> Tensor:
    """The mask of a row as bool (1, H, W), binarised at the data set's threshold; all False for normals.

    Args:
        row: A row of an index or manifest.
        root: The data set's folder.
        size: Optional side of the square result.

    Raises:
        ValueError: A file cannot be decoded; the sentence names it.
    """
    path, box = Path(root) / _cell(row, "mask"), parse_box(_cell(row, "box"))
    if _cell(row, "mask") and _cell(row, "defect") != GOOD:
        return images.read_mask(path, box, size, catalog.dataset(_cell(row, "dataset")).mask_threshold)
    if size is not None:
        return torch.zeros(1, size, size, dtype=torch.bool)
    if box is not None:
        return torch.zeros(1, box[3] - box[1], box[2] - box[0], dtype=torch.bool)
    width, height = images.open_pil(Path(root) / _cell(row, "image")).size
    return torch.zeros(1, height, width, dtype=torch.bool)
