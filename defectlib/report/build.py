"""From stage files to ``figures/``: every table, the long results, and the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from defectlib import params, paths, prepare, stages
from defectlib.report import page, tables


def manifests(parameters: params.Parameters, categories: list[str], seeds: list[int]) -> pd.DataFrame:
    """The split of the categories of a batch: every partition that its seeds used."""
    partitions = seeds if parameters.settings().data.split == "random_thirds" else seeds[:1]
    table = pd.concat([prepare.manifest(parameters, seed).assign(partition=seed) for seed in partitions])
    return table[table["category"].isin(categories)]


def report(batch: dict[str, Any]) -> Path:
    """Tables (csv, md, tex), ``results.csv`` and ``report.html`` for one batch; returns the page.

    Args:
        batch: The content of ``batch.json``: ``parameters`` and ``categories``.
    """
    parameters = params.validate(batch["parameters"], "batch.json")
    folder = stages.figures_folder(parameters)
    results = stages.results(parameters)
    results = results[results["category"].isin(batch["categories"])]
    seeds = parameters.seeds or parameters.settings().seeds
    split = manifests(parameters, batch["categories"], seeds)
    built = {name: tables.build(results, name, manifests=split) for name in tables.NAMES}
    for name, table in built.items():
        tables.write(table, folder, name)
    paths.write_text(folder / "results.csv", results.to_csv(index=False))
    return page.write_page(folder, built, results, runs_root=parameters.dataset_folder().parents[1])
