"""From parameters to data: where a data set lies, its index as images or tiles, and its split, made once.

The split manifest is kept in the data set's run folder and made anew when files, rule or tiles change.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from defectlib import params, paths
from defectlib.data import audit, catalog, layouts, mini, splits, tiles
from defectlib.masks import trimap
from defectlib.params import Parameters


def data_root(parameters: Parameters) -> Path:
    """Where the data set lies: as given, else ``data/<dataset>``; the built-in benchmark is built there once.

    Raises:
        ValueError: There is no data set of this name.
        FileNotFoundError: The folder does not exist.
    """
    entry = catalog.dataset(parameters.dataset)
    root = Path(parameters.data_root) if parameters.data_root else paths.DATA / parameters.dataset
    if parameters.dataset == "mini" and parameters.data_root is None:
        with paths.locked(root.parent / ".mini.lock"):
            if not root.is_dir():
                print(f"drawing mini into {root} (once)", file=sys.stderr, flush=True)
            return mini.build(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder: give DATA_ROOT=... ({entry.obtain})")
    return root


def fingerprint(root: Path) -> str:
    """sha256 over the names, sizes and times of all files under ``root``: does the data still stand as it was split?"""
    lines = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            status = os.stat(os.path.join(folder, name))
            lines.append(f"{os.path.relpath(os.path.join(folder, name), root)} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def median_cells(rows: pd.DataFrame, root: Path, size: int, cell: int) -> float:
    """How many latent cells the median defect of a category covers when whole images are resized to ``size``."""
    masked = rows[rows["mask"] != ""]
    shares = [layouts.read_mask(row, root).float().mean().item() for row in masked.itertuples()]
    return float(np.median([share for share in shares if share > 0] or [1.0])) * size**2 / cell**2


def read_index(parameters: Parameters, root: Path) -> pd.DataFrame:
    """The index table, cut into square tiles where ``tiles`` or the data set says so.

    In a user's own folder (unit "auto") a category is cut where its median defect, resized with its image, would cover
    less than one latent cell: it could not be drawn.
    """
    index = layouts.index(parameters.dataset, root)
    if parameters.tiles == "none":
        return index
    settings = parameters.settings().data
    parts = []
    for _, rows in index.groupby("category", sort=False):
        side = parameters.tiles
        if side is None:
            unit = layouts.DATASETS[parameters.dataset].unit
            small = unit == "auto" and median_cells(rows, root, settings.image_size, settings.latent_cell) < 1
            side = "auto" if small or unit == "tiles" else "none"
        if side != "none":
            size, cell = settings.image_size, settings.latent_cell
            rows = tiles.cut(rows, root, side, seed=0, size=size, cell=cell, foreground=trimap.foreground)
        parts.append(rows)
    return layouts.sort(pd.concat(parts))


def manifest(parameters: Parameters, seed: int = 0) -> pd.DataFrame:
    """The split manifest, made once a (profile, data set) after an audit and kept in the data set's run folder.

    ``random_thirds`` has one manifest a seed: the partition is the seed. What the audit found that costs images (a mask
    that is all black, say) is told on stderr, one line a kind.

    Raises:
        ValueError: The run folder belongs to other data, the audit found what would spoil a run, or the split leaks.
    """
    rule = parameters.settings().data.split
    partition = seed if rule == "random_thirds" else 0
    root, data = data_root(parameters), parameters.settings().data
    folder = parameters.dataset_folder()
    stamp = {
        "rule": rule, "partition": partition, "tiles": parameters.tiles, "root": str(root.resolve()),
        "image_size": data.image_size, "latent_cell": data.latent_cell, "files": fingerprint(root),
        "columns": splits.COLUMNS,
    }  # fmt: skip
    target, mark = folder / f"split_p{partition}.csv", folder / f"split_p{partition}.json"
    with paths.locked(folder / ".split.lock"):
        kept = json.loads(mark.read_text()) if mark.is_file() else {}
        # Data that were moved are the same; other files at another place would replace the runs of the first.
        if kept and kept["root"] != stamp["root"] and kept["files"] != stamp["files"]:
            raise ValueError(
                f"{folder} holds the runs on {kept['root']}, so those on {root.resolve()} need a runs folder of their "
                f"own: put DEFECTLIB_RUNS=/path before the command, or move {folder} away"
            )
        if kept != stamp or not target.is_file():
            print(f"auditing and splitting {parameters.dataset} in {root} (once)", file=sys.stderr, flush=True)
            found = audit.audit(parameters.dataset, root)
            if audit.spoils(found):
                first = found[found["severity"] == "error"].iloc[0]
                place = "" if first["file"] == "." else f": {first['file']}"
                raise ValueError(
                    f"{root} would spoil a run: {first['problem']}{place}. {first['remedy']} (all findings: "
                    f"python -m defectlib audit --dataset {parameters.dataset} --data-root {shlex.quote(str(root))})"
                )
            for problem, lines in found[found["severity"] == "warning"].groupby("problem", sort=False):
                first, more = lines.iloc[0], f" ({len(lines)} such files)" if len(lines) > 1 else ""
                print(f"{first['file']}: {problem}{more}. {first['remedy']}", file=sys.stderr, flush=True)
            table = splits.split(read_index(parameters, root), root, rule, partition)
            splits.check(table)
            splits.write(table, target)
            paths.write_text(mark, json.dumps(stamp))
    return splits.read(target)


def ordered(names: list[str], dataset: str, category: str | None = None) -> list[str]:
    """Names in the order the category file gives its prompts (defects), then by name."""
    shipped = params.load_category(dataset, category) if category else None
    first = [name for name in shipped.prompts if name in names] if shipped else []
    return first + sorted(set(names) - set(first))


def categories(parameters: Parameters) -> list[str]:
    """The categories that the profile's grid covers: those with at least one shot, the first ones by name."""
    table = manifest(parameters)
    names = sorted(table.loc[table["side"] == "shot", "category"].unique())
    return names[: parameters.settings().grid.categories]
