"""Which of the papers' claims hold in the runs there are: paired differences, a bootstrap interval, a verdict.

A difference is taken within a (category, defect) pair and a seed, or within a category and a seed for what a category
has one number of (time), so that both systems had the same shots, split and seed. Downstream scores are those of each
defect against all normals (``regions.BY_DEFECT``), though the defects of a category share one downstream model. The
interval is a bootstrap that draws these cells, or the seeds, anew, whichever moves the mean more, widened for so few. A
verdict needs ``LEAST_CELLS`` cells with ``LEAST_SEEDS`` seeds each, and an interval that does not touch zero. Seeds
share the shots and the test images of a split, so what an interval covers is training and drawing.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from defectlib import published
from defectlib.metrics.regions import BY_DEFECT
from defectlib.published.claims import Claim, load, printed
from defectlib.report.layout import method_title
from defectlib.report.tables import scale, was_chosen

LEAST_CELLS, LEAST_SEEDS = 4, 3
DRAWS, LEVEL = 10_000, 0.95
HELD, NOT_HELD, OPEN = "held", "did not hold", "not decided"
CELL = ["dataset", "category", "defect"]
COLUMNS = [
    "id", "paper", "source", "claim", "method", "against", "metric", "better", "data", "published", "published_against",
    "measured", "difference", "low", "high", "cells", "of", "seeds", "verdict", "why",
]  # fmt: skip
NAME = "claims"
RISES_WITH_DAMAGE = ("is", "lpips", "ic-lpips")
"""Measures by which garbled pictures look varied; whether they look real is what precision says."""


def judge(results: pd.DataFrame) -> pd.DataFrame:
    """Every comparison of every claim against the runs there are; those that were tested come first.

    Args:
        results: Rows of ``runs.collect()`` of one profile and split, as ``study.results`` gives them.

    Returns:
        Columns ``COLUMNS``, a row a comparison. ``measured`` is the measure with its extractor; ``difference`` is
        method minus against, with its interval (KID times 1,000, scores in percent); it rests on ``cells`` "pairs" or
        "categories" (``of``) with at least ``seeds`` seeds each; ``why`` says what a verdict lacks. ``attrs`` as those
        of the other tables.

    Raises:
        ValueError: The results mix profiles or splits, or extractors of one measure.
    """
    for column in ("profile", "split"):
        if results[column].nunique() > 1:
            raise ValueError(f"the results mix values of '{column}': pass the rows of one, differences need alike runs")
    rows = [_comparison(claim, against, results) for claim in load() for against in claim.against]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"cells": int, "seeds": int})
    table = table.iloc[np.argsort(table["cells"].eq(0), kind="stable")].reset_index(drop=True)
    told = table["verdict"].value_counts()
    counts = ", ".join(f"{told.get(verdict, 0)} {verdict}" for verdict in (HELD, NOT_HELD, OPEN))
    data = ", ".join(sorted(results["dataset"].unique())) if len(results) else "nothing"
    profile = f", profile {results['profile'].iloc[0]}" if len(results) else ""
    table.attrs = {
        "name": NAME, "title": "The papers' claims.",
        "caption": f"The papers' claims, tested on {data}{profile}: {counts}.",
        "note": (
            "Differences (the system's own number minus the other's) are paired within category, defect and seed; in "
            f"brackets the {LEVEL:.0%} interval of a bootstrap over pairs or over seeds, whichever is wider, widened "
            f"as a t interval of so few is. A verdict needs {LEAST_CELLS} pairs of category and defect with "
            f"{LEAST_SEEDS} seeds each ({LEAST_CELLS} categories for what a category has one number of: time), and an "
            "interval off zero. Downstream scores are by defect: a localiser's on its images "
            "and all normals, a classifier's on the images of defects alone, where accuracy is the share of one "
            "defect's images that is named rightly. The defects of a category share one downstream model, so their "
            "pairs say less than as many categories would. Each "
            f"comparison stands at that level by itself, and there are {len(table)}. Seeds share shots, test "
            "images and what base models were adapted to a category (in demo those of DualAnoDiff and the "
            "symmetry-aware system, not the others'), so an interval is about training and drawing. "
            "Published numbers are the papers' own, with their extractors and data; on mini with the small base model "
            "a verdict is about this machinery at this scale, and says nothing about the paper's setting."
        ),
    }  # fmt: skip
    return table


def _comparison(claim: Claim, against: str, results: pd.DataFrame) -> dict[str, Any]:
    row = claim.model_dump(exclude={"table", "category"}) | {
        "against": against, "data": ", ".join(claim.data) + (f" {claim.category}" if claim.category else ""),
        "published": printed(claim, claim.method), "published_against": printed(claim, against),
        "measured": claim.metric, "cells": 0, "of": "", "seeds": 0, "verdict": OPEN,
    }  # fmt: skip
    missing = [name for name in (claim.method, against) if name not in set(results["method"])]
    if missing:
        return row | {"why": f"not run: {' and '.join(missing)}"}
    both = results[results["method"].isin([claim.method, against])]
    both = both[both["value"].notna()]
    kinds = both["metric"].map(published.kind)
    by_defect = both[kinds == claim.metric + BY_DEFECT]
    both = by_defect if by_defect["method"].nunique() == 2 else both[kinds == claim.metric]
    shared = set.intersection(*(set(both.loc[both["method"] == m, "metric"]) for m in (claim.method, against)))
    if not shared:
        return row | {"why": "withheld, or measured by different extractors"}
    if len(shared) > 1:
        raise ValueError(f"{claim.metric} is measured by several extractors: pass the results of one")
    both = both[both["metric"] == next(iter(shared))]
    row["measured"] = next(iter(shared)).removesuffix(BY_DEFECT)
    if both["protocol"].map(was_chosen).any():
        return row | {"why": "a model chosen by its score was tested: run it with selection 'last'"}
    differences = _differences(both, claim.method, against)
    if differences.empty:
        return row | {"why": "withheld, or not run alike"}
    solid = differences[differences.notna().sum(axis=1) >= LEAST_SEEDS]
    enough = len(solid) >= LEAST_CELLS
    used = solid if enough else differences
    of = "categories" if (used.index.get_level_values("defect") == "").all() else "pairs"
    values = used.to_numpy() * scale(claim.metric)
    low, high = interval(values)
    row |= {
        "difference": float(np.nanmean(values)), "low": low, "high": high, "cells": len(used), "of": of,
        "seeds": int(used.notna().sum(axis=1).min()),
    }  # fmt: skip
    if claim.metric == "is" and both["n_generated"].nunique() > 1:
        return row | {"why": "IS rises with the number of images, and theirs differ"}
    if _unlike(both):
        return row | {"why": "their downstream models learned from different numbers of samples"}
    if not enough:
        return row | {"why": f"{LEAST_CELLS} {of} with {LEAST_SEEDS} seeds each are needed"}
    told = verdict(low, high, claim.better)
    if told["verdict"] != OPEN and claim.metric in RISES_WITH_DAMAGE:
        told["why"] = _damage(results, *((claim.method, against) if low > 0 else (against, claim.method)), used)
    return row | told


def _unlike(rows: pd.DataFrame) -> bool:
    """Whether downstream models that are compared were given different numbers of samples; the shots alone are none.

    Samples that could not be learned from were given all the same: how many those are is part of a score.
    """
    told = [json.loads(protocol) for protocol in rows["protocol"]]
    given = [
        one["n_generated"] + one.get("left_out", 0) if "task" in one and one.get("n_generated") else None
        for one in told
    ]
    return bool(rows.assign(given=given).groupby([*CELL, "seed"])["given"].nunique().gt(1).any())


def _damage(results: pd.DataFrame, varied: str, other: str, used: pd.DataFrame) -> str:
    """What precision says on the pairs used where the system that looks more varied looks less real; "" where not."""
    rows = results[results["metric"].map(published.kind) == "precision"].set_index(CELL)
    rows = rows[rows.index.isin(used.index) & rows["seed"].isin(used.columns)]
    own, others = (rows.loc[rows["method"] == name, "value"].mean() for name in (varied, other))
    if not own < others:
        return ""
    return f"but precision is {own:.2f} of {method_title(varied)} against {others:.2f}: damage too looks varied"


def verdict(low: float, high: float, better: str) -> dict[str, str]:
    """``verdict`` and ``why`` of an interval of method minus against."""
    if not (low > 0 or high < 0):
        return {"verdict": OPEN, "why": "the interval touches zero"}
    return {"verdict": HELD if (low > 0) == (better == "higher") else NOT_HELD, "why": ""}


def _differences(rows: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """Method minus against: rows (data set, category, defect), columns seeds; what one of them lacks is NaN."""
    wide = rows.pivot(index=CELL, columns=["method", "seed"], values="value")
    difference = wide[method] - wide[against]
    return difference.dropna(how="all").dropna(axis=1, how="all")


def interval(values: NDArray, draws: int = DRAWS, level: float = LEVEL) -> tuple[float, float]:
    """A bootstrap interval of the mean of ``values`` (cells, seeds), in which NaN is what is missing.

    Cells are drawn with replacement, then seeds are by themselves, and the interval reaches as far as either does. The
    percentiles of four cells would hold 80 % where they say 95: deviations are widened to what a t interval of so few
    would have, by sqrt(n / (n - 1)) and the ratio of the t quantile to the normal one.
    """
    rng, there, mean = np.random.default_rng(0), ~np.isnan(values), np.nanmean(values)
    tail, bounds = (1 + level) / 2, [0.0]
    for axis, n in enumerate(values.shape):
        if n > 1:
            taken = rng.multinomial(n, np.full(n, 1 / n), draws)
            total, count = (taken @ part.sum(1 - axis) for part in (np.nan_to_num(values), there))
            wider = (n / (n - 1)) ** 0.5 * stats.t.ppf(tail, n - 1) / stats.norm.ppf(tail)
            off = wider * (total[count > 0] / count[count > 0] - mean)
            bounds += np.quantile(off, [1 - tail, tail]).tolist()
    return float(mean + min(bounds)), float(mean + max(bounds))
