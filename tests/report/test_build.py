"""The report of a batch: its own numbers and pictures, and what of it reaches ``figures/``, which is in git."""

import re

import pytest
import torch

from defectlib import batch, params, paths, profiles, study
from defectlib.report import ablation, build, claims, costs, figures, page_parts, tables

DEFAULT = params.Parameters(profile="demo")


@pytest.fixture
def figures_in_git(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "in_git")
    return tmp_path / "in_git"


def drawn(folder, *stems):
    for stem in stems:
        figures.save(figures.sheet([[torch.zeros(3, 8, 8)]]), folder, stem)


def reported(parameters):
    """The page of a batch over the first category, in whose folder an earlier batch left pictures."""
    s = study.open_category(parameters)
    folder = parameters.figures_folder()
    drawn(folder, f"kid_spread_{s.category}", f"kid_spread_big_{s.category}", "kid_spread_spoon", "confusion")
    values = {"parameters": parameters.model_dump(exclude_none=True), "categories": [s.category]}
    return s.category, build.report(values)


def test_the_page_shows_the_pictures_of_its_batch_only(tiny_parameters, figures_in_git):
    category, page = reported(tiny_parameters)
    assert re.findall(r'<figure id="(\w+)"', page.read_text()) == [f"kid_spread_{category}"]
    assert page.parent == tiny_parameters.dataset_folder() / "figures"
    assert {f"{name}.md" for name in tables.NAMES} | {"results.csv"} <= {file.name for file in page.parent.iterdir()}
    assert not figures_in_git.exists()


def test_the_shipped_batch_gives_its_pictures(tiny_parameters, figures_in_git, monkeypatch):
    monkeypatch.setattr(build, "is_shipped", lambda parameters, categories: True)
    category, page = reported(tiny_parameters)
    assert {file.name for file in figures_in_git.iterdir()} == {f"kid_spread_{category}.{x}" for x in ("pdf", "png")}
    assert all(file.read_bytes() == (page.parent / file.name).read_bytes() for file in figures_in_git.iterdir())


def test_three_seeds_of_the_whole_batch_give_their_tables(tiny_parameters, figures_in_git, monkeypatch):
    monkeypatch.setattr(build, "is_shipped", lambda parameters, categories: parameters.seeds is None)
    two, three = ({"seeds": seeds} for seeds in ([0, 1], build.SEEDS))
    for change, stems in ((two, set()), (three, {*tables.NAMES, "claims", "costs", "ablation"})):
        category = study.open_category(tiny_parameters).category
        parameters = tiny_parameters.model_copy(update=change)
        build.report({"parameters": parameters.model_dump(exclude_none=True), "categories": [category]})
        found = figures_in_git.iterdir() if figures_in_git.exists() else ()
        assert {file.stem for file in found} == stems


def test_only_the_whole_default_batch_on_mini_at_demo_is_shipped(monkeypatch):
    monkeypatch.setattr(build.prepare, "categories", lambda parameters: ["brick", "gear"])
    monkeypatch.setattr(paths, "RUNS", paths.ROOT / "runs")
    given = params.validate(DEFAULT.model_dump(exclude_none=True))
    assert build.is_shipped(given, ["brick", "gear"])
    assert not build.is_shipped(given, ["brick"]) and not build.is_shipped(given, ["brick", "gear", "nut"])
    assert build.ships_tables(params.validate({"profile": "demo", "seeds": [0, 1, 2]}), ["brick", "gear"])
    assert not build.ships_tables(given, ["brick", "gear"])
    for change in (
        {"profile": "smoke"}, {"dataset": "magnetic_tile"}, {"data_root": "x"}, {"split": "all_shots"}, {"seeds": [0]},
        {"methods": ["crop_paste"]}, {"tiles": "auto"}, {"grid": "full"}, {"runs_root": "x"}, {"figures_root": "x"},
    ):  # fmt: skip
        assert not build.is_shipped(given.model_copy(update=change), ["brick", "gear"]), change
    monkeypatch.setattr(paths, "RUNS", paths.ROOT / "elsewhere")
    assert not build.is_shipped(given, ["brick", "gear"])


def test_captions_name_the_pictures_that_the_notebooks_draw():
    """A picture without a caption would never be shown, and one whose name lacks the category could be another's."""
    units = {}
    for name, (unit, _, _) in batch.NOTEBOOKS.items():
        text = (paths.NOTEBOOKS / f"{name}.py").read_text()
        saved = re.findall(r'figures\.save(?:_data)?\(\w+, folder, f"(\w+)_\{(s\.category|c)\}"', text)
        assert len(saved) == text.count("figures.save"), name
        assert "tables.write" not in text, "the report alone writes tables"
        units |= {stem: "category" if of == "c" else unit for stem, of in saved}  # 01 goes through all
    assert set(units) == set(page_parts.CAPTIONS)
    assert {stem for stem, unit in units.items() if unit == "dataset"} == page_parts.OF_FIRST_CATEGORY
    text = (paths.NOTEBOOKS / "04_methods.py").read_text()
    drawn_by_04 = {stem for stem in units if f'folder, f"{stem}_{{s.category}}' in text}
    assert drawn_by_04 == page_parts.OF_EXPLAINED
    shown = page_parts.captions(["brick", "gear"], list(profiles.load("demo").methods))
    assert {"memorisation_brick", "confusion_brick", "confusion_gear"} < set(shown) and "memorisation_gear" not in shown
    assert len(shown) == len(units) + sum(unit != "dataset" for unit in units.values()), "all of two categories"


def test_the_page_shows_nothing_of_methods_that_were_not_asked_for():
    """Pictures of an earlier batch may lie in the same folder."""
    shown = {stem.removesuffix("_brick") for stem in page_parts.captions(["brick"], ["dualanodiff"])}
    assert {"dualanodiff_fig_4", "dualanodiff_fig_3_attention", "adabldm_composites", "overview"} < shown
    assert not shown & {"dualanodiff_pairs", "defectsynth_fusion", "adabldm_decoder", "symmetry_aware_gates"}
    shown_for = {
        name: page_parts.captions(["brick"], [name]) for name in ("dualanodiff", "symmetry_aware", "crop_paste")
    }
    assert [name for name, shown in shown_for.items() if "adapted_base_brick" in shown] == [
        "dualanodiff",
        "symmetry_aware",
    ]


def test_figures_in_git_are_those_the_report_copies():
    stem = re.compile(
        "|".join(
            [*tables.NAMES, claims.NAME, costs.NAME, ablation.NAME, *(rf"{name}_\w+" for name in page_parts.CAPTIONS)]
        )  # fmt: skip
    )
    others = {file.name for file in paths.FIGURES.iterdir() if not stem.fullmatch(file.stem)}
    folders = ("full", "symmetry", "longer", "multiclass")
    assert others == {"README.md", *folders}, "and, of other profiles, what figures/README tells of"
    both = [file for name in folders for file in (paths.FIGURES / name).iterdir()]
    assert both and all(stem.fullmatch(file.stem) or "symmetry_aware_" in file.stem for file in both)
