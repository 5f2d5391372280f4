import json

import pandas as pd
import pytest

from defectlib.report import costs, formats, layout, page


def results(rows):
    columns = ["category", "method", "seed", "stage", "wall_s", "peak_memory_mb", "device", "metric", "value"]
    frame = pd.DataFrame([[*row, metric, 0.5] for row in rows for metric in ("a", "b")], columns=columns)
    return frame.assign(path=frame["category"] + frame["method"] + frame["seed"].map(str) + frame["stage"])


def receipt(folder, job, seconds, peak=2048):
    folder.mkdir(exist_ok=True)
    content = {"job": job, "wall_s": seconds, "peak_memory_mb": peak, "device": "cpu"}
    (folder / f"{job}.json").write_text(json.dumps(content))


@pytest.fixture
def table(tmp_path):
    rows = [
        ("nut", "defectsynth", 0, "fit", 120.0, 1024, "cpu"), ("nut", "defectsynth", 1, "fit", 240.0, 3072, "cpu"),
        ("nut", "defectsynth", 0, "sample", 30.0, 512, "cpu"), ("nut", "crop_paste", 0, "fit", 1.2, 256, "a GPU"),
    ]  # fmt: skip
    for job, seconds in (("05_training.nut", 90.0), ("05_training.gear", 30.0), ("01_data", 12.0)):
        receipt(tmp_path / "notebooks", job, seconds)
    (tmp_path / "notebooks" / "report.json").write_text("{}")
    return costs.build(results(rows), tmp_path / "notebooks")


def test_a_stage_counts_once_whatever_it_measured(table):
    own = table[table["of"] == "method"].set_index(["name", "stage"])
    assert own.loc[("defectsynth", "fit"), ["runs", "minutes", "minutes_in_all", "peak_gb"]].tolist() == [2, 3, 6, 3]
    assert own.loc[("defectsynth", "sample"), "minutes"] == 0.5
    assert own.loc[("crop_paste", "fit"), "device"] == "a GPU"


def test_a_notebook_that_was_left_out_cost_nothing(tmp_path):
    for job in ("04_methods", "05_training.nut"):
        receipt(tmp_path / "notebooks", job, 60.0)
    books = costs.build(results([]), tmp_path / "notebooks", without=["04_methods"])
    assert books["name"].tolist() == ["05_training"]


def test_notebooks_are_summed_over_categories(table):
    books = table[table["of"] == "notebook"].set_index("name")
    assert books["runs"].to_dict() == {"01_data": 1, "05_training": 2}
    assert books.loc["05_training", ["minutes", "minutes_in_all", "peak_gb"]].tolist() == [1, 2, 2]


def test_a_row_a_method_with_its_stages_beside_each_other(table):
    methods, books = layout.blocks(table)
    assert methods.cells.loc[:, "Method":"Sample, min"].values.tolist() == [
        ["Crop-Paste", "0.02", ""], ["DefectSynth", "3.0", "0.5"],
    ]  # fmt: skip
    assert methods.cells["In all, min"].tolist() == ["0.02", "6.5"]
    assert methods.cells["Peak memory, GB"].tolist() == ["0.2", "3.0"]
    assert methods.cells["Device"].tolist() == ["a GPU", "cpu"], "which device, where there are several"
    assert books.cells["Each, min"].tolist() == ["0.2", "1.0"]
    assert books.title == "By notebook on cpu" and "Device" not in books.cells


def test_in_all_formats_and_on_the_page(table, tmp_path):
    assert "| DefectSynth | 3.0 | 0.5 |" in formats.markdown(table)
    assert formats.latex(table).count(r"\begin{table}") == 2
    empty = pd.DataFrame(columns=["value"])
    text = page.write_page(tmp_path, {}, empty, {}, others=[table]).read_text()
    assert '<h3 id="costs">Costs</h3>' in text and 'href="#costs"' in text and "<td>DefectSynth</td>" in text


def test_of_nothing(tmp_path):
    assert costs.build(results([]), tmp_path / "none").empty
