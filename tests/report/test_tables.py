from __future__ import annotations

import json
import math
import shutil
import subprocess

import pandas as pd
import pytest

from defectlib import published
from defectlib.report import ablation, claims, costs, formats, layout, tables
from defectlib.report.specs import ORACLE, REASONS, SPECS, codes

BASE = {
    "profile": "demo", "split": "all_shots", "dataset": "mini", "category": "nut", "method": "crop_paste", "seed": 0,
    "stage": "quality", "defect": "crack", "metric": "tiny-kid", "value": 0.1, "sd": None, "protocol": "{}",
    "extractor": "tiny", "n_real": 24, "n_generated": 24, "git_sha": "0" * 40, "dirty": False, "wall_s": 1.0,
    "peak_memory_mb": 512, "device": "cpu", "path": "x",
}  # fmt: skip


def frame(*rows):
    return pd.DataFrame([{**BASE, **row} for row in rows])


def one(table, **where):
    for key, wanted in where.items():
        table = table[table[key] == wanted]
    assert len(table) == 1, table
    return table.iloc[0]


def why(row):
    return codes(row["why"])


def test_means_go_over_defects_first_then_seeds():
    results = frame(
        {"defect": "crack", "seed": 0, "value": 0.10}, {"defect": "stain", "seed": 0, "value": 0.20},
        {"defect": "crack", "seed": 1, "value": 0.30}, {"defect": "stain", "seed": 1, "value": 0.20},
    )  # fmt: skip
    row = one(tables.build(results, "table_2"), dataset="mini")
    # seed 0: 0.15, seed 1: 0.25, times 1,000; sd = 100 / sqrt(2)
    assert row["reproduced"] == pytest.approx(200)
    assert row["sd"] == pytest.approx(100 / math.sqrt(2))
    assert row["n"] == 2
    assert row["unit"] == "x1000"
    assert row["category"] == "nut"


@pytest.mark.parametrize("metric, others, marked", [("tiny-is", 32, 1), ("tiny-is", 24, 0), ("tiny-kid", 32, 0)])
def test_is_of_unlike_numbers_of_images_is_marked(metric, others, marked):
    results = frame({"metric": metric}, {"metric": metric, "method": "defectsynth", "n_generated": others})
    table = tables.build(results, "table_2")
    assert ["other_n" in why(row) for _, row in table[table["dataset"] == "mini"].iterrows()] == [bool(marked)] * 2


def test_one_seed_has_no_sd():
    row = one(tables.build(frame({}), "table_2"), dataset="mini")
    assert (row["reproduced"], row["n"]) == (pytest.approx(100), 1)
    assert pd.isna(row["sd"])


def test_tiny_never_meets_inception():
    results = frame(
        {"dataset": "mvtec_ad", "category": "hazelnut"},
        {
            "dataset": "mvtec_ad",
            "category": "hazelnut",
            "method": "defectsynth",
            "metric": "inception-kid",
            "value": 0.05,
        },
    )
    table = tables.build(results, "table_2")
    tiny = one(table, category="hazelnut", metric="tiny-kid")
    assert pd.isna(tiny["published"]) and pd.isna(tiny["delta"])
    assert why(tiny) == ["other_extractor", "reduced_scale"]
    real = one(table, category="hazelnut", method="defectsynth", metric="inception-kid")
    assert (real["published"], real["delta"]) == (42.73, pytest.approx(50 - 42.73))
    assert why(real) == ["reduced_scale"]


def test_paper_profile_at_the_papers_protocol_is_comparable():
    row = {"profile": "paper", "dataset": "mvtec_ad", "category": "hazelnut", "method": "defectsynth"}
    table = tables.build(frame({**row, "metric": "inception-is", "value": 2.0}), "table_2")
    assert one(table, category="hazelnut", method="defectsynth", metric="inception-is")["why"] == ""


def test_open_measures_stay_apart():
    row = {"profile": "paper", "dataset": "mvtec_ad", "category": "hazelnut", "method": "defectsynth"}
    table = tables.build(frame({**row, "metric": "vgg-lpips", "value": 0.3}), "table_2")
    assert why(one(table, category="hazelnut", metric="vgg-lpips")) == ["undefined_in_paper"]
    printed = one(table, category="hazelnut", method="defectsynth", metric="lpips")
    assert printed["published"] == 0.29 and pd.isna(printed["reproduced"]) and why(printed) == ["not_run"]


def test_what_was_not_run_is_empty(tmp_path):
    table = tables.build(None, "table_2")
    assert table["reproduced"].isna().all() and table["n"].isna().all() and table["delta"].isna().all()
    assert "No cell is reproduced here" in table.attrs["caption"]
    assert len(table) == len(published.table("table_2"))
    dash = one(table, category="bottle", method="crop_paste", metric="inception-kid")
    assert why(dash) == ["not_run", "undefined_in_paper"]
    tables.write(table, tmp_path, "table_2")
    first = (tmp_path / "table_2.csv").read_text().splitlines()[1]
    assert first.startswith('mvtec_ad,bottle,crop_paste,inception-kid,x1000,,,,,,"not_run: not run here;')


def test_withheld_is_not_called_not_run():
    nothing = {"metric": "accuracy", "value": None, "stage": "downstream", "defect": "", "extractor": ""}
    row = one(tables.build(frame(nothing), "table_8"), dataset="mini")
    assert pd.isna(row["reproduced"]) and row["n"] == 0
    assert why(row) == ["withheld", "other_dataset", "other_split"]
    partly = tables.build(frame({"defect": "crack", "value": None}, {"defect": "stain", "value": 0.2}), "table_2")
    assert one(partly, dataset="mini")["reproduced"] == pytest.approx(200)
    assert why(one(partly, dataset="mini"))[0] == "partly_withheld"


def test_each_table_prefers_its_own_split_and_never_mixes():
    rows = [
        {"split": split, "metric": "accuracy", "value": v}
        for split, v in (("first_third", 0.2), ("random_thirds", 0.6))
    ]
    row = one(tables.build(frame(*rows), "table_8"), dataset="mini")
    assert row["reproduced"] == pytest.approx(60) and "other_split" not in why(row)
    row = one(tables.build(frame(rows[0]), "table_8"), dataset="mini")
    assert row["reproduced"] == pytest.approx(20) and "other_split" in why(row)


def test_profiles_never_mix():
    with pytest.raises(ValueError, match="mix the profiles demo, paper"):
        tables.build(frame({}, {"profile": "paper"}), "table_2")


def test_a_model_that_was_chosen_is_marked():
    row = {"metric": "pixel_ap", "defect": "", "dataset": "mini", "stage": "downstream"}
    for rule, marked in (("last step, as runs have it", False), ("last: the last", False), ("test_oracle: best", True)):
        results = frame(row, row | {"seed": 1, "protocol": json.dumps({"selection": rule})})
        found = one(tables.build(results, "table_9"), dataset="mini", metric="pixel_ap")
        assert ("chosen_checkpoint" in why(found)) == marked
    gain = frame(*(row | {"method": m, "protocol": json.dumps({"selection": rule})} for m in ("adabldm", "crop_paste")))
    assert "chosen_checkpoint" in why(one(tables.build(gain, "headline"), metric="ap_gain", dataset="mini"))


@pytest.mark.parametrize("steps, marked", [(50, False), (20, True), (None, True)])
def test_a_time_of_other_steps_than_the_published_is_marked(steps, marked):
    protocol = json.dumps({} if steps is None else {"num_inference_steps": steps})
    row = {"metric": "seconds_per_image", "method": "defectsynth", "dataset": "mvtec_ad", "category": "wood"}
    found = one(tables.build(frame(row | {"protocol": protocol}), "table_7"), method="defectsynth")
    assert ("other_steps" in why(found)) == marked


def test_what_choosing_on_the_test_set_adds_stands_beside_and_nowhere_else():
    row = {"metric": "pixel_ap", "defect": "", "dataset": "mini", "stage": "downstream", "value": 0.5}
    best = {"metric": "pixel_ap_test_oracle", "protocol": json.dumps({"selection": "test_oracle: best"})}
    results = frame(*(row | {"seed": k} | own for k in (0, 1) for own in ({}, best | {"value": 0.6 + 0.1 * k})))
    table = tables.build(results, "table_9")
    found = one(table, dataset="mini", metric="pixel_ap")
    assert (found["reproduced"], found["test_oracle"]) == (pytest.approx(50), pytest.approx(65))
    assert "chosen_checkpoint" not in why(found)
    assert "test_oracle" not in tables.build(results, "table_2") and "| 65.0 |" in formats.markdown(table)
    alone = tables.build(frame(row), "table_9")
    assert alone["test_oracle"].isna().all() and "Best on test" not in formats.markdown(alone)


def test_dirty_is_marked():
    row = one(tables.build(frame({"seed": 0}, {"seed": 1, "dirty": True}), "table_2"), dataset="mini")
    assert why(row)[-1] == "dirty"


def test_average_needs_every_category():
    some = [{"category": c, "value": v} for c, v in (("nut", 0.1), ("gear", 0.3))]
    table = tables.build(frame(*some, {"category": "nut", "method": "defectsynth", "value": 0.5}), "table_2")
    assert one(table, dataset="mini", category="average")["reproduced"] == pytest.approx(200)
    assert one(table, dataset="mini", category="average")["method"] == "crop_paste"
    assert set(table.loc[table["dataset"] == "mini", "category"]) == {"nut", "gear", "average"}


def test_average_over_mvtec_asks_for_all_fifteen():
    names = [c for c in published.table("table_8")["category"].unique() if c not in ("average", "toothbrush")]
    rows = [
        {"dataset": "mvtec_ad", "category": c, "method": "defectsynth", "metric": "accuracy", "value": i / 100}
        for i, c in enumerate(names)
    ]
    row = one(tables.build(frame(*rows), "table_8"), category="average", method="defectsynth", metric="accuracy")
    assert row["reproduced"] == pytest.approx(sum(range(14)) / 14)
    assert row["published"] == 66.70
    row = one(tables.build(frame(*rows[:-1]), "table_8"), category="average", method="defectsynth", metric="accuracy")
    assert pd.isna(row["reproduced"]) and why(row) == ["not_run_for_all"]


def test_a_data_set_of_one_category_has_one_row():
    rows = {"dataset": "gdxray", "category": "weld", "metric": "pixel_f1_50", "value": 0.7, "split": "first_third"}
    table = tables.build(frame(rows), "table_9")
    row = one(table[table["reproduced"].notna()])
    assert (row["category"], row["method"]) == ("average", "crop_paste")
    assert why(row) == ["undefined_in_paper", "reduced_scale", "other_crops"]
    row = one(
        tables.build(frame({**rows, "method": "shots_only"}), "table_9"),
        dataset="gdxray",
        method="shots_only",
        metric="pixel_f1_50",
    )
    assert (row["published"], row["delta"]) == (70.48, pytest.approx(70 - 70.48))
    mini = tables.build(frame({**rows, "dataset": "mini"}), "table_9")
    assert list(mini.loc[mini["dataset"] == "mini", "category"]) == ["weld"]


def test_results_go_to_their_own_table():
    weld = frame({"dataset": "gdxray", "category": "weld"})
    assert tables.build(weld, "table_2")["reproduced"].isna().all()
    assert tables.build(weld, "table_3")["reproduced"].notna().sum() == 1
    assert tables.build(frame({}), "table_3")["reproduced"].isna().all()
    assert tables.build(frame({}), "table_5")["reproduced"].isna().all()
    tire = frame({"dataset": "mvtec_3d", "category": "tire", "metric": "accuracy"})
    assert why(one(tables.build(tire, "table_10"), dataset="mvtec_3d")) == ["other_dataset"]


def test_times():
    row = {"stage": "fit", "metric": "fit_s", "value": 7200.0, "defect": ""}
    reduced = one(tables.build(frame(row), "table_4"), dataset="mini")
    assert reduced["metric"] == "fit_s" and set(why(reduced)) >= {"other_dataset", "reduced_scale"}
    wood = {**row, "dataset": "mvtec_ad", "category": "wood", "method": "defectsynth"}
    where = {"method": "defectsynth", "metric": "train_total_h"}
    own, other = (one(tables.build(frame(wood | {"profile": p}), "table_4"), **where) for p in ("table_4", "paper"))
    assert (own["reproduced"], own["published"], why(own)) == (2.0, 1.03, ["other_machine"])
    assert set(why(other)) == {"reduced_scale", "other_machine"}, "512 px and 2,000 epochs are another protocol"


def test_table_1_counts_shots():
    rows = [("mvtec_ad", "pill", d, str(i), "shot") for d, n in (("crack", 9), ("color", 25)) for i in range(n)]
    rows += [("mvtec_ad", "pill", "good", "g", "train")]
    manifest = pd.DataFrame(rows, columns=["dataset", "category", "defect", "id", "side"])
    table = tables.build(None, "table_1", manifests=manifest)
    assert one(table, category="pill", metric="images_stage2_min")["delta"] == 0
    most = one(table, category="pill", metric="images_stage2_max")
    assert (most["reproduced"], most["delta"], most["why"]) == (25, -1, "")
    manifest.loc[0, "side"] = "test"
    assert why(one(tables.build(None, "table_1", manifests=manifest), category="pill", metric="masks_stage1_min")) == [
        "other_split"
    ]


def test_table_1_keeps_partitions_apart():
    rows = [("mini", "nut", "crack", str(i), "shot" if i % 2 == p else "test", p) for p in (0, 1) for i in range(6)]
    manifests = pd.DataFrame(rows, columns=["dataset", "category", "defect", "id", "side", "partition"])
    table = tables.build(None, "table_1", manifests=manifests)
    assert one(table, category="nut", metric="masks_stage1_max")["reproduced"] == 3
    with pytest.raises(ValueError, match="column 'partition'"):
        tables.build(None, "table_1", manifests=manifests.drop(columns="partition"))


def test_reproduced_rows_come_first():
    table = tables.build(frame({}, {"metric": "tiny-is", "value": 1.5}), "table_2")
    assert table["reproduced"].notna().tolist()[:3] == [True, True, False]
    assert table["metric"].tolist()[:2] == ["tiny-kid", "tiny-is"]


@pytest.mark.parametrize("name", tables.NAMES)
def test_every_reason_has_words(name):
    table = tables.build(frame({}, {"metric": "accuracy", "defect": ""}), name)
    assert list(table.columns) == tables.COLUMNS + [ORACLE] * SPECS[name].selected
    assert {code for text in table["why"] for code in codes(text)} <= set(REASONS)
    assert {"caption", "note", "title", "name"} == set(table.attrs)


def test_reasons_can_be_told_apart():
    assert not [words for words in REASONS.values() if ";" in words]


def test_bad_input():
    with pytest.raises(ValueError, match="no table 'table_11'"):
        tables.build(None, "table_11")
    with pytest.raises(ValueError, match="lack the columns category, .*runs.collect"):
        tables.build(pd.DataFrame({"profile": []}), "table_2")


@pytest.mark.parametrize(
    ("reproduced", "sd", "n", "metric", "text"),
    [
        (57.123, 0.84, 3, "accuracy", "57.1 ± 0.8 (3)"),
        (57.123, None, 1, "accuracy", "57.1 (1)"),
        (0.15321, 0.004, 2, "tiny-lpips", "0.153 ± 0.004 (2)"),
        (151.93, 2.3, 2, "tiny-kid", "151.9 ± 2.3 (2)"),
        (0.00808, 0.00078, 2, "fit_s", "0.0081 ± 0.0008 (2)"),
        (152.3, 7.77, 2, "pairs_per_second", "152 ± 8 (2)"),
        (None, None, 0, "accuracy", ""),
    ],
)
def test_text_of_a_cell(reproduced, sd, n, metric, text):
    row = pd.Series({"reproduced": reproduced, "sd": sd, "n": n, "metric": metric})
    assert layout.reproduced_text(row) == text


def test_written_files(tmp_path):
    table = tables.build(frame({"seed": 0}, {"seed": 1}, {"category": "a|b_c", "dirty": True}), "table_2")
    written = tables.write(table, tmp_path, "table_2")
    before = [path.read_bytes() for path in written]
    assert [path.suffix for path in written] == [".csv", ".md", ".tex"]
    assert [path.read_bytes() for path in tables.write(table, tmp_path, "table_2")] == before
    read = pd.read_csv(tmp_path / "table_2.csv")
    assert list(read.columns) == tables.COLUMNS and len(read) == len(table)
    text = (tmp_path / "table_2.md").read_text()
    assert "| nut | Crop-Paste | KID ×10³ (tiny) ↓ |  | 100.0 ± 0.0 (2) |  | other_extractor, other_dataset |" in text
    assert "| a\\|b_c | Crop-Paste |" in text and "* `dirty`: the code had uncommitted changes" in text
    assert text.index("**Reproduced on mini**") < text.index("**Published: KID ×10³ (Inception) ↓**")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "| bottle |  | 70.90 | 146.55 |" in text and all(line.endswith("|") for line in rows)
    latex = (tmp_path / "table_2.tex").read_text()
    assert r"a|b\_c" in latex and r"100.0 $\pm$ 0.0 (2)" in latex and r"other\_dataset" in latex
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") == latex.count(r"\begin{table}") == 4


def test_a_row_does_not_repeat_the_labels_above_it():
    rows = [{"category": c, "metric": m} for c in ("nut", "gear") for m in ("tiny-kid", "tiny-is")]
    text = formats.markdown(tables.build(frame(*rows), "table_2"))
    labels = [line.split("|")[1:3] for line in text.splitlines() if "(tiny)" in line]
    assert [[cell.strip() for cell in row] for row in labels] == [
        ["gear", "Crop-Paste"], ["", ""], ["nut", "Crop-Paste"], ["", ""], ["average", "Crop-Paste"], ["", ""]
    ]  # fmt: skip
    block = layout.Block("x", pd.DataFrame({"a": ["p", "q"], "b": ["s", "s"], "n": ["1", "1"]}), 2, True)
    assert layout.labelled_once(block).equals(block.cells), "the same word below another heading stays"


def test_published_tables_stand_as_the_paper_prints_them():
    (tire,) = layout.blocks(tables.build(None, "table_10"))
    assert list(tire.cells.columns) == ["Metric", "w/o augmentation", "DefectSynth"]
    assert tire.cells.iloc[0].tolist() == ["Accuracy, % ↑", "78.65", "99.74"]
    localisation = layout.blocks(tables.build(None, "table_9"))
    assert [block.title for block in localisation] == [f"Published: {d}" for d in ("MVTec AD", "GDXray", "DeepCrack")]
    assert localisation[1].cells.iloc[0].tolist()[:3] == ["w/o augmentation", "88.57", "86.09"]
    (cost,) = layout.blocks(tables.build(None, "table_4"))
    assert cost.cells.iloc[3].tolist() == ["DefectDiffu", "", "2.15", "2.15", "0.31"]
    assert cost.cells.iloc[2].tolist()[-1] == "0.014"


def test_long_blocks_break_into_pages(tmp_path):
    rows = [{"category": f"c{i:02d}", "metric": "accuracy", "defect": ""} for i in range(40)]
    latex = formats.latex(tables.build(frame(*rows), "table_8"))
    assert "part 1 of 2" in latex and "part 2 of 2" in latex


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_latex_compiles(tmp_path):
    results = frame({"category": "50%_of & more$"}, {"metric": "accuracy", "defect": ""})
    made = {name: tables.build(results, name) for name in tables.NAMES}
    made |= {claims.NAME: claims.judge(results), costs.NAME: costs.build(results, tmp_path)}
    made |= {ablation.NAME: ablation.build(results)}
    for name, table in made.items():
        tables.write(table, tmp_path, name)
    body = "\n".join(rf"\input{{{name}}}\clearpage" for name in made)
    source = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{body}\end{{document}}"
    (tmp_path / "all.tex").write_text(source)
    call = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert call.returncode == 0, call.stdout[-2000:]


def test_protocol_text_is_not_needed():
    # The frame of runs.collect() has more columns than the tables read.
    results = frame({"protocol": json.dumps({"extractor": "tiny"})}).drop(columns=["protocol", "path", "device"])
    assert tables.build(results, "table_2")["reproduced"].notna().sum() == 1


def test_variants_stand_in_the_ablation_tables_alone():
    results = frame(
        {"method": "defectsynth"}, {"method": "defectsynth_no_sae"}, {"method": "defectsynth_as_released"}, {},
    )  # fmt: skip
    shown = {name: set(tables.build(results, name).query("dataset == 'mini'")["method"]) for name in tables.NAMES}
    assert shown["table_2"] == {"crop_paste", "defectsynth"}
    assert shown["table_5"] == {"defectsynth", "defectsynth_no_sae"}
    assert shown["table_6"] == {"defectsynth"}


def test_adabldms_gains_are_points_over_crop_paste_within_a_seed():
    def score(method, seed, category, value):
        about = {"split": "first_third", "metric": "iap", "defect": "", "stage": "downstream"}
        return about | {"method": method, "seed": seed, "category": category, "value": value}

    rows = [
        score(method, seed, category, base + 0.1 * seed + (0.05 if method == "adabldm" else 0.0))
        for category, base in (("nut", 0.2), ("gear", 0.4)) for seed in (0, 1) for method in ("adabldm", "crop_paste")
    ]  # fmt: skip
    table = tables.build(frame(*rows), "headline").query("metric == 'iap_gain' and dataset == 'mini'")
    assert list(table["method"]) == ["adabldm"] and table["reproduced"].iloc[0] == pytest.approx(5)
    assert table["n"].iloc[0] == 2 and table["sd"].iloc[0] == pytest.approx(0, abs=1e-9)
    alone = tables.build(frame(*(row for row in rows if row["method"] == "adabldm")), "headline")
    assert alone.query("metric == 'iap_gain'")["reproduced"].isna().all()
