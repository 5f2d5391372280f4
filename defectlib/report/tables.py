"""Long results -> ``published | reproduced ± sd (n) | delta | why not comparable``, one frame a table.

Means are taken over defects within a seed, then over seeds; the sd is over seeds. A cell that was not run is empty. A
number is set beside a published one only where data set, category, method and metric carry the same names, and a
metric's name holds its extractor.
"""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from defectlib import paths, published
from defectlib.metrics import regions
from defectlib.published import AVERAGE
from defectlib.report import formats
from defectlib.report.specs import CLASSIFICATION, LOCALISATION, ORACLE, ORACLE_NOTE, SPECS, Spec, explain

NAMES = tuple(published.FILES)
KEY = ["dataset", "category", "method", "metric"]
COLUMNS = [*KEY, "unit", "published", "reproduced", "sd", "n", "delta", "why"]
MARKS = ("gaps", "chosen", "dirty", "unlike", "paced")
OURS = [*KEY, "reproduced", "sd", "n", *MARKS, "split", "profile"]
NEEDED = {"profile", "split", "dataset", "category", "method", "seed", "defect", "metric", "value", "dirty"}
SPLITS = ("all_shots", "first_third", "random_thirds", "ten_shots")
# What AdaBLDM's abstract has as gains, and the score that gained.
GAINS = {"ap_gain": "pixel_ap", "iap_gain": "iap", "iap90_gain": "iap90"}
# Published names that a number of ours meets although the paper leaves part of the measure open.
HALF_DEFINED = frozenset({"f1_macro", "mask_iou"})


def build(results: pd.DataFrame | None, name: str, manifests: pd.DataFrame | None = None) -> pd.DataFrame:
    """One table: every published cell, and every reproduced one.

    Args:
        results: Rows of ``runs.collect()`` of ONE profile; None or no rows: published values only.
        name: One of ``NAMES``.
        manifests: For Table I, split manifests with the columns dataset, category, defect and side; a column
            ``partition`` where several partitions are stacked.

    Returns:
        Columns ``COLUMNS``; rows with a reproduced value first. KID is times 1,000, scores are in percent. ``why``
        holds "code: words" parts with the codes of :data:`~defectlib.report.specs.REASONS`. Tables of scores of
        trained models have a column ``ORACLE`` besides: what the same trainings score where their checkpoint is chosen
        on the test set. ``attrs`` holds name, title, caption (the title and what was reproduced) and note.

    Raises:
        ValueError: Unknown table, missing columns, or more than one profile.
    """
    if name not in NAMES:
        raise ValueError(f"there is no table '{name}'; there are: {', '.join(NAMES)}")
    spec = SPECS[name]
    printed = published.table(name)[[*KEY, "value"]].rename(columns={"value": "published"})
    ours = _counts(manifests) if name == "table_1" else _reproduced(checked(results), spec, printed)
    table = printed.merge(ours, on=KEY, how="outer", indicator="where")
    table["delta"] = table["reproduced"] - table["published"]
    table["unit"] = [published.UNITS.get(published.kind(metric), "") for metric in table["metric"]]
    started = set(zip(ours["dataset"], ours["method"]))
    table["why"] = [explain(_reasons(row, spec, set(printed["dataset"]), started)) for row in table.itertuples()]
    table = _sorted(table, spec, printed)
    columns = COLUMNS
    if spec.selected:
        best = _reproduced(_by_oracle(checked(results)), spec, printed).rename(columns={"reproduced": ORACLE})
        table, columns = table.merge(best[[*KEY, ORACLE]], on=KEY, how="left"), [*COLUMNS, ORACLE]
    table = table[columns].astype({"n": "Int64"}).reset_index(drop=True)
    note = f"{spec.note} {ORACLE_NOTE}" if spec.selected and table[ORACLE].notna().any() else spec.note
    table.attrs = {"name": name, "title": _title(name), "caption": _caption(table, name, ours), "note": note}
    return table


def write(table: pd.DataFrame, folder: Path | str, stem: str) -> list[Path]:
    """Write ``<stem>.csv`` (complete), ``<stem>.md`` and ``<stem>.tex`` (booktabs), by atomic rename; byte-stable."""
    texts = {
        "csv": table.to_csv(index=False, float_format="%.10g", lineterminator="\n"),
        "md": formats.markdown(table),
        "tex": formats.latex(table),
    }
    written = []
    for suffix, text in texts.items():
        target = Path(folder) / f"{stem}.{suffix}"
        paths.write_text(target, text)
        written.append(target)
    return written


def checked(results: pd.DataFrame | None) -> pd.DataFrame:
    """Results with all columns that tables need, of one profile; ValueError for others."""
    if results is None:
        return pd.DataFrame(columns=sorted(NEEDED))
    missing = sorted(NEEDED - set(results.columns))
    if missing:
        raise ValueError(f"the results lack the columns {', '.join(missing)}: pass a frame made by runs.collect()")
    profiles = sorted(results["profile"].unique())
    if len(profiles) > 1:
        raise ValueError(
            f"the results mix the profiles {', '.join(profiles)}: pass the rows of one, they never average"
        )
    return results


def _by_oracle(results: pd.DataFrame) -> pd.DataFrame:
    """The scores of checkpoints that were chosen on the test set, under the names of those of the last step."""
    rows = results[results["metric"].str.endswith(regions.ORACLE)]
    return rows.assign(metric=rows["metric"].str.removesuffix(regions.ORACLE))


def _reproduced(results: pd.DataFrame, spec: Spec, printed: pd.DataFrame) -> pd.DataFrame:
    """Rows of ours: KEY, reproduced, sd, n, and what the reasons are made from."""
    rows = results[_belongs(results, spec, printed)]
    if rows.empty:
        return pd.DataFrame(columns=OURS).astype({"reproduced": float, "sd": float, "n": float})
    rows = rows[rows["split"] == rows["dataset"].map(_chosen_splits(rows, spec))]
    kinds = rows["metric"].map(published.kind)
    rows = rows.assign(value=pd.to_numeric(rows["value"]) * kinds.map(scale), dirty=rows["dirty"].astype(bool))
    rows["chosen"] = rows["protocol"].map(was_chosen) if "protocol" in rows else False
    rows["unlike"] = _of_other_numbers(rows)
    rows["paced"] = rows["protocol"].map(steps_of).ne(spec.steps) if spec.steps and "protocol" in rows else False
    rows = pd.concat([_as_hours(rows, printed), *_gains(rows, spec)], ignore_index=True)
    # First over the defects of a seed, as the paper averages.
    per_seed = rows.groupby(["profile", "split", *KEY, "seed"], sort=True).agg(
        value=("value", "mean"), gaps=("value", lambda v: v.isna().any()),
        **{mark: (mark, "any") for mark in MARKS[1:]},
    )  # fmt: skip
    per_seed = per_seed.reset_index()
    averages = _averages(per_seed, spec, printed) if spec.rows != "category" else per_seed.iloc[:0]
    if spec.rows == "average":
        whole = averages
    else:
        # A data set of one category has one row a metric, not the same number twice.
        lone = per_seed.groupby("dataset")["category"].transform("nunique") == 1
        averaged = set(zip(averages["dataset"], averages["metric"]))
        again = lone & pd.Series(list(zip(per_seed["dataset"], per_seed["metric"])), per_seed.index).isin(averaged)
        whole = pd.concat([per_seed[~again], averages], ignore_index=True)
    grouped = whole.groupby(["profile", "split", *KEY], sort=False)
    columns = {"reproduced": ("value", "mean"), "sd": ("value", "std"), "n": ("value", "count")}
    return grouped.agg(**columns, **{mark: (mark, "any") for mark in MARKS}).reset_index()


def was_chosen(protocol: str) -> bool:
    """Whether a downstream model was another than the one of the last step."""
    return not json.loads(protocol).get("selection", "last").startswith("last")


def steps_of(protocol: str) -> int | None:
    """Denoising steps of the images that a time was taken of; None where they are not recorded."""
    return json.loads(protocol).get("num_inference_steps")


def _of_other_numbers(rows: pd.DataFrame) -> pd.Series | bool:
    """Scores that rise with the number of images (IS), of methods with unlike numbers of them."""
    if "n_generated" not in rows:
        return False
    drawn = rows["n_generated"].where(rows["value"].notna())
    numbers = drawn.groupby([rows[key] for key in ("dataset", "category", "defect", "metric")]).transform("nunique")
    return numbers.gt(1) & rows["metric"].map(published.kind).eq("is")


def _belongs(results: pd.DataFrame, spec: Spec, printed: pd.DataFrame) -> pd.Series:
    keep = results["metric"].map(published.kind).isin(spec.kinds) & ~results["dataset"].isin(spec.elsewhere)
    if spec.datasets:
        keep &= results["dataset"].isin(spec.datasets)
    if spec.categories:
        keep &= results["category"].isin(spec.categories)
    if spec.methods_of_paper:
        return keep & results["method"].isin(set(printed["method"]))
    return keep & ~results["method"].map(published.is_variant)


def _chosen_splits(rows: pd.DataFrame, spec: Spec) -> dict[str, str]:
    """Data set -> the one split shown: the table's own protocol where it was run; splits never average together."""
    order = [spec.split, *(rule for rule in SPLITS if rule != spec.split)]
    found = rows.groupby("dataset")["split"].unique()
    return {
        dataset: min(some, key=lambda s: (order.index(s) if s in order else len(order), s))
        for dataset, some in found.items()
    }


def scale(kind: str) -> float:
    """What a stored value is multiplied by to be shown: KID by 1,000, shares to percent."""
    return 1000.0 if kind == "kid" else 100.0 if kind in published.PERCENT else 1.0


def _as_hours(rows: pd.DataFrame, printed: pd.DataFrame) -> pd.DataFrame:
    """Table IV prints hours of training; only where it has the same method and category does ours stand beside it."""
    hours = printed[printed["metric"] == "train_total_h"]
    known = set(zip(hours["dataset"], hours["category"], hours["method"]))
    beside = [m == "fit_s" and (d, c, w) in known for d, c, w, m in zip(*(rows[k] for k in KEY))]
    rows = rows.copy()
    rows.loc[beside, "value"] /= 3600
    rows.loc[beside, "metric"] = "train_total_h"
    return rows


def _gains(rows: pd.DataFrame, spec: Spec) -> list[pd.DataFrame]:
    """AdaBLDM's gains in points over Crop-Paste, which stands for the best earlier augmentation, within a seed."""
    keys, found = ["profile", "split", "dataset", "category", "seed"], []
    for gain, metric in GAINS.items():
        of = [
            rows[(rows["metric"] == metric) & (rows["method"] == m)].set_index(keys) for m in ("adabldm", "crop_paste")
        ]
        ours, theirs = (one.loc[of[0].index.intersection(of[1].index)] for one in of)
        if gain in spec.kinds and len(ours):
            marks = {mark: ours[mark] | theirs[mark] for mark in MARKS[1:]}
            found.append(ours.assign(value=ours["value"] - theirs["value"], metric=gain, **marks).reset_index())
    return found


def _averages(per_seed: pd.DataFrame, spec: Spec, printed: pd.DataFrame) -> pd.DataFrame:
    """Means over categories within a seed, where every category that the mean needs has a number."""
    parts = []
    for (dataset, metric), rows in per_seed.groupby(["dataset", "metric"], sort=True):
        valued = rows[rows["value"].notna()]
        needed = _needed(dataset, metric, printed) or set(valued["category"])
        inside = valued[valued["category"].isin(needed)]
        complete = inside.groupby(["method", "seed"])["category"].transform("nunique") == len(needed)
        means = inside[complete].groupby(["profile", "split", "dataset", "method", "metric", "seed"], sort=True).agg(
            value=("value", "mean"), **{mark: (mark, "any") for mark in MARKS}
        )  # fmt: skip
        own_name = len(needed) == 1 and dataset not in set(printed["dataset"])
        if own_name and spec.rows == "both":
            continue
        parts.append(means.reset_index().assign(category=next(iter(needed)) if own_name else AVERAGE))
    return pd.concat(parts, ignore_index=True) if parts else per_seed.iloc[:0]


def _needed(dataset: str, metric: str, printed: pd.DataFrame) -> set[str]:
    """The categories behind a published average; empty where the paper has none for this data set."""
    own = printed[(printed["dataset"] == dataset) & (printed["category"] != AVERAGE) & printed["published"].notna()]
    same = own[own["metric"].map(published.kind) == published.kind(metric)]
    if len(same):
        return set(same["category"])
    few = published.table("table_1")
    return set(few.loc[few["dataset"] == dataset, "category"])


def _counts(manifests: pd.DataFrame | None) -> pd.DataFrame:
    """Table I from split manifests: fewest and most shots over the defects of each category."""
    if manifests is None or manifests.empty:
        return _reproduced(checked(None), SPECS["table_1"], published.table("table_1"))
    keys = ["dataset", "category"] + (["partition"] if "partition" in manifests else [])
    defects = manifests[manifests["defect"] != "good"]
    if "id" in defects and "partition" not in defects:
        sides = defects[defects["side"].isin(["shot", "test"])].groupby(["dataset", "category", "defect", "id"])["side"]
        if (sides.nunique() > 1).any():
            raise ValueError("the manifests stack several partitions: give them a column 'partition'")
    shots = defects[defects["side"] == "shot"]
    counts = shots.groupby([*keys, "defect"]).size()
    held_out = set(defects.loc[defects["side"] == "test", "dataset"])
    rows = []
    for (dataset, category), some in counts.groupby(level=["dataset", "category"]):
        for metric in SPECS["table_1"].kinds:
            value = some.min() if metric.endswith("min") else some.max()
            rows.append({
                "dataset": dataset, "category": category, "method": "", "metric": metric, "reproduced": float(value),
                "n": 1, **dict.fromkeys(MARKS, False), "profile": "paper",
                "split": "other" if dataset in held_out else "all_shots",
            })  # fmt: skip
    return pd.DataFrame(rows, columns=OURS).astype({"sd": float})


def _reasons(row, spec: Spec, published_for: set[str], started: set[tuple[str, str]]) -> list[str]:
    """Codes for one row: why it may not be compared, or why one of its two numbers is missing."""
    if row.where == "left_only":
        some = row.category == AVERAGE and spec.rows != "average" and (row.dataset, row.method) in started
        missing = "not_run_for_all" if some else "not_run"
        return [missing] + (["undefined_in_paper"] if pd.isna(row.published) else [])
    found = []
    if pd.isna(row.reproduced):
        found.append("withheld")
    elif row.gaps:
        found.append("partly_withheld")
    if row.metric.startswith("tiny-"):
        found.append("other_extractor")
    if row.dataset not in published_for:
        found.append("other_dataset")
        if spec.profile != "paper" and row.profile != spec.profile:  # a table by a protocol of its own
            found.append("reduced_scale")
    else:
        open_in_paper = pd.isna(row.published) and not row.metric.startswith("tiny-")
        if open_in_paper or row.metric in HALF_DEFINED:
            found.append("undefined_in_paper")
        if row.profile != spec.profile:
            found.append("reduced_scale")
        elif row.metric in (*CLASSIFICATION, *LOCALISATION):
            found.append("other_training")
        if published.UNITS.get(row.metric) in ("h", "s", "1/s"):
            found.append("other_machine")
    if row.paced:
        found.append("other_steps")
    if spec.split is not None and row.split != spec.split:
        found.append("other_split")
    if row.dataset == "gdxray":
        found.append("other_crops")
    if row.unlike:
        found.append("other_n")
    if row.chosen:
        found.append("chosen_checkpoint")
    if row.dirty:
        found.append("dirty")
    return found


def _sorted(table: pd.DataFrame, spec: Spec, printed: pd.DataFrame) -> pd.DataFrame:
    """Reproduced rows, then withheld ones, then the published remainder; the papers' order within each."""

    def rank(values: pd.Series, order: list[str]) -> pd.Series:
        place = {name: i for i, name in enumerate(order)}
        return values.map(lambda v: (place.get(v, len(place)), v))

    ranked = pd.DataFrame({
        "state": table["where"].eq("left_only") * 2 + (table["where"].ne("left_only") & table["reproduced"].isna()) * 1,
        "dataset": rank(table["dataset"], list(dict.fromkeys(printed["dataset"]))),
        "average": table["category"].eq(AVERAGE),
        "category": table["category"],
        "method": rank(table["method"], list(published.METHODS.values())),
        "kind": rank(table["metric"].map(published.kind), list(spec.kinds)),
        "metric": table["metric"],
    })  # fmt: skip
    return table.loc[ranked.sort_values(list(ranked.columns), kind="stable").index]


def _title(name: str) -> str:
    number = published.ROMAN.get(name)
    return f"{'DefectSynth Table ' + number if number else 'Headline results'}. {SPECS[name].title}."


def _caption(table: pd.DataFrame, name: str, ours: pd.DataFrame) -> str:
    title = _title(name)
    if not table["reproduced"].notna().any():
        return f"{title} No cell is reproduced here: published values only."
    if name == "table_1":
        return f"{title} Counted for {', '.join(sorted(ours['dataset'].unique()))}."
    runs = [f"{d} at split {s}" for d, s in sorted(set(zip(ours["dataset"], ours["split"])))]
    return f"{title} Reproduced: profile {ours['profile'].iloc[0]}, {', '.join(runs)}."
