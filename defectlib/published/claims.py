"""The papers' comparative claims as data: ``claims.yaml``, read and checked."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import yaml

from defectlib import published
from defectlib.profiles import Strict


class Claim(Strict):
    """That one system is better than others by one measure.

    Attributes:
        id: Short and unique.
        paper: As in ``published.PAPERS``.
        source: Where in the paper it is stated.
        claim: What is stated, in a few words.
        method: Who is better, by the name of our registry or of a variant.
        against: Whom it is better than; each is a comparison of its own.
        metric: The measure without its extractor ("kid"), see ``published.kind``.
        better: Which way is better.
        data: The data sets that it is stated for.
        category: The one category that it is stated for; None: the average over all.
        table: The published table with the numbers behind it; None where the paper prints none of both sides.
    """

    id: str
    paper: str
    source: str
    claim: str
    method: str
    against: list[str]
    metric: str
    better: Literal["lower", "higher"]
    data: list[str]
    category: str | None = None
    table: str | None = None


@lru_cache(maxsize=1)
def load() -> tuple[Claim, ...]:
    """All claims, in the order of the file."""
    return tuple(Claim(**entry) for entry in yaml.safe_load((published.FOLDER / "claims.yaml").read_text()))


def systems() -> set[str]:
    """Every method, variant and published system that a claim compares."""
    return {name for claim in load() for name in (claim.method, *claim.against)}


def printed(claim: Claim, method: str) -> float | None:
    """A system's published number behind a claim, for the first of its data sets; None where there is none."""
    if claim.table is None:
        return None
    rows = published.table(claim.table)
    rows = rows[(rows["method"] == method) & (rows["dataset"] == claim.data[0]) & rows["value"].notna()]
    rows = rows[rows["category"] == (claim.category or published.AVERAGE)]
    # The papers name no threshold for these F1: the best one stands for it.
    kinds = {claim.metric, claim.metric.removesuffix("_max")}
    values = rows.loc[rows["metric"].map(published.kind).isin(kinds), "value"]
    return float(values.iloc[0]) if len(values) else None
