"""How a table is laid out for a reader: what was reproduced first, then the papers' tables as they print them.

One layout (:func:`blocks`) serves Markdown and LaTeX (``formats``), notebooks and the page.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import floor, log10

import pandas as pd
from pandas.io.formats.style import Styler

from defectlib import published
from defectlib.report.specs import ORACLE, REASONS, codes
from defectlib.runs import STAGES

METHOD_TITLES = {name: title for title, name in published.METHODS.items()} | {
    "defectsynth_as_released": "DefectSynth, as released",
    "defectsynth_sae_as_printed": "DefectSynth, SAE over all pixels, no limit",
    "defectsynth_sae_no_limit": "DefectSynth, SAE's weights without limit",
    "defectsynth_sff_as_printed": "DefectSynth, SFF anywhere",
    "crop_paste_no_turns": "Crop-Paste, no turns",
    "crop_paste_anywhere": "Crop-Paste, anywhere", "crop_paste_feather": "Crop-Paste, feather 2 px",
    "dualanodiff_no_interaction": "DualAnoDiff w/o SAIM", "dualanodiff_compensated": "DualAnoDiff with BCM",
    "dualanodiff_not_compensated": "DualAnoDiff, BCM's settings without it",
    "dualanodiff_as_released": "DualAnoDiff, as released",
    "dualanodiff_compensated_as_released": "DualAnoDiff with BCM, as released",
    "adabldm_no_latent_editing": "AdaBLDM w/o latent editing", "adabldm_no_image_editing": "AdaBLDM w/o image editing",
    "adabldm_no_decoder_adaptation": "AdaBLDM w/o decoder adaptation",
    "adabldm_as_shots": "AdaBLDM, as deep as the shots", "adabldm_mask_hint": "AdaBLDM, mask in the trimap's place",
    "adabldm_as_released": "AdaBLDM, as released",
    "symmetry_aware_no_coefficients": "Symmetry-aware, one LoRA for all",
    "symmetry_aware_separate": "Symmetry-aware, a LoRA a class",
    "symmetry_aware_fixed": "Symmetry-aware, the prior's gates fixed",
    "symmetry_aware_tied": "Symmetry-aware, tied blocks", "symmetry_aware_vera": "Symmetry-aware, VeRA",
    "symmetry_aware_no_gates": "Symmetry-aware w/o TDAM", "symmetry_aware_cosine": "Symmetry-aware, cosine gates",
    "symmetry_aware_prior": "Symmetry-aware, gates from the prior",
    "symmetry_aware_all_categories": "Symmetry-aware, one model for all categories",
    "dualanodiff_two_shots": "DualAnoDiff, two shots of each", "dualanodiff_unequal": "DualAnoDiff, two shots of one",
    "symmetry_aware_two_shots": "Symmetry-aware, two shots of each",
    "symmetry_aware_unequal": "Symmetry-aware, two shots of one",
    "symmetry_aware_unequal_as_given": "Symmetry-aware, two shots of one, not balanced",
    "dualanodiff_four_shots": "DualAnoDiff, four shots of each",
    "symmetry_aware_four_shots": "Symmetry-aware, four shots of each",
    "symmetry_aware_later": "Symmetry-aware, the last defect later",
    "symmetry_aware_no_guidance": "Symmetry-aware w/o SGRL", "symmetry_aware_compensated": "Symmetry-aware with BCM",
    "symmetry_aware_compensated_no_gates": "Symmetry-aware with BCM, w/o TDAM",
    "defectsynth_filtered": "DefectSynth, filtered", "crop_paste_filtered": "Crop-Paste, filtered",
    "crop_paste_two_shots": "Crop-Paste, two shots of each",
}  # fmt: skip
DATASET_TITLES = {name: title for title, name in published.DATASETS.items()}
METRIC_TITLES = {
    "kid": "KID ×10³", "is": "IS", "lpips": "LPIPS", "ic-lpips": "IC-LPIPS", "accuracy": "Accuracy, %",
    "f1_macro": "F1, %", "image_auroc": "Image AUROC, %", "image_ap": "Image AP, %", "image_f1": "Image F1, %",
    "image_f1_50": "Image F1 at 0.5, %", "image_f1_max": "Image F1 max, %", "pixel_auroc": "Pixel AUROC, %",
    "pixel_ap": "Pixel AP, %", "pixel_f1": "Pixel F1, %", "pixel_f1_50": "Pixel F1 at 0.5, %",
    "pixel_f1_max": "Pixel F1 max, %", "pro": "PRO, %", "iap": "IAP, %", "iap90": "IAP90, %",
    "precision": "Precision", "recall": "Recall", "density": "Density", "coverage": "Coverage",
    "shot-distance": "Distance to shots, relative", "mask_iou": "Mask IoU", "mask_seen": "Mask on defect, IoU",
    "class_seen": "Taken for its class, share",
    "fit_s": "Fit, s", "train_stage1_h": "Stage 1, h",
    "train_stage2_h": "Stage 2, h", "train_total_h": "Training, h", "pairs_per_second": "Pairs a second",
    "seconds_per_image": "Seconds an image", "masks_stage1_min": "Masks, fewest", "masks_stage1_max": "Masks, most",
    "images_stage2_min": "Images, fewest", "images_stage2_max": "Images, most", "ap_gain": "AP gain, points",
    "iap_gain": "IAP gain, points", "iap90_gain": "IAP90 gain, points",
}  # fmt: skip
EXTRACTORS = {"tiny": "tiny", "inception": "Inception", "alex": "AlexNet", "vgg": "VGG"}
WHY, CLAIM, DEVICE = "Why not ", "Claim", "Device"
# Columns of the claims whose cells may break into lines: a long text or a few words.
TEXTS = {CLAIM: "text", "Who": "words", "Against": "words", WHY + "decided": "words"}
ARROWS = {True: " ↑", False: " ↓", None: ""}
DIGITS = {
    "kid": 1, "is": 2, "lpips": 3, "ic-lpips": 3, "precision": 2, "recall": 2, "density": 2, "coverage": 2,
    "shot-distance": 2, "mask_iou": 2, "mask_seen": 2, "class_seen": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A piece of a table as text: every cell a string, the first ``labels`` columns are row headings."""

    title: str
    cells: pd.DataFrame
    labels: int
    reproduced: bool


def method_title(name: str) -> str:
    """A method as the papers write it."""
    return METHOD_TITLES.get(name, name)


def dataset_title(name: str) -> str:
    """A data set as the papers write it."""
    return DATASET_TITLES.get(name, name)


def metric_title(metric: str) -> str:
    """A metric with its extractor, unit and direction: "tiny-kid" -> "KID ×10³ (tiny) ↓"."""
    kind = published.kind(metric)
    title = METRIC_TITLES.get(kind, metric)
    extractor = metric.removesuffix(kind).rstrip("-")
    if extractor:
        title += f" ({EXTRACTORS.get(extractor, extractor)})"
    return title + ARROWS[published.higher_is_better(metric)]


def number(
    value: float | None, metric: str, printed: bool = False, sign: bool = False, beside: float | None = None
) -> str:
    """A value with sensible digits; "" where there is none.

    Args:
        value: As in the table: percent, KID times 1,000.
        metric: Its metric, which sets the digits.
        printed: A published value keeps the papers' two decimals.
        sign: Show a plus sign, for differences.
        beside: The value that sets the decimals of a time or a rate: a spread has those of its mean.
    """
    if pd.isna(value):
        return ""
    unit = published.UNITS.get(published.kind(metric), "")
    plus = "+" if sign else ""
    if unit in ("masks", "images"):
        return f"{value:{plus}.0f}"
    if unit in ("h", "s", "1/s"):
        if printed:
            return f"{value:.2f}" if value >= 0.1 else f"{value:g}"
        return f"{value:{plus}.{_decimals(value if beside is None else beside)}f}"
    if unit == "percentage points":
        return f"{value:+.1f}"
    digits = 2 if printed else DIGITS.get(published.kind(metric), 1)
    return f"{value:{plus}.{digits}f}"


def _decimals(value: float) -> int:
    """Decimals that show three digits of a value, four at most."""
    return 4 if value == 0 else min(4, max(0, 2 - floor(log10(abs(value)))))


def reproduced_text(row) -> str:
    """``57.1 ± 0.8 (3)``: mean, sd over seeds, number of seeds; without an sd for one seed."""
    if pd.isna(row.reproduced):
        return ""
    mean = number(row.reproduced, row.metric)
    if published.UNITS.get(published.kind(row.metric)) in ("masks", "images"):
        return mean
    spread = "" if pd.isna(row.sd) else f" ± {number(row.sd, row.metric, beside=row.reproduced)}"
    return f"{mean}{spread} ({row.n})"


def was_run(table: pd.DataFrame) -> pd.Series:
    """The rows that something was run for, withheld ones included."""
    return ~table["why"].map(lambda why: bool({"not_run", "not_run_for_all"} & set(codes(why))))


def blocks(table: pd.DataFrame) -> list[Block]:
    """The pieces of a built table in reading order: what was run, then the published table."""
    own = {"claims": _claim_blocks, "costs": _cost_blocks, "ablation": _ablation_blocks}
    if (other := own.get(table.attrs["name"])) is not None:
        return other(table)
    run = table[was_run(table)]
    found = [_run_block(run)] if len(run) else []
    return found + _published_blocks(table)


def view(table: pd.DataFrame) -> Styler:
    """A built table for a notebook: what was run here, or the published table where nothing was."""
    return labelled_once(blocks(table)[0]).style.hide(axis="index").set_uuid(table.attrs["name"])  # no random id


def labelled_once(block: Block) -> pd.DataFrame:
    """The cells of a block, without row headings that repeat those of the row above."""
    headings = block.cells.iloc[:, : block.labels]
    again = headings.eq(headings.shift()).cummin(axis=1)
    return block.cells.assign(**headings.mask(again, ""))


def legend(table: pd.DataFrame) -> dict[str, str]:
    """Code -> words, for the codes on the rows that were run."""
    used = {code for why in table.loc[was_run(table), "why"] for code in codes(why)}
    return {code: words for code, words in REASONS.items() if code in used}


def _run_block(run: pd.DataFrame) -> Block:
    cells = pd.DataFrame({
        "Data set": run["dataset"].map(dataset_title),
        "Category": run["category"],
        "Method": run["method"].map(method_title),
        "Metric": run["metric"].map(metric_title),
        "Published": [number(r.published, r.metric, printed=True) for r in run.itertuples()],
        "Reproduced ± sd (n)": [reproduced_text(r) for r in run.itertuples()],
        "Δ": [number(r.delta, r.metric, sign=True, beside=r.reproduced) for r in run.itertuples()],
        **_best_on_test(run),
        WHY + "comparable": [", ".join(codes(why)) for why in run["why"]],
    })  # fmt: skip
    title = "Reproduced"
    if cells["Data set"].nunique() == 1:
        title += f" on {cells['Data set'].iloc[0]}"
        cells = cells.drop(columns="Data set")
    if (run["method"] == "").all():
        cells = cells.drop(columns="Method")
    return Block(title, cells, list(cells.columns).index("Published"), True)


def _best_on_test(run: pd.DataFrame) -> dict[str, list[str]]:
    """The column of models that were chosen by their test score, where there are any."""
    if ORACLE not in run or run[ORACLE].isna().all():
        return {}
    return {"Best on test": [number(value, metric) for value, metric in zip(run[ORACLE], run["metric"])]}


def _published_blocks(table: pd.DataFrame) -> list[Block]:
    name = table.attrs["name"]
    printed = published.table(name)
    if name == "headline":
        cells = pd.DataFrame({
            "Paper": printed["paper"], "Data set": printed["dataset"].map(dataset_title),
            "Method": printed["method"].map(method_title), "Metric": printed["metric"].map(metric_title),
            "Published": [number(r.value, r.metric, printed=True) for r in printed.itertuples()],
        })  # fmt: skip
        return [Block("Published", cells, 4, False)]
    printed = printed.assign(text=[number(r.value, r.metric, printed=True) for r in printed.itertuples()])
    by_category = printed["category"].nunique() > 1
    if by_category and name != "table_1":
        return [
            _pivot(f"Published: {metric_title(metric)}", rows, "category", "method")
            for metric, rows in printed.groupby("metric", sort=False)
        ]
    row, column = ("category", "metric") if by_category else ("method", "metric")
    if not by_category and printed["metric"].nunique() > printed["method"].nunique():
        row, column = column, row
    return [
        _pivot(f"Published: {dataset_title(dataset)}", rows, row, column)
        for dataset, rows in printed.groupby("dataset", sort=False)
    ]


def _claim_blocks(table: pd.DataFrame) -> list[Block]:
    """The comparisons that were tested, then those that were not."""
    tested = table["cells"] > 0
    pieces = [("Tested here", table[tested], 6), ("Not tested here", table[~tested], 5)]
    return [Block(title, _claim_cells(rows), labels, False) for title, rows, labels in pieces if len(rows)]


def _claim_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """The comparisons as text; columns about a test only where there was one."""
    printed = [
        " / ".join(number(v, r.metric, printed=True) or "–" for v in (r.published, r.published_against))
        if pd.notna(r.published) or pd.notna(r.published_against) else ""
        for r in rows.itertuples()
    ]  # fmt: skip
    columns = {
        "Paper": rows["paper"], CLAIM: [f"{r.claim} ({r.source}; {r.data})" for r in rows.itertuples()],
        "Who": rows["method"].map(method_title), "Against": rows["against"].map(method_title),
        "Measure": rows["measured"].map(metric_title),
    }  # fmt: skip
    if (rows["cells"] > 0).any():
        columns |= {
            "Verdict": rows["verdict"], "Difference": [_interval_text(r) for r in rows.itertuples()],
            "n": [f"{r.cells} {r.of} × {r.seeds}" for r in rows.itertuples()], "Published": printed,
        }  # fmt: skip
    else:
        columns |= {"Published": printed}
    return pd.DataFrame(columns | {WHY + "decided": rows["why"]})


def _cost_blocks(table: pd.DataFrame) -> list[Block]:
    """A row a method with its stages beside each other, and a row a notebook; the only device stands in the title."""
    methods, books = (table[table["of"] == kind] for kind in ("method", "notebook"))
    found = []
    if len(methods):
        minutes = methods.pivot(index="name", columns="stage", values="minutes").fillna(0)
        stages = [stage for stage in STAGES if stage in minutes]
        titles = {stage: stage.capitalize().replace("_", " ") for stage in stages}
        order = [name for name in METHOD_TITLES if name in minutes.index]
        minutes = minutes.loc[[*order, *(name for name in minutes.index if name not in order)]]
        whole = methods.groupby("name").agg(
            runs=("runs", "max"), total=("minutes_in_all", "sum"), peak=("peak_gb", "max"), device=("device", "first")
        ).loc[minutes.index]  # fmt: skip
        cells = pd.DataFrame({
            "Method": [method_title(name) for name in minutes.index],
            **{f"{titles[stage]}, min": [_minutes(v) for v in minutes[stage]] for stage in stages},
            "Runs": whole["runs"].map(str), "In all, min": whole["total"].map(_minutes),
            "Peak memory, GB": whole["peak"].map(_gigabytes), DEVICE: whole["device"],
        })  # fmt: skip
        found.append(_cost_block("By method, a run", cells))
    if len(books):
        cells = pd.DataFrame({
            "Notebook": books["name"], "Times": books["runs"].map(str), "Each, min": books["minutes"].map(_minutes),
            "In all, min": books["minutes_in_all"].map(_minutes), "Peak memory, GB": books["peak_gb"].map(_gigabytes),
            DEVICE: books["device"],
        })  # fmt: skip
        found.append(_cost_block("By notebook", cells))
    return found


def _cost_block(title: str, cells: pd.DataFrame) -> Block:
    devices = cells[DEVICE].unique()
    if len(devices) == 1:
        title, cells = f"{title} on {devices[0]}" if devices[0] else title, cells.drop(columns=DEVICE)
    return Block(title, cells, 1, False)


def _ablation_blocks(table: pd.DataFrame) -> list[Block]:
    """A block a category: a row a method or variant, its measures beside each other."""
    found = []
    for (dataset, category), rows in table.groupby(["dataset", "category"], sort=False):
        seeds = rows["n"].max()
        rows = rows.assign(text=[reproduced_text(r).removesuffix(f" ({seeds})") for r in rows.itertuples()])
        title = f"{dataset_title(dataset)}, {category}: {seeds} {'seed' if seeds == 1 else 'seeds'}"
        block = _pivot(title, rows, "method", "metric")
        measures = sorted(set(rows["metric"]), key=lambda name: list(METRIC_TITLES).index(published.kind(name)))
        found.append(replace(block, cells=block.cells[["Method", *map(metric_title, measures)]]))
    return found


def _minutes(value: float) -> str:
    """Minutes with a digit that shows; "" for none."""
    if value == 0:
        return ""
    return f"{value:.1f}" if value >= 0.1 else f"{value:.2f}" if value >= 0.01 else "< 0.01"


def _gigabytes(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.1f}"


def _interval_text(row) -> str:
    """``+0.12 [+0.03, +0.20]``, with as many decimals as keep the bound nearest to zero off zero."""
    digits = DIGITS.get(row.metric, 1)
    if published.UNITS.get(row.metric) in ("h", "s", "1/s"):
        digits = _decimals(row.difference)
    nearest = min(abs(row.low), abs(row.high))
    if nearest > 0:
        digits = min(4, max(digits, -floor(log10(nearest))))
    return f"{row.difference:+.{digits}f} [{row.low:+.{digits}f}, {row.high:+.{digits}f}]"


def _pivot(title: str, rows: pd.DataFrame, index: str, columns: str) -> Block:
    titles = {"method": method_title, "metric": metric_title, "category": str}
    wide = rows.pivot(index=index, columns=columns, values="text")
    wide = wide.loc[list(dict.fromkeys(rows[index])), list(dict.fromkeys(rows[columns]))].fillna("")
    wide.columns = [titles[columns](name) for name in wide.columns]
    wide.insert(0, index.capitalize(), [titles[index](name) for name in wide.index])
    return Block(title, wide.reset_index(drop=True), 1, False)
