"""Every method and variant side by side: how its samples look, where their masks lie, and what they are good for."""

from __future__ import annotations

import pandas as pd

from defectlib import published
from defectlib.report.layout import METRIC_TITLES
from defectlib.report.tables import checked, scale

NAME = "ablation"
KINDS = frozenset(
    {"kid", "is", "ic-lpips", "accuracy", "pixel_ap", "pixel_f1_50", "precision", "mask_seen", "class_seen"}
)
COLUMNS = ["dataset", "category", "method", "metric", "reproduced", "sd", "n"]
NOTE = (
    "Means over the defects of a category within a seed, then over seeds, with the standard deviation over seeds; "
    "defects whose number is withheld for any seed are left out, so that all seeds are of the same defects. Where that "
    "leaves none, those known for most seeds stand, and a number in brackets is how many seeds they are. The profile "
    "says which rows downstream models are trained on; a filtered row is of the better part of its method's samples, "
    "and IS rises with their number. Taken for its class: by a classifier of the real shots. Mask on defect: the IoU "
    "with what a localiser of the real shots finds."
)


def build(results: pd.DataFrame) -> pd.DataFrame:
    """The measures of the papers' ablations, and the headline's, of every method and variant that was run.

    Args:
        results: Rows of ``runs.collect()`` of one profile and split.

    Returns:
        Columns ``COLUMNS``, a row a category, method and measure; a variant stands below its method. KID is times
        1,000, scores are in percent. ``attrs`` as those of the other tables.

    Raises:
        ValueError: The results mix profiles.
    """
    rows = checked(results)
    kinds = rows["metric"].map(published.kind)
    rows = rows.assign(value=pd.to_numeric(rows["value"]) * kinds.map(scale))[kinds.isin(KINDS)]
    per_seed = known(rows).groupby([*COLUMNS[:4], "seed"], sort=False)["value"].mean().dropna()
    table = per_seed.groupby(level=COLUMNS[:4], sort=False).agg(["mean", "std", "count"]).reset_index()
    table.columns = COLUMNS
    place = {
        "family": [_place(published.family(name)) for name in table["method"]],
        "variant": table["method"].map(published.is_variant),
        "kind": table["metric"].map(published.kind).map(list(METRIC_TITLES).index),
    }
    by = ["dataset", "category", "family", "variant", "method", "kind"]
    table = table.assign(**place).sort_values(by, kind="stable", ignore_index=True)[COLUMNS]
    table.attrs = {"name": NAME, "title": "Methods and variants.", "caption": "Methods and variants.", "note": NOTE}
    return table


def known(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of those defects whose number is known for as many seeds as that of any other of the category.

    Args:
        rows: Rows of ``runs.collect()``; those whose number is withheld have no ``value``.

    Returns:
        Those of the rows, by data set, category, method and measure, whose mean is of the same defects for every seed.
    """
    rows = rows.assign(known=rows["value"].notna(), defect=rows["defect"].fillna(""))
    times = rows.groupby([*COLUMNS[:4], "defect"], sort=False)["known"].transform("sum")
    return rows[times == times.groupby([rows[name] for name in COLUMNS[:4]], sort=False).transform("max")]


def _place(method: str) -> int:
    order = list(published.METHODS.values())
    return order.index(method) if method in order else len(order)
