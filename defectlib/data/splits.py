"""Few-shot splits as manifests: the index table with a side for every image, and a test that nothing leaks.

Four rules, three for the protocols of DefectSynth's tables and one for AdaBLDM's; ``n`` counts the groups of a
(category, defect), which are its images unless pieces repeat or images are cut into tiles:

* ``first_third`` (localisation): the lowest floor(n/3) by id are shots, at least one; the rest is tested.
* ``random_thirds`` (classification): a seeded random floor(n/3); seeds 0, 1, 2 are the three partitions.
* ``ten_shots`` (AdaBLDM): the lowest ten by id are shots, of fewer than twenty the lower half; the rest is tested. The
  paper's ten of each type are a list in its released code, which copies them into the test set too.
* ``all_shots`` (generation): every defect image up to 30, a seeded choice beyond; nothing is tested.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from defectlib import paths
from defectlib.data import layouts
from defectlib.data.readers import GOOD
from defectlib.types import Shot

RULES = ("first_third", "random_thirds", "ten_shots", "all_shots")
SIDES = ("shot", "test", "train", "unused")
COLUMNS = [*layouts.COLUMNS, "side", "sha256", "mask_sha256"]
ALL_SHOTS, TEN_SHOTS = 30, 10
MVTEC_TYPES = Path(__file__).resolve().parents[1] / "published" / "mvtec_types.csv"
MANIFESTS = Path(__file__).resolve().parent / "manifests"

_TRAINING = {"shot": "training", "train": "training", "test": "test"}


def split(index: pd.DataFrame, root: Path | str, rule: str, seed: int = 0) -> pd.DataFrame:
    """Give every image of an index a side.

    A byte-identical copy of an image and a defect image without a usable mask are "unused" (of copies, one with a mask
    is kept before one without, a defect before a normal, then the lowest id). Normals follow their group where it holds
    defects, else the role of their folder, else the lowest floor(2n/3) groups train and the rest is tested.

    Args:
        index: Rows of :func:`layouts.index` or :func:`tiles.cut`.
        root: The data set's folder; every image is hashed and every mask read.
        rule: One of ``RULES``.
        seed: The partition of ``random_thirds``, and the choice of ``all_shots`` beyond 30.

    Returns:
        The manifest: the index with ``side`` ("shot", "test", "train" or "unused"), ``sha256`` of the image file and
        ``mask_sha256`` of the mask file ("" where there is none): a corrected mask makes another manifest.

    Raises:
        ValueError: The rule is unknown, or a file cannot be decoded.
    """
    if rule not in RULES:
        raise ValueError(f"there is no split rule '{rule}'; known: {', '.join(RULES)}")
    root = Path(root)
    hashes = {image: paths.sha256(root / image) for image in dict.fromkeys(index["image"])}
    masks = {mask: paths.sha256(root / mask) if mask else "" for mask in dict.fromkeys(index["mask"])}
    table = layouts.sort(index).assign(
        sha256=lambda t: t["image"].map(hashes), mask_sha256=lambda t: t["mask"].map(masks)
    )
    usable = [row.defect == GOOD or (row.mask != "" and _shows(row, root)) for row in table.itertuples()]
    kept = _one_of_each(table, usable)
    return assign(table, rule, seed, [u and k for u, k in zip(usable, kept)])[COLUMNS]


def _shows(row, root: Path) -> bool:
    return bool(layouts.read_mask(row, root).any())


def _one_of_each(table: pd.DataFrame, usable: list[bool]) -> list[bool]:
    """False for rows of a file that is a byte-identical copy of a file that is kept; tiles of one file all stay."""
    rows = list(table.itertuples(index=False))
    keys = [(not usable[i], row.defect == GOOD, layouts.natural(row.id), row.image) for i, row in enumerate(rows)]
    keeper: dict[str, str] = {}
    for i in sorted(range(len(rows)), key=keys.__getitem__):
        keeper.setdefault(rows[i].sha256, rows[i].image)
    return [keeper[row.sha256] == row.image for row in rows]


def assign(index: pd.DataFrame, rule: str, seed: int = 0, usable: Collection[bool] | None = None) -> pd.DataFrame:
    """The rule alone, without files: the index with ``side``; rows that are not usable are "unused"."""
    table = index.assign(side="unused")
    ready = table[list(usable)] if usable is not None else table
    defects, normals = ready[ready["defect"] != GOOD], ready[ready["defect"] == GOOD]
    sides: dict[str, str] = {}
    for (category, defect), rows in defects.groupby(["category", "defect"], sort=True):
        rng = np.random.default_rng([seed, zlib.crc32(f"{category}/{defect}".encode())])
        if rule == "all_shots":
            chosen = rows.index if len(rows) <= ALL_SHOTS else np.sort(rng.choice(rows.index, ALL_SHOTS, replace=False))
            table.loc[chosen, "side"] = "shot"
            sides |= dict.fromkeys(rows["group"], "shot")
            continue
        groups = _by_lowest_id(rows)
        order = [groups[i] for i in rng.permutation(len(groups))] if rule == "random_thirds" else groups
        share = min(TEN_SHOTS, len(groups) // 2) if rule == "ten_shots" else len(groups) // 3
        quota = max(1, share) - sum(sides.get(group) == "shot" for group in groups)
        for group in order:
            if group not in sides:
                sides[group] = "shot" if quota > 0 else "test"
                quota -= 1
        table.loc[rows.index, "side"] = rows["group"].map(sides)
    follow = {"shot": "train", "test": "test"}
    for _, rows in normals.groupby("category", sort=True):
        side = rows["group"].map(sides).map(follow)
        side = side.fillna(rows["role"].where(rows["role"] != "")).astype(object)
        free = _by_lowest_id(rows[side.isna()])
        train = set(free[: max(1, 2 * len(free) // 3)])
        side = side.where(
            side.notna(), rows["group"].map(lambda group, train=train: "train" if group in train else "test")
        )
        table.loc[rows.index, "side"] = _whole_groups(rows, side)
    return table


def _by_lowest_id(rows: pd.DataFrame) -> list[str]:
    """The groups of some rows, in the order of their lowest id (numbers as numbers)."""
    return list(dict.fromkeys(layouts.sort(rows)["group"]))


def _whole_groups(rows: pd.DataFrame, side: pd.Series) -> pd.Series:
    """Normals of one group whose folders disagree are all kept out of training."""
    tested = set(rows.loc[side == "test", "group"])
    return side.where(~rows["group"].isin(tested), "test")


def write(manifest: pd.DataFrame, path: Path | str) -> None:
    """Write a manifest as CSV, by atomic rename."""
    paths.write_text(path, manifest.to_csv(index=False, lineterminator="\n"))


def read(path: Path | str) -> pd.DataFrame:
    """Read a manifest back; all columns are strings.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a side is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: make it with splits.split and splits.write")
    table = pd.read_csv(io.StringIO(path.read_text()), dtype=str, keep_default_na=False)
    missing = [name for name in COLUMNS if name not in table.columns]
    if missing:
        raise ValueError(f"{path} is no manifest: it lacks the columns {', '.join(missing)}; remove it and split again")
    unknown = sorted(set(table["side"]) - set(SIDES))
    if unknown:
        raise ValueError(f"{path} has the side '{unknown[0]}'; known: {', '.join(SIDES)}")
    return table


def check(manifest: pd.DataFrame) -> None:
    """Raise ValueError where something stands on both sides of a split.

    Training holds shots and training normals. A group, or one file's bytes (crops of one image included), must not be
    in training and in test.
    """
    used = manifest[manifest["side"] != "unused"].assign(part=lambda t: t["side"].map(_TRAINING))
    for column, what in (("group", "the group"), ("sha256", "the bytes of")):
        parts = used[used[column] != ""].groupby(column)["part"].nunique()
        leaks = parts[parts > 1].index
        if len(leaks):
            rows = used[used[column] == leaks[0]]
            names = sorted(set(rows["image"]))
            where = leaks[0] if column == "group" else names[0]
            raise ValueError(
                f"the split leaks: {what} {where} is in training and in test ({', '.join(names[:4])}); "
                "give these images one group, or remove the copies"
            )


def shots(
    manifest: pd.DataFrame, root: Path | str, category: str, defects: Collection[str] | None = None, size: int = 64
) -> list[Shot]:
    """The few-shot training set of a category, in the order of the manifest.

    Args:
        manifest: From :func:`split` or :func:`read`.
        root: The data set's folder.
        category: Its name.
        defects: Only these types; None takes all.
        size: Side of the square images, in px.

    Raises:
        ValueError: There is no such shot, or a file cannot be decoded.
    """
    found = rows(manifest, category, "shot", defects)
    if found.empty:
        raise ValueError(
            f"category '{category}' has no shots{' of ' + ', '.join(defects) if defects else ''}; "
            f"categories with shots: {', '.join(sorted(set(manifest.loc[manifest['side'] == 'shot', 'category'])))}"
        )
    return [
        Shot(layouts.read_image(row, root, size), layouts.read_mask(row, root, size), category, row.defect, row.id)
        for row in found.itertuples()
    ]


def normals(
    manifest: pd.DataFrame,
    root: Path | str,
    category: str,
    side: str = "train",
    size: int = 64,
    limit: int | None = None,
) -> list[Tensor]:
    """Defect-free images of a category as float32 (3, size, size) in [-1, 1].

    Args:
        manifest: From :func:`split` or :func:`read`.
        root: The data set's folder.
        category: Its name.
        side: "train" or "test".
        size: Side of the square images, in px.
        limit: At most this many, spread evenly over the ids: neighbours are often pictures of one piece.
    """
    return [layouts.read_image(row, root, size) for row in normal_rows(manifest, category, side, limit).itertuples()]


def normal_rows(manifest: pd.DataFrame, category: str, side: str = "train", limit: int | None = None) -> pd.DataFrame:
    """The rows that :func:`normals` reads, in its order."""
    found = rows(manifest, category, side, [GOOD])
    if limit is not None and len(found) > limit:
        found = found.iloc[np.linspace(0, len(found) - 1, limit).round().astype(int)]
    return found


def held_out(
    manifest: pd.DataFrame, root: Path | str, category: str, defects: Collection[str] | None = None, size: int = 64
) -> list[tuple[Tensor, Tensor, str, str]]:
    """The test set of a category: (image, mask, defect, id) of the held-out defects and of the test normals ("good").

    Args:
        manifest: From :func:`split` or :func:`read`.
        root: The data set's folder.
        category: Its name.
        defects: Only these defect types (normals always come along); None takes all.
        size: Side of the square images, in px.
    """
    found = rows(manifest, category, "test", None if defects is None else [*defects, GOOD])
    return [
        (layouts.read_image(row, root, size), layouts.read_mask(row, root, size), row.defect, row.id)
        for row in found.itertuples()
    ]


def rows(manifest: pd.DataFrame, category: str, side: str, defects: Collection[str] | None) -> pd.DataFrame:
    """Those of a category and a side, and of some defects ("good" is the normals); None takes all."""
    chosen = (manifest["category"] == category) & (manifest["side"] == side)
    if defects is not None:
        chosen &= manifest["defect"].isin(list(defects))
    return manifest[chosen]


def published_split(rule: str, seed: int = 0) -> pd.DataFrame:
    """The split of MVTec AD's defect images, from public knowledge alone: the files of a type are 000.png, 001.png, ...

    Counts come from ``published/mvtec_types.csv`` (DefectSynth's list of prompts: 1,258 images over 73 types).

    Returns:
        Columns category, defect, id, side; equal to what :func:`split` gives on the release.
    """
    if rule not in RULES:
        raise ValueError(f"there is no split rule '{rule}'; known: {', '.join(RULES)}")
    types = pd.read_csv(MVTEC_TYPES)
    rows = [(t.category, t.defect, f"{i:03d}") for t in types.itertuples() for i in range(t.n)]
    table = pd.DataFrame(rows, columns=["category", "defect", "id"]).assign(role="test")
    table = table.assign(group=table["category"] + "/" + table["defect"] + "/" + table["id"])
    return assign(layouts.sort(table), rule, seed)[["category", "defect", "id", "side"]]


def manifest_file(rule: str, seed: int = 0) -> Path:
    """Where the committed manifest of MVTec AD lies."""
    suffix = f"_s{seed}" if rule == "random_thirds" else ""
    return MANIFESTS / f"mvtec_ad_{rule}{suffix}.csv"
