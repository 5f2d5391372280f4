"""Strict runs: what papermill lets pass is an error here. Each execution starts a real kernel."""

import json
import os
import shutil

import nbformat
import pytest
import torch

from defectlib import batch, images, paths, profiles, study
from defectlib.params import Parameters

NAMES = sorted(Parameters.model_fields)


def notebook(path, *cells):
    book = nbformat.v4.new_notebook()
    head = nbformat.v4.new_code_cell("\n".join(f"{n} = None" for n in NAMES), metadata={"tags": ["parameters"]})
    book.cells = [head, *(nbformat.v4.new_code_cell(text) for text in cells)]
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(book, path)
    return path


def run(tmp_path, *cells, **parameters):
    source = notebook(tmp_path / "n.ipynb", *cells)
    batch.execute(source, tmp_path / "out" / "n.ipynb", Parameters(profile="smoke", **parameters))


def test_parameters_arrive_as_they_were_given(tmp_path, capfd):
    """papermill's command line would turn the category '01' into 1."""
    check = f"assert category == '01' and seeds == [0, 1]; open({str(tmp_path / 'seen')!r}, 'w').write(dataset)"
    run(tmp_path, check, category="01", seeds=[0, 1], dataset="btad")
    assert (tmp_path / "seen").read_text() == "btad"
    assert capfd.readouterr().err == "", "no kernel warns in the log of a good run"


def test_unknown_parameter_is_refused_before_the_kernel_starts(tmp_path):
    source = notebook(tmp_path / "n.ipynb", "1")
    book = nbformat.read(source, as_version=4)
    book.cells[0].source = "profile = None"
    nbformat.write(book, source)
    with pytest.raises(ValueError, match="has no parameter category, dataset"):
        batch.execute(source, tmp_path / "out.ipynb", Parameters(profile="smoke", category="nut"))
    assert not (tmp_path / "out.ipynb").exists()


def test_two_parameter_cells_are_refused(tmp_path):
    source = notebook(tmp_path / "n.ipynb", "1")
    book = nbformat.read(source, as_version=4)
    book.cells.append(book.cells[0])
    nbformat.write(book, source)
    with pytest.raises(ValueError, match="2 cells tagged 'parameters'"):
        batch.notebook_parameters(source)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("raise KeyError('boom')", "failed in cell .*KeyError.*boom"),
        ("import os; os.kill(os.getpid(), 9)", "the kernel of n.ipynb died"),
        ("import sys; sys.exit(0)", "failed in cell|stopped before"),
    ],
)
def test_what_ends_early_is_a_failure(tmp_path, cell, message):
    with pytest.raises(RuntimeError, match=message):
        run(tmp_path, "1", cell, "2")


def test_graph_by_category():
    graph = batch.jobs(Parameters(profile="demo"), ["gear", "nut"])
    assert len(graph) == 3 + 2 * 6
    assert graph["06_generation.nut"].needs == ("05_training.nut",)
    assert graph["05_training.nut"].needs == ("01_data",) and graph["01_data"].needs == ()
    assert graph["07_quality.gear"].parameters.seeds == profiles.load("demo").seeds
    assert graph["03_backbone"].parameters.category == "gear"
    assert graph["04_methods"].needs == ("05_training.gear",), "it shows the fit of the first category"
    demo = profiles.load("demo")
    made = {file.parts[-3] for file in batch.stage_files(graph["08_ablation.nut"])}
    everywhere = {name for name, variant in demo.variants.items() if variant.only is None}
    assert made == {*demo.methods, *everywhere}
    some = batch.jobs(Parameters(profile="smoke"), ["nut"])["08_ablation.nut"]
    made = {file.parts[-3] for file in batch.stage_files(some)}
    assert "dualanodiff_no_interaction" in made and "dualanodiff_compensated" not in made, "objects alone have it"
    several = batch.jobs(Parameters(profile="multiclass"), ["nut"])["08_ablation.nut"]
    made = {file.parts[-3] for file in batch.stage_files(several)}
    assert "symmetry_aware_unequal" in made and "symmetry_aware_later" not in made, "it asks for two defects"


def test_graph_by_run_has_a_job_a_method_and_seed():
    asked = Parameters(profile="paper", dataset="mvtec_ad", methods=["crop_paste"], seeds=[0, 1, 2])
    graph = batch.jobs(asked, ["bottle"], grouping="run")
    job = graph["09_downstream.bottle.crop_paste.s2"]
    assert job.needs == ("06_generation.bottle.crop_paste.s2",)
    assert (job.parameters.methods, job.parameters.seeds) == (["crop_paste"], [2])
    assert sum(name.startswith("05_training") for name in graph) == 3
    assert sum(name.startswith("02_masks") for name in graph) == 1
    assert graph["08_ablation.bottle"].needs == tuple(f"07_quality.bottle.crop_paste.s{seed}" for seed in (0, 1, 2))
    with pytest.raises(ValueError, match="grouping must be"):
        batch.jobs(asked, ["bottle"], grouping="all")


def test_each_job_has_the_variants_of_its_methods():
    asked = Parameters(profile="symmetry", variants=["symmetry_aware_tied", "symmetry_aware_no_gates"])
    graph = batch.jobs(asked, ["gear"], grouping="run")
    assert graph["07_quality.gear.dualanodiff.s0"].parameters.variants == []
    assert sorted(graph["07_quality.gear.symmetry_aware.s0"].parameters.variants) == sorted(asked.variants)
    made = {file.parts[-3] for file in batch.stage_files(graph["08_ablation.gear"])}
    assert made == {"crop_paste", "dualanodiff", "symmetry_aware", *asked.variants}
    assert batch.jobs(Parameters(profile="symmetry"), ["gear"])["08_ablation.gear"].parameters.variants is None


def test_nothing_is_trained_that_was_not_asked_for():
    for asked in (Parameters(profile="symmetry"), Parameters(profile="demo", methods=["adabldm", "dualanodiff"])):
        assert {job.notebook for job in batch.jobs(asked, ["gear"]).values()} == set(batch.NOTEBOOKS) - {"04_methods"}
    assert "04_methods" in batch.jobs(Parameters(profile="demo", methods=list(profiles.EXPLAINED)), ["gear"])


def test_a_batch_ends_with_the_notebook_that_is_asked_for():
    graph = batch.jobs(Parameters(profile="demo"), ["gear", "nut"], until="06_generation")
    assert set(graph) == {
        "01_data",
        *(f"{book}.{c}" for book in ("05_training", "06_generation") for c in ("gear", "nut")),
    }
    with pytest.raises(ValueError, match="no notebook 'generation'; there are: 01_data"):
        batch.jobs(Parameters(profile="demo"), ["gear"], until="generation")


def test_receipts_without_their_stage_files_are_withdrawn(tmp_path, monkeypatch):
    asked = Parameters(profile="smoke", methods=["crop_paste"], runs_root=str(tmp_path))
    graph = batch.jobs(asked, ["nut"])
    job = graph["05_training.nut"]
    (stage,) = batch.stage_files(job)
    stage.parent.mkdir(parents=True)
    stage.write_text("{}")
    receipt = asked.notebooks_folder() / f"{job.name}.json"
    monkeypatch.setattr(batch, "made_from", lambda parameters: "data and profile")
    content = {"parameters": job.parameters.model_dump(exclude_none=True), "stage_files": [str(stage)]}
    content["made_from"] = "data and profile"
    paths.write_text(receipt, json.dumps(content))
    report = receipt.with_name("report.json")
    report.write_text("{}")
    assert batch.withdraw_stale_receipts(graph) == [] and receipt.exists() and report.exists()
    other = batch.jobs(asked.model_copy(update={"seeds": [7]}), ["nut"])
    assert batch.withdraw_stale_receipts(other) == ["05_training.nut"] and not receipt.exists()
    assert not report.exists(), "else Snakemake would have nothing to do"
    paths.write_text(receipt, json.dumps(content))
    stage.unlink()
    assert batch.withdraw_stale_receipts(graph) == ["05_training.nut"]


def test_a_notebook_reads_the_profile_the_prompts_and_the_masks(tiny_mini, tiny_parameters, tmp_path, monkeypatch):
    root = shutil.copytree(tiny_mini, tmp_path / "mini")
    asked = tiny_parameters.model_copy(update={"data_root": str(root)})
    before = batch.made_from(asked)
    assert batch.made_from(asked) == before
    assert batch.made_from(asked.model_copy(update={"prompts": {"crack": "a wall that broke"}})) != before
    settings = asked.settings()
    more = settings.model_copy(update={"sample": settings.sample.model_copy(update={"n_per_defect": 5})})
    with monkeypatch.context() as changed:
        changed.setattr(Parameters, "settings", lambda self: more)
        assert batch.made_from(asked) != before
    mask = sorted((root / "brick" / "ground_truth" / "crack").glob("*.png"))[0]
    images.write_mask(mask, torch.ones(1, 64, 64, dtype=torch.bool).tril())
    study._category_rows.cache_clear()
    assert batch.made_from(asked) != before, "a corrected mask reaches the results"


def test_finished_is_what_is_newer_than_all_it_was_made_from(tmp_path):
    graph = batch.jobs(Parameters(profile="smoke", runs_root=str(tmp_path)), ["nut"])
    chain = ["01_data", "05_training.nut", "06_generation.nut"]
    files = [graph[name].parameters.notebooks_folder() / f"{name}.json" for name in chain]
    assert batch.finished(graph) == []
    for file in files:
        paths.write_text(file, json.dumps({"wall_s": 12.4}))
    assert batch.finished(graph) == chain
    assert batch.progress(graph, "05_training.nut") == "[3/9] 05_training.nut … 12 s"
    later = files[2].stat().st_mtime + 10
    os.utime(files[1], (later, later))
    assert batch.finished(graph) == chain[:2], "generation is older than the training it needs"
    files[0].unlink()
    assert batch.finished(graph) == [], "what needs a missing one is missing too"


def test_every_notebook_has_a_place_in_the_graph():
    assert sorted(batch.NOTEBOOKS) == sorted(f.stem for f in paths.NOTEBOOKS.glob("*.py"))
    order = list(batch.NOTEBOOKS)
    for name, (_, needs, _) in batch.NOTEBOOKS.items():
        assert all(order.index(need) < order.index(name) for need in needs)


def test_a_widget_leaves_no_state_in_an_executed_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    monkeypatch.setenv("DEFECTLIB_PROFILE", "smoke")  # which the call sets, for its kernel
    lines = [
        "# %%",
        "import ipywidgets",
        "ipywidgets.IntSlider()",
    ]
    (tmp_path / "book.py").write_text("\n".join(lines) + "\n")
    batch.execute_in_place("book", "smoke")
    book = json.loads((tmp_path / "book.ipynb").read_text())
    (output,) = book["cells"][0]["outputs"]
    assert "application/vnd.jupyter.widget-view+json" in output["data"]
    assert "widgets" not in book["metadata"] and "widget-state" not in json.dumps(book)
