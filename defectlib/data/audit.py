"""What is wrong with a data set's folder: a table of findings.

It never changes the data and never raises on bad data.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from defectlib import images, paths
from defectlib.data import catalog, layouts
from defectlib.data.catalog import Dataset
from defectlib.data.readers import (
    BROKEN_LINK,
    GOOD,
    IMAGE_SUFFIXES,
    SYMLINK_LOOP,
    UNREADABLE_FOLDER,
    Scan,
    link_problem,
)

COLUMNS = ["severity", "problem", "category", "file", "remedy"]
SEVERITIES = ("error", "warning", "note")
ORIENTATION = 0x0112
MAX_CLASSES, MIN_CLASS_SHARE = 4, 0.05

# problem -> (severity, remedy). An error would stop a run or spoil its numbers; a warning costs images; a note informs.
PROBLEMS = {
    "no such folder": ("error", "Give the folder of the data set; to obtain it: {obtain}."),
    "nothing in this layout": ("error", "It should hold {layout}."),
    UNREADABLE_FOLDER: ("error", "Give yourself the right to read it, or remove it."),
    SYMLINK_LOOP: ("error", "Remove the link: it leads back into its own folder."),
    BROKEN_LINK: ("error", "Restore the link's target, or remove the link."),
    "zero-byte file": ("error", "Copy the file again, or remove it together with its partner."),
    "corrupt or truncated file": ("error", "Copy the file again, or remove it together with its partner."),
    "mask and image differ in size": ("error", "Export the mask again at the size of its image: {detail}."),
    "category without normals": ("error", "Put at least one defect-free image into train/good."),
    "category without a usable defect mask": (
        "error",
        "Draw masks; if they are class ids ({detail}), write 255 for defect.",
    ),
    "image without mask": ("warning", "Draw its mask or remove it; the split leaves it out."),
    "mask without image": ("warning", "Restore its image or remove it; it is not read."),
    "empty mask": ("warning", "Draw the defect, or move the image to good; the split leaves it out ({detail})."),
    "full mask": ("warning", "Redraw it: a mask that covers its whole image leaves no surface to learn from."),
    "normal image with a defect mask": (
        "warning",
        "Move the image to its defect, or empty the mask; it is read as normal.",
    ),
    "byte-identical images": ("warning", "Remove one of the copies; the split keeps one: {detail}."),
    "defect with fewer than two masks": ("warning", "Add images: with one it is a shot and nothing is tested."),
    "file that the layout does not read": (
        "note",
        "Move it where the layout expects it if it should be read ({detail}).",
    ),
    "grey mask": ("note", "Values above {detail} count as defect."),
    "class-id mask": ("note", "Values above {detail} count as defect; the classes are not told apart."),
    "16-bit image": ("note", "It is divided by 257 to 8 bits; 12-bit data appear dark: rescale them first{detail}."),
    "palette file": ("note", "An image is expanded to its colours; a mask is compared by index{detail}."),
    "image with alpha": ("note", "The alpha channel is dropped{detail}."),
    "EXIF-rotated image": ("note", "It is read upright, as viewers show it; its mask must be upright too{detail}."),
    "names that are not numbers": ("note", "They are sorted with numbers inside a name as numbers{detail}."),
    "count differs from the release": ("note", "Check that the download is complete: {detail}."),
}


@dataclass
class _Report:
    """Collects findings; notes of one kind, category and defect become one line with a count."""

    entry: Dataset
    lines: list[tuple[str, ...]] = field(default_factory=list)
    notes: dict[tuple[str, str, str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, problem: str, category: str, file: str, detail: str = "") -> None:
        severity, remedy = PROBLEMS[problem]
        facts = {"obtain": self.entry.obtain, "layout": layouts.expected(self.entry), "detail": detail}
        self.lines.append((severity, problem, category, file, remedy.format(**facts)))

    def note(self, problem: str, category: str, defect: str, file: str, detail: str = "") -> None:
        self.notes[problem, category, defect, detail].append(file)

    def table(self) -> pd.DataFrame:
        for (problem, category, _, detail), files in self.notes.items():
            more = f" ({len(files)} files, this one first)" if len(files) > 1 else ""
            self.add(problem, category, sorted(files, key=layouts.natural)[0], detail)
            line = self.lines[-1]
            self.lines[-1] = (*line[:4], line[4].removesuffix(".") + more + ".")
        rank = {severity: i for i, severity in enumerate(SEVERITIES)}
        lines = sorted(set(self.lines), key=lambda t: (rank[t[0]], t[1], t[2], layouts.natural(t[3])))
        return pd.DataFrame(lines, columns=COLUMNS)


@dataclass(frozen=True)
class _File:
    """What one file is: decodable or not, its PIL mode, upright size (width, height), EXIF orientation, hash."""

    good: bool
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    rotated: bool = False
    sha256: str = ""


def audit(name: str, root: Path | str) -> pd.DataFrame:
    """Look at every file of a data set.

    Args:
        name: A data set of :data:`~defectlib.data.catalog.DATASETS`.
        root: Its folder; nothing in it is changed.

    Returns:
        Columns severity ("error": would spoil a run, "warning", "note"), problem (a key of ``PROBLEMS``), category,
        file (relative to ``root``), remedy (one sentence); errors first. A note stands once a category and defect, with
        a count.

    Raises:
        ValueError: The data set's name is unknown.
    """
    entry, root = catalog.dataset(name), Path(root)
    report = _Report(entry)
    if not root.is_dir():
        report.add("no such folder", "", str(root))
        return report.table()
    scan = entry.reader(root)
    for path, problem in {*scan.troubles, *_walk_troubles(root)}:
        report.add(problem, "", path)
    if not scan.rows:
        report.add("nothing in this layout", "", ".")
    for path in scan.orphans:
        report.add("mask without image", "", path)
    _unread(report, scan, root)
    facts: dict[str, _File] = {}
    usable = [_look(report, row, root, facts) for row in scan.rows]
    _copies(report, scan, facts)
    _categories(report, scan, usable)
    for row in scan.rows:
        if not Path(row["image"]).stem.isdigit():
            report.note("names that are not numbers", row["category"], row["defect"], row["image"])
    return report.table()


def spoils(table: pd.DataFrame) -> bool:
    """Whether a table of findings holds an error."""
    return bool((table["severity"] == "error").any())


def _walk_troubles(root: Path) -> set[tuple[str, str]]:
    """Folders that cannot be listed and links that lead nowhere or back, anywhere under the root."""
    found: set[tuple[str, str]] = set()

    def unreadable(error: OSError) -> None:
        found.add((os.path.relpath(error.filename, root), UNREADABLE_FOLDER))

    for folder, folders, files in os.walk(root, onerror=unreadable):
        for entry in [*folders, *files]:
            path = os.path.join(folder, entry)
            problem = link_problem(path)
            if problem:
                found.add((Path(path).relative_to(root).as_posix(), problem))
    return found


def _unread(report: _Report, scan: Scan, root: Path) -> None:
    """Image files in folders that the layout reads from, but which are neither image nor mask of a row."""
    known = {row[kind] for row in scan.rows for kind in ("image", "mask")} | set(scan.orphans)
    folders = {os.path.dirname(path) for path in known if path}
    tops = {path.split("/")[0] for path in folders}
    by_folder: dict[str, list[str]] = defaultdict(list)
    for folder, _, files in os.walk(root):
        inside = os.path.relpath(folder, root)
        if inside.split(os.sep)[0] not in tops and inside != ".":
            continue
        for file in sorted(files):
            path = os.path.normpath(os.path.join(inside, file)).replace(os.sep, "/")
            if file.lower().endswith(IMAGE_SUFFIXES) and path not in known and not link_problem(root / path):
                by_folder[inside].append(path)
    for files in by_folder.values():
        report.add("file that the layout does not read", "", files[0], f"{len(files)} in this folder")


def _look(report: _Report, row: dict[str, str], root: Path, facts: dict[str, _File]) -> bool:
    """Report on one image and its mask; True where they make a usable defect pair. Fills in KolektorSDD2's defect."""
    category, defect = row["category"], row["defect"]
    image = facts[row["image"]] = _decode(report, row, root, row["image"])
    if image.good:
        _modes(report, row, row["image"], image)
    if not row["mask"]:
        if defect != GOOD:
            report.add("image without mask", category, row["image"])
        row["defect"] = defect or "defect"
        return False
    mask = _decode(report, row, root, row["mask"])
    if not mask.good:
        return False
    if mask.mode == "P":
        report.note("palette file", category, defect, row["mask"])
    values = images.mask_values(root / row["mask"])
    shown = values > report.entry.mask_threshold
    if image.good and mask.size != image.size:
        detail = f"image {image.size[0]} x {image.size[1]}, mask {mask.size[0]} x {mask.size[1]}"
        report.add("mask and image differ in size", category, row["mask"], detail)
        return False
    if not defect:
        row["defect"] = "defect" if shown.any() else GOOD
    if row["defect"] == GOOD:
        if defect == GOOD and shown.any():
            report.add("normal image with a defect mask", category, row["mask"])
        return False
    _mask_values(report, row, values)
    if not shown.any():
        detail = f"its largest value is {values.max()}, defect means above {report.entry.mask_threshold}"
        report.add("empty mask", category, row["mask"], detail)
    elif shown.all():
        report.add("full mask", category, row["mask"])
    return image.good and bool(shown.any())


def _decode(report: _Report, row: dict[str, str], root: Path, path: str) -> _File:
    """Decode one file completely, or report why it cannot be."""
    try:
        if (root / path).stat().st_size == 0:
            report.add("zero-byte file", row["category"], path)
            return _File(False)
        upright = images.open_pil(root / path)
        # The header alone: open_pil has already turned the picture upright.
        with Image.open(root / path) as header:
            mode, orientation = header.mode, header.getexif().get(ORIENTATION, 1)
        return _File(True, mode, upright.size, orientation not in (0, 1), paths.sha256(root / path))
    except (OSError, ValueError):
        report.add("corrupt or truncated file", row["category"], path)
        return _File(False)


def _modes(report: _Report, row: dict[str, str], path: str, file: _File) -> None:
    """Notes on how an unusual image is read."""
    if file.mode.startswith("I"):
        report.note("16-bit image", row["category"], row["defect"], path)
    if file.mode == "P":
        report.note("palette file", row["category"], row["defect"], path)
    if file.mode in ("RGBA", "LA", "PA"):
        report.note("image with alpha", row["category"], row["defect"], path)
    if file.rotated:
        report.note("EXIF-rotated image", row["category"], row["defect"], path)


def _mask_values(report: _Report, row: dict[str, str], values: np.ndarray) -> None:
    """A note where a mask holds more than surface and 255 (or bilevel 1): few values are class ids, many are grey."""
    found = np.unique(values)
    found = found[found > 0]
    if len(found) == 0 or (len(found) == 1 and found[0] in (1, 255)):
        return
    threshold = str(report.entry.mask_threshold)
    # Class ids fill areas; the grey rim of an antialiased or lossy mask has many values of a few pixels each.
    sizes = np.bincount(values[values > 0].ravel())[found]
    areas = len(found) <= MAX_CLASSES and sizes.min() >= MIN_CLASS_SHARE * sizes.sum()
    kind = "class-id mask" if areas else "grey mask"
    report.note(kind, row["category"], row["defect"], row["mask"], threshold)


def _copies(report: _Report, scan: Scan, facts: dict[str, _File]) -> None:
    """Byte-identical images, across parts of a split and defects alike."""
    by_hash: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in scan.rows:
        if facts[row["image"]].sha256:
            by_hash[facts[row["image"]].sha256].append(row)
    for rows in by_hash.values():
        paths = sorted({row["image"] for row in rows}, key=layouts.natural)
        for path in paths[1:]:
            category = next(row["category"] for row in rows if row["image"] == path)
            report.add("byte-identical images", category, path, f"the same as {paths[0]}")


def _categories(report: _Report, scan: Scan, usable: list[bool]) -> None:
    """What a category lacks as a whole, and what the release should hold."""
    table = pd.DataFrame(scan.rows, columns=["category", "defect", "id", "role", "image", "mask", "group"])
    table["usable"] = usable
    for category, rows in table.groupby("category", sort=True):
        normals = rows[(rows["defect"] == GOOD) & (rows["role"] != "test")]
        if report.entry.normals == "images" and normals.empty:
            report.add("category without normals", str(category), rows["image"].iloc[0].rpartition("/")[0])
        defects = rows[rows["defect"] != GOOD]
        if not defects["usable"].any():
            detail = f"defect means values above {report.entry.mask_threshold}"
            report.add(
                "category without a usable defect mask", str(category), rows["image"].iloc[0].rpartition("/")[0], detail
            )
        for _, own in defects.groupby("defect", sort=True):
            if own["usable"].sum() < 2:
                report.add("defect with fewer than two masks", str(category), own["image"].iloc[0].rpartition("/")[0])
    if len(table):
        for line in layouts.compare_counts(report.entry, table).itertuples():
            if line.expected != line.found:
                detail = f"{line.what}: {line.found} found, {line.expected} expected"
                report.add("count differs from the release", line.category, ".", detail)
