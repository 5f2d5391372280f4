"""A run's samples in MVTec AD's layout, for other tools: what was drawn, its masks, and the run's normal images.

    <folder>/<category>/train/good/000.png ...
    <folder>/<category>/test/<defect>/<seed>.png
    <folder>/<category>/ground_truth/<defect>/<seed>_mask.png
    <folder>/<category>/samples.csv      prompts, areas and notes of every sample, and whether it is among the above
    <folder>/README.md                   what made it, and the data set's licence

Samples whose mask is empty, full or flawed would teach a defect that is none; they are left out and counted.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pandas as pd

from defectlib import images, paths, sampling, study
from defectlib.data.catalog import DATASETS
from defectlib.methods import base
from defectlib.params import Parameters
from defectlib.types import Sample


def export(parameters: Parameters, method: str, seed: int, folder: Path) -> pd.DataFrame:
    """Write all categories of a data set for which ``method`` has drawn with ``seed``.

    Args:
        parameters: Which runs: profile, data set, split, runs folder.
        method: A method or a variant.
        seed: Of the run.
        folder: Where to; it must not exist yet, or be empty. It is there whole or not at all.

    Returns:
        A row a (category, defect): ``written`` and ``left_out`` samples, ``why`` these, and the category's ``normals``.

    Raises:
        ValueError: The folder holds something, or no such run has drawn its samples.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name a new folder, nothing in it is overwritten")
    root = parameters.dataset_folder()
    drawn = sorted(file.parents[2].name for file in root.glob(f"*/{method}/s{seed}/sample.json"))
    if not drawn:
        there = sorted(
            {f"{file.parents[1].name} seed {file.parent.name[1:]}" for file in root.glob("*/*/s*/sample.json")}
        )
        raise ValueError(
            f"{root} has no samples of {method} with seed {seed}; it has: {', '.join(there) or 'none'}. "
            "Runs of another profile are found by --profile"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        counts = [row for category in drawn for row in _category(parameters, category, method, seed, partial)]
        table = pd.DataFrame(counts)
        paths.write_text(partial / "README.md", _about(parameters, method, seed, table))
        os.chmod(partial, 0o755)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return table


def _category(parameters: Parameters, category: str, method: str, seed: int, folder: Path) -> list[dict]:
    run, target = parameters.dataset_folder() / category / method / f"s{seed}", folder / category
    drawn = json.loads((run / "sample.json").read_text())["parameters"]["prompts"]
    asked = {"category": category, "methods": [base.method_of(method)], "variants": [], "defects": list(drawn)}
    s = study.open_category(parameters.model_copy(update=asked))  # what the run did not ask for refuses nothing
    report = sampling.read_report(run)
    samples = sampling.load(run)
    kept = {sample.seed for sample in samples if sampling.teaches(sample)}
    for sample in samples:
        if sample.seed in kept:
            images.write_image(target / "test" / sample.defect / f"{sample.seed:06d}.png", sample.image)
            name = f"{sample.seed:06d}_mask.png"
            images.write_mask(target / "ground_truth" / sample.defect / name, sample.mask, sample.notes)
    normals = s.normals(seed)
    for i, normal in enumerate(normals):
        images.write_image(target / "train" / "good" / f"{i:03d}.png", normal)
    paths.write_text(target / "samples.csv", report.assign(exported=report["seed"].isin(kept)).to_csv(index=False))
    return [
        {
            "category": category, "defect": defect, "written": int(rows["seed"].isin(kept).sum()),
            "left_out": int((~rows["seed"].isin(kept)).sum()), "normals": len(normals),
            "why": _why([sample for sample in samples if sample.defect == defect and sample.seed not in kept]),
        }
        for defect, rows in report.groupby("defect", sort=True)
    ]  # fmt: skip


def _why(left_out: list[Sample]) -> str:
    """The flaws of the samples that are left out, with their numbers: "2 empty, 1 full"."""
    flaws = Counter(sample.notes.get("flaw") or "a mask that is empty or full" for sample in left_out)
    return ", ".join(f"{n} {flaw}" for flaw, n in flaws.most_common())


def _about(parameters: Parameters, method: str, seed: int, counts: pd.DataFrame) -> str:
    record = min(parameters.dataset_folder().glob(f"*/{method}/s{seed}/sample.json"))
    about = json.loads(record.read_text())
    known = DATASETS[parameters.dataset]
    changed = " with uncommitted changes" if about["dirty"] else ""
    lines = [
        f"# Generated defects: {method} on {known.title}", "",
        f"Drawn by {method}, seed {seed}, profile {about['profile']}, split {about['split']}, code "
        f"{about['git_sha'][:12]}{changed}, {about['started']}. Images in `test` and masks in `ground_truth` are "
        "generated; `train/good` holds the real normal images that were drawn on, at the run's size. `samples.csv` "
        "tells how each sample came about.", "",
        f"Made from {known.title}: {known.licence}. Cite: {known.citation}.", "",
        "| category | defect | written | left out | why |", "| --- | --- | ---: | ---: | --- |",
        *(f"| {r.category} | {r.defect} | {r.written} | {r.left_out} | {r.why} |" for r in counts.itertuples()), "",
    ]  # fmt: skip
    return "\n".join(lines)
