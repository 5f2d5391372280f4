"""The papers' tables as tidy frames, in the names that this package uses.

The CSV files beside this one are transcriptions; the dicts below say, once, how the papers' names for methods, data
sets and metrics map to ours. Where a paper leaves a metric open (LPIPS' network, the threshold of an F1), the name
stays open too, so that no number of ours can be set beside it by accident.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
AVERAGE = "average"
COLUMNS = (
    "paper", "table", "dataset", "category", "method", "metric", "value", "unit", "higher_is_better", "source",
)  # fmt: skip
FILES = {
    "table_1": "table_1_few_shot_counts.csv",
    "table_2": "table_2_quality_mvtec.csv",
    "table_3": "table_3_quality_gdxray_deepcrack.csv",
    "table_4": "table_4_efficiency.csv",
    "table_5": "table_5_ablation_modules.csv",
    "table_6": "table_6_mask_strategies.csv",
    "table_7": "table_7_sae_time.csv",
    "table_8": "table_8_classification_mvtec.csv",
    "table_9": "table_9_localization.csv",
    "table_10": "table_10_tire.csv",
    "headline": "headline_results.csv",
}
ROMAN = dict(zip(FILES, ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X"]))

PAPERS = {
    "000_symmetry_aware.txt": "Symmetry-aware",
    "001_defectsynth.txt": "DefectSynth",
    "002_adabldm.txt": "AdaBLDM",
    "003_dualanodiff.txt": "DualAnoDiff",
}
DATASETS = {
    "MVTec AD": "mvtec_ad",
    "GDXray": "gdxray",
    "DeepCrack": "deepcrack",
    "Tire X-ray (private)": "tire_xray",
}
METHODS = {
    "w/o augmentation": "shots_only",
    "Crop-Paste": "crop_paste",
    "DFMGAN": "dfmgan",
    "AnomalyDiffusion": "anomalydiffusion",
    "Defect-Gen": "defect_gen",
    "DefectDiffu": "defectdiffu",
    "SeaS": "seas",
    "DefectSynth": "defectsynth",
    "DualAnoDiff": "dualanodiff",
    "AdaBLDM": "adabldm",
    "Symmetry-aware": "symmetry_aware",
    "DefectSynth w/o HMI": "defectsynth_no_hmi",
    "DefectSynth w/o SFF": "defectsynth_no_sff",
    "DefectSynth w/o SAE": "defectsynth_no_sae",
    "DefectSynth, Perlin masks": "defectsynth_perlin",
    "DefectSynth, image-space masks": "defectsynth_image_space",
    "DefectSynth, latent-space masks": "defectsynth_latent_space",
}
METRICS = {
    "KID_x1000": "inception-kid", "IS": "inception-is", "LPIPS": "lpips", "IC-LPIPS": "ic-lpips",
    "accuracy": "accuracy", "F1": "f1_macro", "mask_IoU": "mask_iou",
}  # fmt: skip
LOCALISATION = {
    ("image", "AUROC"): "image_auroc", ("image", "AP"): "image_ap", ("image", "F1"): "image_f1",
    ("pixel", "AUROC"): "pixel_auroc", ("pixel", "AP"): "pixel_ap", ("pixel", "F1"): "pixel_f1_50",
}  # fmt: skip
TIRE = {
    ("Defect Classification", "Acc."): "accuracy", ("Defect Classification", "F1"): "f1_macro",
    ("Image-Level Localization", "AUC"): "image_auroc", ("Image-Level Localization", "AP"): "image_ap",
    ("Image-Level Localization", "F1"): "image_f1", ("Pixel-Level Localization", "AUC"): "pixel_auroc",
    ("Pixel-Level Localization", "AP"): "pixel_ap", ("Pixel-Level Localization", "F1"): "pixel_f1_50",
}  # fmt: skip
HEADLINE = {
    ("generation", "IS"): "inception-is", ("generation", "IC-LPIPS"): "ic-lpips",
    ("segmentation", "AP-P"): "pixel_ap", ("segmentation", "F1-P"): "pixel_f1",
    ("anomaly detection", "AP"): "ap_gain", ("anomaly detection", "IAP"): "iap_gain",
    ("anomaly detection", "IAP90"): "iap90_gain", ("classification", "accuracy"): "accuracy",
    ("localization", "F1-P"): "pixel_f1_50",
}  # fmt: skip
MASK_STRATEGIES = {
    "Perlin Noise": "defectsynth_perlin",
    "Image-Space-Only": "defectsynth_image_space",
    "Latent-Space-Only": "defectsynth_latent_space",
    "Hybrid": "defectsynth",
}

PERCENT = frozenset({
    "accuracy", "f1_macro", "image_auroc", "image_ap", "image_f1", "image_f1_50", "image_f1_max",
    "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_f1_50", "pixel_f1_max", "pixel_f1_max_21",
    "pro", "iap", "iap90",
})  # fmt: skip
HIGHER_IS_BETTER = {
    **dict.fromkeys(sorted(PERCENT), True),
    "kid": False, "is": True, "lpips": True, "ic-lpips": True, "mask_iou": True,
    **dict.fromkeys(("precision", "recall", "density", "coverage"), True), "shot-distance": None,
    "mask_seen": True, "class_seen": True,
    "ap_gain": True, "iap_gain": True, "iap90_gain": True,
    "fit_s": False, "train_stage1_h": False, "train_stage2_h": False, "train_total_h": False,
    "pairs_per_second": True, "seconds_per_image": False,
    "masks_stage1_min": None, "masks_stage1_max": None, "images_stage2_min": None, "images_stage2_max": None,
}  # fmt: skip
UNITS = {
    **dict.fromkeys(PERCENT, "%"), "kid": "x1000", "fit_s": "s", "train_stage1_h": "h", "train_stage2_h": "h",
    "train_total_h": "h", "pairs_per_second": "1/s", "seconds_per_image": "s", "ap_gain": "percentage points",
    "iap_gain": "percentage points", "iap90_gain": "percentage points", "masks_stage1_min": "masks",
    "masks_stage1_max": "masks", "images_stage2_min": "images", "images_stage2_max": "images",
}  # fmt: skip


def kind(metric: str) -> str:
    """A metric's name without its extractor: "tiny-kid" -> "kid", "vgg-ic-lpips" -> "ic-lpips", "f1_macro" as it is."""
    for name in ("ic-lpips", "lpips", "kid", "is", "precision", "recall", "density", "coverage", "shot-distance"):
        if metric == name or metric.endswith(f"-{name}"):
            return name
    return metric


def family(method: str) -> str:
    """The method that a variant, ``<method>_<what is changed>``, is of; itself for a method."""
    return next((name for name in METHODS.values() if method.startswith(f"{name}_")), method)


def is_variant(method: str) -> bool:
    """Is this a row of an ablation, which has its place in Tables V to VII alone?"""
    return family(method) != method


def higher_is_better(metric: str) -> bool | None:
    """The direction of a metric; None where more is neither better nor worse, or where the metric is not known here."""
    return HIGHER_IS_BETTER.get(kind(metric))


def category_name(name: str) -> str:
    """A category as the data set's folders spell it: "Metal Nut" -> "metal_nut", "Average" -> "average"."""
    return name.lower().replace(" ", "_")


@lru_cache(maxsize=len(FILES))
def _table(name: str) -> pd.DataFrame:
    raw = pd.read_csv(FOLDER / FILES[name])
    rows = pd.DataFrame(_READERS[name](raw))
    rows["table"] = name
    if name != "headline":
        rows["paper"] = "DefectSynth"
    rows["source"] = "abstract" if name == "headline" else f"DefectSynth, Table {ROMAN[name]}"
    rows["value"] = pd.to_numeric(rows["value"]).astype(float)
    rows["unit"] = [UNITS.get(kind(metric), "") for metric in rows["metric"]]
    rows["higher_is_better"] = [higher_is_better(metric) for metric in rows["metric"]]
    return rows[list(COLUMNS)]


def table(name: str) -> pd.DataFrame:
    """One published table, tidy: a row a printed number, columns ``COLUMNS``.

    Args:
        name: "table_1" ... "table_10" (DefectSynth) or "headline" (the four abstracts).

    Percentages are in percent and KID is times 1,000, as printed; a printed dash is NaN. ``category`` is "average" for
    a number over a whole data set.

    Raises:
        ValueError: There is no such table.
    """
    if name not in FILES:
        raise ValueError(f"there is no published table '{name}'; there are: {', '.join(FILES)}")
    return _table(name).copy()


def _few_shot(raw: pd.DataFrame) -> list[dict]:
    long = raw.melt("category", var_name="metric")
    return [
        {
            "dataset": "mvtec_ad",
            "category": category_name(r.category),
            "method": "",
            "metric": r.metric,
            "value": r.value,
        }
        for r in long.itertuples()
    ]


def _quality(raw: pd.DataFrame) -> list[dict]:
    return [
        {
            "dataset": DATASETS[getattr(r, "dataset", "MVTec AD")],
            "category": category_name(getattr(r, "category", AVERAGE)),
            "method": METHODS[r.method], "metric": METRICS[r.metric], "value": r.value,
        }
        for r in raw.itertuples()
    ]  # fmt: skip


def _efficiency(raw: pd.DataFrame) -> list[dict]:
    long = raw.melt("method", var_name="metric")
    return [
        {"dataset": "mvtec_ad", "category": "wood", "method": METHODS[r.method], "metric": r.metric, "value": r.value}
        for r in long.itertuples()
    ]


def _modules(raw: pd.DataFrame) -> list[dict]:
    def variant(row: dict) -> str:
        off = [name for name in ("hmi", "sff", "sae") if row[name] == "no"]
        return "_no_".join(["defectsynth", *off])

    return [
        {"dataset": "mvtec_ad", "category": "wood", "method": variant(row), "metric": METRICS[m], "value": row[m]}
        for row in raw.to_dict("records")
        for m in ("KID_x1000", "LPIPS", "IS")
    ]


def _mask_strategies(raw: pd.DataFrame) -> list[dict]:
    long = raw.melt("strategy", var_name="metric")
    return [
        {
            "dataset": "mvtec_ad", "category": "wood", "method": MASK_STRATEGIES[r.strategy],
            "metric": METRICS[r.metric], "value": r.value,
        }
        for r in long.itertuples()
    ]  # fmt: skip


def _sae_time(raw: pd.DataFrame) -> list[dict]:
    variants = {"w/ SAE": "defectsynth", "w/o SAE": "defectsynth_no_sae"}
    return [
        {
            "dataset": "mvtec_ad", "category": "wood", "method": variants[r.variant], "metric": "seconds_per_image",
            "value": r.seconds_per_image,
        }
        for r in raw.itertuples()
    ]  # fmt: skip


def _localisation(raw: pd.DataFrame) -> list[dict]:
    return [
        {
            "dataset": DATASETS[r.dataset], "category": AVERAGE, "method": METHODS[r.method],
            "metric": LOCALISATION[r.level, r.metric], "value": r.value,
        }
        for r in raw.itertuples()
    ]  # fmt: skip


def _tire(raw: pd.DataFrame) -> list[dict]:
    columns = {"shots_only": "without_augmentation", "defectsynth": "with_defectsynth"}
    return [
        {
            "dataset": "tire_xray", "category": AVERAGE, "method": method, "metric": TIRE[row["task"], row["metric"]],
            "value": row[column],
        }
        for method, column in columns.items()
        for row in raw.to_dict("records")
    ]  # fmt: skip


def _headline(raw: pd.DataFrame) -> list[dict]:
    rows = []
    for r in raw.itertuples():
        shared = {
            "paper": PAPERS[r.source], "dataset": DATASETS[r.dataset], "category": AVERAGE,
            "metric": HEADLINE[r.task, r.metric],
        }  # fmt: skip
        system = r.system.split(" (")[0]
        # AdaBLDM's abstract prints gains over an unnamed best system: that one has no row of its own.
        if r.baseline in METHODS:
            rows.append({**shared, "method": METHODS[r.baseline], "value": r.baseline_value})
        rows.append({**shared, "method": METHODS[system], "value": r.system_value})
    return rows


_READERS = {
    "table_1": _few_shot, "table_2": _quality, "table_3": _quality, "table_4": _efficiency, "table_5": _modules,
    "table_6": _mask_strategies, "table_7": _sae_time, "table_8": _quality, "table_9": _localisation,
    "table_10": _tire, "headline": _headline,
}  # fmt: skip
