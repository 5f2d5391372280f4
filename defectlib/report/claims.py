"""Which of the papers' claims hold in the runs there are: paired differences, a bootstrap interval, a verdict.

A difference is taken within a (category, defect) pair and a seed (within a category and a seed for downstream scores,
which cover all its defects), so that both systems had the same shots, split and seed. The interval is a bootstrap that
draws pairs and seeds anew, crossed, because both are samples of what the claim is about. A verdict needs both systems
in at least ``LEAST_PAIRS`` pairs and ``LEAST_SEEDS`` seeds, and an interval that does not touch zero.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from defectlib import published
from defectlib.published.claims import Claim, load, printed
from defectlib.report.tables import scale

LEAST_PAIRS, LEAST_SEEDS = 4, 3
DRAWS, LEVEL = 10_000, 0.95
HELD, NOT_HELD, OPEN = "held", "did not hold", "not decided"
COLUMNS = [
    "id", "paper", "source", "claim", "method", "against", "metric", "better", "published", "published_against",
    "difference", "low", "high", "pairs", "seeds", "verdict", "why",
]  # fmt: skip
NAME = "claims"


def judge(results: pd.DataFrame) -> pd.DataFrame:
    """Every comparison of every claim against the runs there are; those that were run come first.

    Args:
        results: Rows of ``runs.collect()`` of one profile, split and data set, as ``study.results`` gives them.

    Returns:
        Columns ``COLUMNS``, a row a comparison: ``difference`` is method minus against, with its interval (KID times
        1,000, scores in percent); ``pairs`` (category, defect) and ``seeds`` are what it rests on; ``why`` says what
        a verdict lacks. ``attrs`` as those of the other tables.
    """
    rows = [_comparison(claim, against, results) for claim in load() for against in claim.against]
    table = pd.DataFrame(rows, columns=COLUMNS).astype({"pairs": int, "seeds": int})
    table = table.iloc[np.argsort(table["pairs"].eq(0), kind="stable")].reset_index(drop=True)
    told = table["verdict"].value_counts()
    counts = ", ".join(f"{told.get(verdict, 0)} {verdict}" for verdict in (HELD, NOT_HELD, OPEN))
    data = ", ".join(sorted(results["dataset"].unique())) if len(results) else "nothing"
    profile = f", profile {results['profile'].iloc[0]}" if len(results) else ""
    table.attrs = {
        "name": NAME, "title": "The papers' claims.",
        "caption": f"The papers' claims, tested on {data}{profile}: {counts}.",
        "note": (
            f"Differences are paired within category, defect and seed; in brackets the {LEVEL:.0%} interval of a "
            f"bootstrap over pairs and seeds. A verdict needs {LEAST_PAIRS} pairs of category and defect, "
            f"{LEAST_SEEDS} seeds, and an interval off zero. A downstream score is one number for all defects of a "
            "category, so there the categories are drawn anew: two make a rough interval. On mini with the small base "
            "model a verdict is about this machinery at this scale, and says nothing about the paper's own setting."
        ),
    }  # fmt: skip
    return table


def _comparison(claim: Claim, against: str, results: pd.DataFrame) -> dict:
    known = claim.model_dump(include={"id", "paper", "source", "claim", "method", "metric", "better"})
    numbers = {"published": printed(claim, claim.method), "published_against": printed(claim, against)}
    row = known | numbers | {"against": against, "pairs": 0, "seeds": 0, "verdict": OPEN}
    ours = results[results["metric"].map(published.kind) == claim.metric]
    missing = [name for name in (claim.method, against) if name not in set(ours["method"])]
    if missing:
        return row | {"why": f"{' and '.join(missing)} not run"}
    differences = _differences(ours, claim.method, against)
    if differences.empty:
        return row | {"why": "withheld, or no run of both alike"}
    values = differences.to_numpy() * scale(claim.metric)
    low, high = interval(values)
    cells = differences.index.to_frame(index=False)
    pairs, seeds = _pairs(cells, results), differences.shape[1]
    row |= {"difference": np.nanmean(values), "low": low, "high": high, "pairs": pairs, "seeds": seeds}
    return row | verdict(low, high, pairs, seeds, claim.better)


def verdict(low: float, high: float, pairs: int, seeds: int, better: str) -> dict[str, str]:
    """``verdict`` and ``why`` of an interval of method minus against."""
    if pairs < LEAST_PAIRS or seeds < LEAST_SEEDS:
        return {"verdict": OPEN, "why": f"{LEAST_PAIRS} pairs and {LEAST_SEEDS} seeds are needed"}
    if low <= 0 <= high:
        return {"verdict": OPEN, "why": "the interval touches zero"}
    return {"verdict": HELD if (low > 0) == (better == "higher") else NOT_HELD, "why": ""}


def _differences(rows: pd.DataFrame, method: str, against: str) -> pd.DataFrame:
    """Method minus against: rows (data set, category, defect), columns seeds; what one of them lacks is left out."""
    keys = ["dataset", "category", "defect"]
    wide = rows.pivot_table("value", keys, ["method", "seed"], dropna=False)
    difference = wide[method] - wide[against].reindex(columns=wide[method].columns)
    return difference.dropna(how="all").dropna(axis=1, how="all")


def _pairs(cells: pd.DataFrame, results: pd.DataFrame) -> int:
    """How many (category, defect) pairs these cells cover; a downstream score covers all of a category."""
    every = results.loc[results["defect"] != "", ["dataset", "category", "defect"]].drop_duplicates()
    whole = cells.loc[cells["defect"] == "", ["dataset", "category"]]
    return int((cells["defect"] != "").sum()) + len(every.merge(whole, on=["dataset", "category"]))


def interval(values: NDArray, draws: int = DRAWS, level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of ``values`` (cells, seeds), NaN where there is none.

    Cells and seeds are drawn with replacement, each by itself: the pigeonhole bootstrap of Owen (2007).
    """
    rng = np.random.default_rng(0)
    cells, seeds = (rng.multinomial(n, np.full(n, 1 / n), draws).astype(float) for n in values.shape)
    there = ~np.isnan(values)
    total = ((cells @ np.nan_to_num(values)) * seeds).sum(1)
    count = ((cells @ there) * seeds).sum(1)
    means = total[count > 0] / count[count > 0]
    tail = (1 - level) / 2
    return float(np.quantile(means, tail)), float(np.quantile(means, 1 - tail))
