"""What a batch cost: minutes, peak memory and device, by method and by notebook."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from defectlib.runs import STAGES

NAME = "costs"
COLUMNS = ["of", "name", "stage", "runs", "minutes", "minutes_in_all", "peak_gb", "device"]
NOTE = (
    "Minutes are means over runs: of a method one category and seed with all its defects, of a notebook one execution. "
    "A stage that a variant shares with its method is counted once, there; one that is the first to ask for another (a "
    "learning curve for the shots' own scores, quality for their localiser, a fit for the base model adapted to its "
    "category) bears its time. Peak memory is a GPU's where there is one, else what the process held at most until "
    "then. A notebook that found its stages done took only the time to read them."
)


def build(results: pd.DataFrame, notebooks: Path, without: Collection[str] = ()) -> pd.DataFrame:
    """The cost of each method's stages, from the stage files behind ``results``, and of each executed notebook.

    Args:
        results: Rows of ``runs.collect()``.
        notebooks: The folder of executed notebooks, whose receipts tell their times; it may be missing.
        without: Notebooks that this batch leaves out: receipts of an earlier one may lie there.

    Returns:
        Columns ``COLUMNS``: ``of`` is "method" or "notebook", ``stage`` is empty for notebooks; a row for each that
        was run. ``attrs`` as those of the other tables.
    """
    stages = results.drop_duplicates("path").assign(of="method", name=lambda t: t["method"])
    files = [file for file in sorted(notebooks.glob("[0-9]*.json")) if file.name.split(".")[0] not in without]
    receipts = [json.loads(file.read_text()) for file in files]
    measured = ["wall_s", "peak_memory_mb", "device"]
    books = pd.DataFrame(
        [["notebook", r["job"].split(".")[0], "", *(r.get(name) for name in measured)] for r in receipts],
        columns=["of", "name", "stage", *measured],
    )
    every = pd.concat([stages[list(books)], books]).astype({"wall_s": float, "peak_memory_mb": float})
    grouped = every.groupby(["of", "name", "stage"], sort=False)
    table = grouped.agg(
        runs=("wall_s", "size"), minutes=("wall_s", "mean"), minutes_in_all=("wall_s", "sum"),
        peak_gb=("peak_memory_mb", "max"), device=("device", lambda names: ", ".join(sorted(set(names.dropna())))),
    ).reset_index()  # fmt: skip
    table[["minutes", "minutes_in_all"]] /= 60
    table["peak_gb"] /= 1024
    place = table["stage"].map({"": 0, **{name: i for i, name in enumerate(STAGES)}})
    table = table.assign(place=place).sort_values(["of", "name", "place"], kind="stable", ignore_index=True)
    table = table[COLUMNS]
    table.attrs = {"name": NAME, "title": "Costs.", "caption": "What this batch cost.", "note": NOTE}
    return table
