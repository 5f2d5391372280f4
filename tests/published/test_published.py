from __future__ import annotations

import hashlib
from pathlib import Path

import pandas as pd
import pytest

from defectlib import paths, published


@pytest.mark.parametrize("name", published.FILES)
def test_tables_are_tidy(name):
    table = published.table(name)
    assert list(table.columns) == list(published.COLUMNS)
    assert not table.duplicated(["dataset", "category", "method", "metric"]).any()
    assert table["value"].dtype == float
    assert table.drop(columns=["value", "higher_is_better"]).notna().all().all()
    assert set(table["metric"].map(published.kind)) <= set(published.HIGHER_IS_BETTER)


@pytest.mark.parametrize("name", ["table_2", "table_8"])
def test_printed_averages_agree_with_their_rows(name):
    table = published.table(name)
    average = table["category"] == published.AVERAGE
    printed = table[average].set_index(["method", "metric"])["value"]
    mean = table[~average].groupby(["method", "metric"])["value"].mean()
    compared = printed.dropna()
    assert len(compared) == {"table_2": 20, "table_8": 14}[name]
    # Half a unit of the second decimal, plus what rounding of each row leaves.
    assert (compared - mean[compared.index]).abs().max() <= 0.0101


def value(name, **where):
    table = published.table(name)
    for key, wanted in where.items():
        table = table[table[key] == wanted]
    assert len(table) == 1
    return table.iloc[0]


def test_names_are_ours():
    row = value("table_2", category="metal_nut", method="defectsynth", metric="inception-kid")
    assert (row["value"], row["unit"], row["higher_is_better"]) == (51.74, "x1000", False)
    assert row["source"] == "DefectSynth, Table II"
    assert value("table_9", dataset="gdxray", method="shots_only", metric="pixel_f1_50")["value"] == 70.48
    assert value("table_5", method="defectsynth_no_hmi", metric="inception-kid")["value"] == 127.16
    assert value("table_6", method="defectsynth", metric="mask_iou")["value"] == 0.51
    assert value("table_10", method="defectsynth", metric="accuracy")["value"] == 99.74
    assert value("table_1", category="pill", metric="images_stage2_min")["value"] == 9
    assert value("table_4", method="seas", metric="train_total_h")["value"] == 20.36
    assert value("table_7", method="defectsynth_no_sae")["value"] == 2.26


def test_headline_keeps_baselines_that_have_a_name():
    headline = published.table("headline")
    assert value("headline", method="dualanodiff", metric="inception-is")["value"] == 1.93
    assert value("headline", method="adabldm", metric="iap90_gain")["value"] == 3.1
    assert set(headline.loc[headline["paper"] == "AdaBLDM", "method"]) == {"adabldm"}
    assert set(headline["source"]) == {"abstract"}


def test_a_printed_dash_is_empty():
    assert pd.isna(value("table_2", category="bottle", method="crop_paste", metric="inception-kid")["value"])
    assert published.table("table_8").query("category == 'toothbrush'")["value"].isna().all()


def test_open_measures_keep_an_open_name():
    assert "lpips" in set(published.table("table_2")["metric"])
    assert "ic-lpips" in set(published.table("headline")["metric"])
    assert "image_f1" in set(published.table("table_9")["metric"])


@pytest.mark.parametrize(
    ("metric", "kind", "better"),
    [
        ("tiny-kid", "kid", False),
        ("vgg-ic-lpips", "ic-lpips", True),
        ("alex-lpips", "lpips", True),
        ("lpips", "lpips", True),
        ("inception-is", "is", True),
        ("f1_macro", "f1_macro", True),
        ("pairs_per_second", "pairs_per_second", True),
        ("mask_area", "mask_area", None),
    ],
)
def test_kind_and_direction(metric, kind, better):
    assert published.kind(metric) == kind
    assert published.higher_is_better(metric) is better


def test_unknown_table():
    with pytest.raises(ValueError, match="no published table 'table_11'; there are: table_1,"):
        published.table("table_11")


def test_a_caller_cannot_change_the_numbers():
    table = published.table("table_7")
    table["value"] = 0
    assert published.table("table_7")["value"].tolist() == [3.40, 2.26]


def test_files_are_the_transcriptions():
    source = Path(paths.ROOT).parent / "shared" / "published"
    if not source.is_dir():
        pytest.skip("the transcriptions are not beside this checkout")
    names = sorted(file.name for file in source.glob("*.csv"))
    assert names == sorted(file.name for file in published.FOLDER.glob("*.csv"))
    digest = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for folder in (source, published.FOLDER)
        for name in names
    ]
    assert digest[: len(names)] == digest[len(names) :]


def test_a_variant_is_told_from_a_method_by_its_name():
    assert published.is_variant("defectsynth_no_sae") and published.is_variant("defectsynth_as_released")
    methods = {"shots_only", "crop_paste", "defectsynth", "dualanodiff", "symmetry_aware", "adabldm"}
    assert not any(published.is_variant(name) for name in methods)
