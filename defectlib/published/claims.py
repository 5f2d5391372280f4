"""The papers' comparative claims as data: ``claims.yaml``, read and checked."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import yaml

from defectlib import published
from defectlib.params import Strict


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
        table: The published table whose averages stand behind it; None where the paper's text has no numbers.
    """

    id: str
    paper: str
    source: str
    claim: str
    method: str
    against: list[str]
    metric: str
    better: Literal["lower", "higher"]
    table: str | None = None


@lru_cache(maxsize=1)
def load() -> tuple[Claim, ...]:
    """All claims, in the order of the file."""
    return tuple(Claim(**entry) for entry in yaml.safe_load((published.FOLDER / "claims.yaml").read_text()))


def printed(claim: Claim, method: str) -> float | None:
    """A system's published number behind a claim (the average on MVTec AD, or the one category), or None."""
    if claim.table is None:
        return None
    rows = published.table(claim.table)
    rows = rows[(rows["method"] == method) & (rows["dataset"] == "mvtec_ad")]
    kind = "pixel_f1" if claim.table == "headline" and claim.metric == "pixel_f1_max" else claim.metric
    rows = rows[(rows["metric"].map(published.kind) == kind) & rows["value"].notna()]
    averages = rows[rows["category"] == published.AVERAGE]
    values = (averages if len(averages) else rows)["value"]
    return float(values.iloc[0]) if len(values) else None
