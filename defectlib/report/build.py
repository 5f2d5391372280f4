"""From stage files to every table, the long results and the page; and from there to ``figures/``, which is in git."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from defectlib import params, paths, prepare, study
from defectlib.profiles import explains
from defectlib.report import ablation, claims, costs, page, page_parts, tables

SEEDS = [0, 1, 2]
"""Verdicts and spreads need them: only the tables of `make reproduce SEEDS=0,1,2` reach ``figures/``."""


def manifests(parameters: params.Parameters, categories: list[str], seeds: list[int]) -> pd.DataFrame:
    """The split of the categories of a batch: every partition that its seeds used."""
    partitions = seeds if parameters.settings().data.split == "random_thirds" else seeds[:1]
    table = pd.concat([prepare.manifest(parameters, seed).assign(partition=seed) for seed in partitions])
    return table[table["category"].isin(categories)]


def is_shipped(parameters: params.Parameters, categories: list[str]) -> bool:
    """Whether ``figures/`` shows this batch's pictures: ``mini`` at demo, whole, with nothing else asked for.

    No other pixels may be passed on, and a part of the batch would leave a mixture in git.
    """
    default = params.Parameters(profile="demo")
    own_runs = paths.RUNS == paths.ROOT / "runs"
    return own_runs and parameters == default and categories == prepare.categories(default)


def ships_tables(parameters: params.Parameters, categories: list[str]) -> bool:
    """Whether the tables in ``figures/`` are of this batch: the shipped one, with three seeds."""
    return parameters.seeds == SEEDS and is_shipped(parameters.model_copy(update={"seeds": None}), categories)


def publish(folder: Path, stems: list[str]) -> None:
    """Copy tables and pictures to ``figures/``.

    The page and the long results stay with the runs: they hold commits and times, which differ from run to run.
    """
    for stem in stems:
        for file in folder.glob(f"{stem}.*"):
            paths.write_bytes(paths.FIGURES / file.name, file.read_bytes())


def report(batch: dict[str, Any]) -> Path:
    """Tables (csv, md, tex), ``results.csv`` and ``report.html`` for one batch; returns the page.

    Args:
        batch: The content of ``batch.json``: ``parameters`` and ``categories``.
    """
    parameters = params.validate(batch["parameters"], "batch.json")
    categories = batch["categories"]
    folder = parameters.figures_folder()
    results = study.results(parameters, categories)
    seeds = parameters.seeds or parameters.settings().seeds
    split = manifests(parameters, categories, seeds)
    methods = parameters.settings().asked(parameters.methods)
    without = [] if explains(methods) else ["04_methods"]
    built = {name: tables.build(results, name, manifests=split) for name in tables.NAMES}
    judged = claims.judge(results)
    others = [ablation.build(results), costs.build(results, parameters.notebooks_folder(), without)]
    for table in [*built.values(), judged, *others]:
        tables.write(table, folder, table.attrs["name"])
    paths.write_text(folder / "results.csv", results.to_csv(index=False))
    told = page_parts.captions(categories, methods)
    pictures = {stem: text for stem, text in told.items() if (folder / f"{stem}.png").is_file()}
    if is_shipped(parameters, categories):
        publish(folder, list(pictures))
    if ships_tables(parameters, categories):
        publish(folder, [table.attrs["name"] for table in (*built.values(), judged, *others)])
    return page.write_page(folder, built, results, pictures, parameters.dataset_folder().parents[1], judged, others)
