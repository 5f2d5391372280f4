"""One small reader for each layout: a folder -> what lies in it, without opening an image.

A reader never raises on damaged folders: it notes what it cannot read in :class:`Scan`, so that the audit can report
all of it at once. :func:`defectlib.data.layouts.index` turns the first note into an error.
"""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff")
GOOD = "good"

UNREADABLE_FOLDER = "unreadable folder"
SYMLINK_LOOP = "symlink loop"
BROKEN_LINK = "broken link"


@dataclass
class Scan:
    """What a reader found.

    Attributes:
        rows: One dict an image: category, defect ("" where only the mask can tell), id, role, image, mask, group.
        orphans: Masks that no image goes with, relative to the root.
        troubles: (path relative to the root, problem) of folders and links that cannot be followed.
    """

    rows: list[dict[str, str]] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    troubles: list[tuple[str, str]] = field(default_factory=list)

    def add(self, category: str, defect: str, id: str, role: str, image: str, mask: str = "", group: str = "") -> None:
        """Add an image; without a group it is a group of its own, named by its path."""
        self.rows.append(
            {
                "category": category,
                "defect": defect,
                "id": id,
                "role": role,
                "image": image,
                "mask": mask,
                "group": group or image,
            }  # fmt: skip
        )


class Tree:
    """Sorted listings of a folder that note what cannot be read instead of raising."""

    def __init__(self, root: Path | str, scan: Scan):
        self.root, self.scan = Path(root), scan

    def _entries(self, relative: str) -> tuple[list[str], list[str]]:
        folder = self.root / relative
        folders, files = [], []
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError:
            self._note(relative or ".", UNREADABLE_FOLDER)
            return [], []
        for name in names:
            path, inside = folder / name, str(PurePosixPath(relative) / name)
            problem = link_problem(path)
            if problem:
                self._note(inside, problem)
            elif os.path.isdir(path):
                folders.append(name)
            elif not name.startswith("."):
                files.append(name)
        return folders, files

    def _note(self, path: str, problem: str) -> None:
        if (path, problem) not in self.scan.troubles:
            self.scan.troubles.append((path, problem))

    def has(self, relative: str) -> bool:
        """Whether there is such a folder."""
        return (self.root / relative).is_dir()

    def folders(self, relative: str = "") -> list[str]:
        """Names of the folders in a folder; none if it does not exist."""
        return [n for n in self._entries(relative)[0] if not n.startswith(".")] if self.has(relative) else []

    def images(self, relative: str) -> list[str]:
        """Names of the image files in a folder; none if it does not exist."""
        if not self.has(relative):
            return []
        return [n for n in self._entries(relative)[1] if n.lower().endswith(IMAGE_SUFFIXES)]


def link_problem(path: Path | str) -> str:
    """What is wrong with a symbolic link: a loop, a missing target, or nothing ("")."""
    if not os.path.islink(path):
        return ""
    try:
        os.stat(path)
    except OSError as error:
        return SYMLINK_LOOP if error.errno == errno.ELOOP else BROKEN_LINK
    target, here = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    inside = os.path.isdir(target) and (here == target or here.startswith(target.rstrip(os.sep) + os.sep))
    return SYMLINK_LOOP if inside else ""


def join(*parts: str) -> str:
    """A posix path relative to the root; empty parts are skipped."""
    return str(PurePosixPath(*[part for part in parts if part]))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _unique_ids(names: list[str]) -> dict[str, str]:
    """File name -> id: the stem, or the whole name where two files share a stem (000.png beside 000.jpg)."""
    stems = [_stem(name) for name in names]
    return {name: (stem if stems.count(stem) == 1 else name) for name, stem in zip(names, stems)}


def mvtec(root: Path | str, good: str = GOOD) -> Scan:
    """MVTec AD's layout, and its relatives: MVTec 3D-AD (``rgb`` and ``gt`` folders) and BTAD (``good="ok"``).

    ``<category>/train/good``, ``<category>/test/<defect>``, ``<category>/ground_truth/<defect>/<stem>_mask.png``; a
    mask may also carry its image's own stem. A root that holds ``train`` or ``test`` itself is one category named after
    the folder. ``validation/good`` (MVTec 3D-AD) counts as train.
    """
    scan = Scan()
    tree = Tree(root, scan)
    top = tree.folders()
    if {"train", "test"} & set(top):
        categories = [("", Path(root).resolve().name)]
    else:
        categories = [(name, name) for name in top if tree.has(f"{name}/train") or tree.has(f"{name}/test")]
    for base, category in categories:
        for part, role in (("train", "train"), ("validation", "train"), ("test", "test")):
            folder = join(base, part, good)
            folder = join(folder, "rgb") if tree.has(join(folder, "rgb")) else folder
            for name, stem in _unique_ids(tree.images(folder)).items():
                scan.add(category, GOOD, f"{part}_{stem}", role, join(folder, name))
        truth = join(base, "ground_truth")
        defects = set(tree.folders(join(base, "test"))) | set(tree.folders(truth))
        for defect in sorted(defects - {good, GOOD}):
            folder = join(base, "test", defect)
            flat = not tree.has(join(folder, "rgb"))
            _pairs(tree, category, defect, "test", *(
                (folder, join(truth, defect)) if flat else (join(folder, "rgb"), join(folder, "gt"))
            ))  # fmt: skip
    return scan


def _pairs(tree: Tree, category: str, defect: str, role: str, images: str, masks: str) -> None:
    """Add the images of one folder with the masks of another, matched by stem or ``<stem>_mask``."""
    found = {}
    for name in tree.images(masks):
        found.setdefault(_stem(name).removesuffix("_mask"), name)
    for name, stem in _unique_ids(tree.images(images)).items():
        mask = found.pop(_stem(name), "")
        tree.scan.add(category, defect, stem, role, join(images, name), join(masks, mask) if mask else "")
    tree.scan.orphans += [join(masks, name) for name in found.values()]


def btad(root: Path | str) -> Scan:
    """BTAD: ``01``, ``02``, ``03`` with ``train/ok``, ``test/ok``, ``test/ko``, ``ground_truth/ko`` (bmp and png)."""
    return mvtec(root, good="ok")


def magnetic_tile(root: Path | str) -> Scan:
    """Magnetic tile: ``MT_<Class>/Imgs/<stem>.jpg`` with a mask ``<stem>.png`` beside it; class Free is normal."""
    scan = Scan()
    tree = Tree(root, scan)
    for folder in tree.folders():
        if not folder.startswith("MT_"):
            continue
        defect = folder.removeprefix("MT_").lower()
        inside = join(folder, "Imgs")
        names = tree.images(inside)
        masks = {_stem(name): name for name in names if name.lower().endswith(".png")}
        for name in names:
            if name.lower().endswith(".png"):
                continue
            mask = masks.pop(_stem(name), "")
            defect_name = GOOD if defect == "free" else defect
            scan.add(
                "magnetic_tile", defect_name, _stem(name), "", join(inside, name), join(inside, mask) if mask else ""
            )
        scan.orphans += [join(inside, name) for name in masks.values()]
    return scan


def gdxray(root: Path | str) -> Scan:
    """GDXray welds: images ``W0001/W0001_NNNN.png``, masks ``W0002/W0002_NNNN.png`` of the same number.

    ``W0003`` is not read: it has no masks, and ``W0001`` is a selection of it.
    """
    scan = Scan()
    tree = Tree(root, scan)
    base = next((name for name in ("", "Welding", "Welds", "welds") if tree.has(join(name, "W0001"))), "")
    number = re.compile(r"^W000[12]_(\d+)$")
    masks = {}
    for name in tree.images(join(base, "W0002")):
        match = number.match(_stem(name))
        masks[match[1] if match else _stem(name)] = name
    for name in tree.images(join(base, "W0001")):
        match = number.match(_stem(name))
        mask = masks.pop(match[1], "") if match else ""
        scan.add(
            "weld", "defect", _stem(name), "", join(base, "W0001", name), join(base, "W0002", mask) if mask else ""
        )
    scan.orphans += [join(base, "W0002", name) for name in masks.values()]
    return scan


def deepcrack(root: Path | str) -> Scan:
    """DeepCrack: ``train_img``, ``train_lab``, ``test_img``, ``test_lab``; jpg images and png masks of one stem.

    Pieces of one photograph carry its name before a dash (7Q3A9060-1, 7Q3A9060-2): they are one group.
    """
    scan = Scan()
    tree = Tree(root, scan)
    for role in ("train", "test"):
        before = len(scan.rows)
        _pairs(tree, "deepcrack", "crack", role, f"{role}_img", f"{role}_lab")
        for row in scan.rows[before:]:
            row["group"] = re.sub(r"-\d+$", "", row["id"])
            row["id"] = f"{role}_{row['id']}"
    return scan


def ksdd2(root: Path | str) -> Scan:
    """KolektorSDD2: ``train`` and ``test`` with ``NNNNN.png`` and ``NNNNN_GT.png``; an empty mask means normal.

    The defect is left "" here: only the mask tells (:func:`defectlib.data.catalog.by_mask`).
    """
    scan = Scan()
    tree = Tree(root, scan)
    for role in ("train", "test"):
        names = tree.images(role)
        masks = {_stem(name)[: -len("_GT")]: name for name in names if _stem(name).endswith("_GT")}
        for name in names:
            if _stem(name).endswith("_GT"):
                continue
            mask = masks.pop(_stem(name), "")
            scan.add("ksdd2", "", f"{role}_{_stem(name)}", role, join(role, name), join(role, mask) if mask else "")
        scan.orphans += [join(role, name) for name in masks.values()]
    return scan


# Reader -> what it looks for in a folder, for the sentence that says that nothing of it is there.
EXPECTED = {
    mvtec: "<category>/train/good, <category>/test/<defect> and <category>/ground_truth/<defect>/<same name>_mask.png",
    btad: "<category>/train/ok, <category>/test/ko and <category>/ground_truth/ko",
    magnetic_tile: "MT_<Class>/Imgs, with images <name>.jpg and masks <name>.png",
    gdxray: "W0001 (images) and W0002 (masks)",
    deepcrack: "train_img, train_lab, test_img and test_lab",
    ksdd2: "train and test, with images <number>.png and masks <number>_GT.png",
}
