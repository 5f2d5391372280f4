"""Does a test set hold what was trained on? Of a run of ours, or of anybody's lists of files.

Three looks, from the surest to the one that must be looked at: the same bytes, the same picture (however it was
stored, exposed or shifted a little), and the same name. Pictures are compared by their fine structure, see
``data.likeness``. Of the magnetic tile set, which shows each tile under up to six exposures and says nowhere which
belong together, it finds nearly all repeats (``tests/test_leaks`` holds nine in ten), and some pairs of different tiles
too: a likeness is a reason to look, not a proof.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from defectlib import images, paths, sampling
from defectlib.data import layouts
from defectlib.data.likeness import likeness, structure
from defectlib.data.readers import IMAGE_SUFFIXES
from defectlib.methods import base

LIKENESS = 0.7
"""Correlation from which two pictures are reported as near-duplicates."""
COPY = 0.95
"""Correlation from which a drawn picture is reported as a copy of a shot."""
BYTES, PICTURE, NAME, SAMPLE = "same bytes", "same picture", "same name", "sample copies a shot"
COLUMNS = ["found", "train", "test", "likeness"]


def between(train: Sequence[Path], test: Sequence[Path], least: float = LIKENESS) -> pd.DataFrame:
    """What two lists of image files have in common.

    Args:
        train: Files that are learned from.
        test: Files that are tested on.
        least: Likeness from which two pictures are reported.

    Returns:
        Columns ``COLUMNS``: ``found`` is the surest of "same bytes", "same picture" and "same name" (the file and its
        folder have the names of the other's); a row a pair, the surest and the most alike first.

    Raises:
        ValueError: A list is empty, or a file cannot be decoded.
    """
    train, test = list(dict.fromkeys(map(Path, train))), list(dict.fromkeys(map(Path, test)))
    if not train or not test:
        raise ValueError(f"{len(train)} training and {len(test)} test files: at least one of each is needed")
    alike = likeness(*(np.stack([structure(images.open_pil(file)) for file in files]) for files in (train, test)))
    hashes = [[paths.sha256(file) for file in files] for files in (train, test)]
    found = np.full(alike.shape, "", object)
    names = [np.array(["/".join(file.parts[-2:]).lower() for file in files]) for files in (train, test)]
    found[names[0][:, None] == names[1]] = NAME
    found[alike >= least] = PICTURE
    found[np.array(hashes[0])[:, None] == np.array(hashes[1])] = BYTES
    rows = [[found[i, j], str(train[i]), str(test[j]), float(alike[i, j])] for i, j in np.argwhere(found != "")]
    return _ordered(rows)


def of_run(folder: Path, data_root: Path | None = None) -> tuple[pd.DataFrame, dict[str, int]]:
    """The leaks of a run of ours: its split, and samples that are a shot again.

    Where one fit serves the data set, the shots and training normals of all its categories count as learned from.

    Args:
        folder: A run's folder, ``<runs>/<profile>/<dataset>/<category>/<method>/s<seed>``.
        data_root: Where the data set lies now; None is where it lay when the run was made.

    Returns:
        As :func:`between`, with "sample copies a shot" where a drawn picture is nearly a shot's ("test" is then the
        sample); and how many files of each kind were compared.

    Raises:
        ValueError: It is no run's folder, or the data set is not where it was.
    """
    folder = Path(folder).resolve()
    made = next(
        (file for stage in ("fit", "sample", "downstream") if (file := folder / f"{stage}.json").is_file()), None
    )
    if made is None:
        raise ValueError(f"{folder} is no run: name a folder such as runs/demo/mini/brick/crop_paste/s0")
    run = json.loads(made.read_text())
    partition = run["seed"] if run["split"] == "random_thirds" else 0
    split = folder.parents[2] / f"split_p{partition}.csv"
    if not split.is_file():
        raise ValueError(f"{split} is missing: the split of the run {folder} is not known")
    root = Path(data_root or json.loads(split.with_suffix(".json").read_text())["root"])
    rows = pd.read_csv(split, dtype=str, keep_default_na=False)
    own = rows["category"] == run["category"]
    rows = rows[own | (_serves_all(folder) & (rows["side"] != "test"))]
    sides = {side: [root / name for name in dict.fromkeys(rows.loc[rows["side"] == side, "image"])] for side in _SIDES}
    if gone := [file for files in sides.values() for file in files if not file.is_file()]:
        raise ValueError(f"{gone[0]} is missing: say with --data-root where the data set lies now")
    counts = {_SIDES[side]: len(files) for side, files in sides.items()}
    found = [between([*sides["shot"], *sides["train"]], sides["test"])] if sides["test"] else []
    drawn = sorted((folder / "images").glob("*.png"))
    counts["samples"] = len(drawn)
    if drawn and run["method"] != "shots_only":
        found.append(_copies(folder, rows[rows["side"] == "shot"], root))
    return (pd.concat(found, ignore_index=True) if found else _ordered([])), counts


_SIDES = {"shot": "shots", "train": "training normals", "test": "test images"}


def _serves_all(folder: Path) -> bool:
    """Whether a run's fit learned from other categories too."""
    files = [file for stage in ("fit", "sample") if (file := folder / f"{stage}.json").is_file()]
    told = [json.loads(file.read_text())["parameters"] for file in files]
    configs, name = [one["config"] for one in told if "config" in one], folder.parent.name
    of = base.method_of(name)
    if not configs and of not in (None, name):  # a filter has the fit of its method
        return _serves_all(folder.parents[1] / of / folder.name)
    scope = base.get(of).scope if of else None
    return any("fitted_with" in one for one in told) or "dataset" in {one.get("scope", scope) for one in configs}


def _copies(folder: Path, shots: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Samples that are nearly a shot of their defect, as the run read it: whole, or the tile of it, also mirrored."""
    drawn = sampling.load(folder)
    size = drawn[0].image.shape[-1]
    real = [layouts.read_image(row, root, size) for row in shots.itertuples()]
    made = _structures([item.image for item in drawn])
    alike = np.max([likeness(_structures([x.flip(turn) for x in real]), made) for turn in images.TURNS], 0)
    same = shots["defect"].to_numpy(dtype=object)[:, None] == np.array([item.defect for item in drawn], object)
    names = [f"{row.image} {row.box}".strip() for row in shots.itertuples()]
    files = [str(sampling.image_file(folder, item.seed)) for item in drawn]
    return _ordered([[SAMPLE, names[i], files[j], float(alike[i, j])] for i, j in np.argwhere(same & (alike >= COPY))])


def _structures(pictures: Sequence[Tensor]) -> np.ndarray:
    return np.stack([structure(Image.fromarray(images.to_uint8(picture))) for picture in pictures])


def spoils(table: pd.DataFrame) -> bool:
    """Whether a table of findings holds more than equal names, which other folders have too."""
    return bool((table["found"] != NAME).any())


def listed(source: Path) -> list[Path]:
    """The image files that a folder holds, or that a text file lists, a path a line, relative to where it lies.

    Raises:
        ValueError: There is no such file or folder, it names no image, or a file that it names is missing.
    """
    if source.is_dir():
        found = sorted(Path(at) / name for at, _, names in os.walk(source) for name in names)
        found = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    elif source.is_file():
        found = [source.parent / line.strip() for line in source.read_text().splitlines() if line.strip()]
    else:
        raise ValueError(f"{source} is neither a folder of images nor a list of files")
    if not found:
        raise ValueError(f"{source} names no image")
    if gone := [file for file in found if not file.is_file()]:
        raise ValueError(f"{source} names {gone[0]}, which is missing: paths are relative to the list's folder")
    return found


def _ordered(rows: list[list]) -> pd.DataFrame:
    table, rank = pd.DataFrame(rows, columns=COLUMNS), {BYTES: 0, PICTURE: 1, SAMPLE: 2, NAME: 3}
    order = table["found"].map(rank).astype(float)
    table = table.assign(order=order).sort_values(["order", "likeness"], ascending=[True, False], kind="stable")
    return table.drop(columns="order").reset_index(drop=True)
