"""``python -m defectlib …``: reproduce, report, export, doctor, audit, and the single job that Snakemake starts."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn, get_args

from defectlib import params, paths, profiles
from defectlib.params import Parameters


def main(words: list[str] | None = None) -> None:
    """Entry point: bad input ends with one sentence and exit code 2, a failed run with 1."""
    arguments = parser().parse_args(words)
    try:
        sys.exit(arguments.run(arguments))
    except (ValueError, FileNotFoundError) as error:
        print(f"defectlib: {error}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        print(f"defectlib: {error}", file=sys.stderr)
        sys.exit(1)


class _Parser(argparse.ArgumentParser):
    """One sentence instead of argparse's usage lines; ``--help`` still prints them."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"defectlib: {message}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(prog="defectlib", description="Few-shot defect image generation, reproduced.")
    commands = top.add_subparsers(required=True, metavar="command")

    one = commands.add_parser("reproduce", help="run the notebooks on a data set, then the tables and figures")
    _data_options(one)
    one.add_argument("--grid", choices=["full"], help="all categories and defects, not only the profile's first ones")
    one.add_argument("--category", type=_names, help="comma-separated categories instead of the profile's first ones")
    explained = ", ".join(profiles.EXPLAINED)
    only = f"comma-separated methods instead of the profile's; 04_methods runs only with {explained} among them"
    one.add_argument("--methods", type=_names, help=only)
    one.add_argument("--variants", type=_some, help="variants of them instead of all: names, none, or claimed")
    one.add_argument("--seeds", type=_seeds, help="comma-separated seeds instead of the profile's")
    one.add_argument("--until", help="a notebook: it and those that it needs alone, for example 06_generation")
    one.add_argument("--grouping", choices=["category", "run"], default="category", help="what one job covers")
    one.add_argument("--cores", type=_cores, default=os.cpu_count(), help="jobs at a time on one machine")
    known = sorted(folder.name for folder in (paths.ROOT / "workflow" / "profiles").glob("*"))
    one.add_argument("--workflow-profile", choices=known, default="default", help="a folder of workflow/profiles")
    one.add_argument("--dry-run", action="store_true", help="print what would run")
    one.set_defaults(run=_reproduce)

    job = commands.add_parser("run-job", help="run one job of a batch (Snakemake calls this)")
    job.add_argument("job")
    job.add_argument("--batch", required=True, type=Path)
    job.set_defaults(run=_run_job)

    report = commands.add_parser("report", help="tables and report.html again, from the runs that are there")
    _data_options(report)
    report.add_argument("--batch", type=Path, help="batch.json; default: that of the last reproduce of this data set")
    report.add_argument("--receipt", type=Path)
    report.set_defaults(run=_report)

    book = commands.add_parser("notebooks", help="sync the notebooks with their text and execute them in place on mini")
    book.add_argument("--profile", default="demo")
    book.add_argument("names", nargs="*", help="for example 07_quality; default all")
    book.set_defaults(run=_notebooks)

    export = commands.add_parser("export", help="a run's samples in MVTec AD's layout, for other tools")
    _data_options(export)
    export.add_argument("--method", required=True, help="for example defectsynth, or a variant")
    export.add_argument("--seed", type=int, default=0)
    export.add_argument("--to", required=True, type=Path, help="a new folder")
    export.set_defaults(run=_export)

    audit = commands.add_parser("audit", help="what is wrong with a data folder; changes nothing")
    _data_options(audit)
    audit.set_defaults(run=_audit)

    leaks = commands.add_parser(
        "leaks", help="does a test set hold what was trained on? of a run, or of two lists of files"
    )
    leaks.add_argument("run_folder", nargs="?", type=Path, help="for example runs/demo/mini/brick/defectsynth/s0")
    leaks.add_argument("--train", type=Path, help="a folder of images, or a text file with a path a line")
    leaks.add_argument("--test", type=Path, help="the same, of what is tested on")
    leaks.add_argument("--data-root", type=Path, help="where the run's data set lies now; default: where it lay")
    leaks.set_defaults(run=_leaks)

    doctor = commands.add_parser("doctor", help="what is there, what is missing, and the command that gets it")
    doctor.set_defaults(run=_doctor)
    return top


def _data_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--profile", default="demo", help=", ".join(profiles.names()))
    sub.add_argument("--dataset", default="mini", help="mini, mvtec_ad, gdxray, magnetic_tile, ..., or folder")
    sub.add_argument("--data-root", help="where the data set lies; default data/<dataset>")
    sub.add_argument("--split", choices=get_args(profiles.SplitRule), help="default: the profile's")
    sub.add_argument(
        "--tiles", type=_tiles, help="side of square crops in px, or auto, or none; default: as the data set needs"
    )
    sub.add_argument("--foregrounds", help="a folder of your own masks of the objects, a .png an image; default: found")
    sub.add_argument("--runs", help="the runs folder; default runs/")
    sub.add_argument("--figures", help="where tables and figures go; default: beside the runs")


def _names(text: str) -> list[str]:
    names = [word.strip() for word in text.split(",") if word.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"'{text}' names nothing; give names with commas between them")
    return list(dict.fromkeys(names))


def _some(text: str) -> list[str]:
    return [] if text == "none" else _names(text)


def _seeds(text: str) -> list[int]:
    if wrong := [word for word in _names(text) if not word.isdecimal()]:
        raise argparse.ArgumentTypeError(f"'{wrong[0]}' is not a whole number from 0 up; give for example 0,1,2")
    return [int(word) for word in _names(text)]


def _cores(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 1 up")
    return int(text)


def _tiles(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parameters(a: argparse.Namespace, **more: Any) -> Parameters:
    values = {
        "profile": a.profile, "dataset": a.dataset, "data_root": a.data_root and str(Path(a.data_root).resolve()),
        "split": a.split, "tiles": a.tiles, "runs_root": a.runs and str(Path(a.runs).resolve()),
        "foregrounds": a.foregrounds and str(Path(a.foregrounds).resolve()),
        "figures_root": a.figures and str(Path(a.figures).resolve()), **more,
    }  # fmt: skip
    return params.validate({name: value for name, value in values.items() if value is not None}, "command line")


def _reproduce(a: argparse.Namespace) -> int:
    from defectlib import batch, prepare, study
    from defectlib.methods import base

    variants = _claimed(a) if a.variants == ["claimed"] else a.variants
    parameters = _parameters(a, methods=a.methods, variants=variants, seeds=a.seeds, grid=a.grid)
    for name in parameters.methods or []:
        base.get(name)
    study.require_weights(parameters)
    chosen = a.category or prepare.categories(parameters)
    for category in chosen:
        study.open_category(parameters.model_copy(update={"category": category}))
    values = {
        "parameters": parameters.model_dump(exclude_none=True), "categories": chosen, "grouping": a.grouping,
        "until": a.until,
    }  # fmt: skip
    words = ["--workflow-profile", str(paths.ROOT / "workflow" / "profiles" / a.workflow_profile)]
    words += ["--cores", str(a.cores)] if a.workflow_profile == "default" else []
    batch.reproduce(values, words + (["--executor", "dryrun", "--quiet", "host"] if a.dry_run else []))
    return 0


def _claimed(a: argparse.Namespace) -> list[str]:
    """The variants of these methods that the papers' claims compare."""
    from defectlib.published import claims

    settings, compared = profiles.load(a.profile), claims.systems()
    return [name for name in settings.variants_of(settings.asked(a.methods)) if name in compared]


def _run_job(a: argparse.Namespace) -> int:
    from defectlib import batch

    values = json.loads(a.batch.read_text())
    parameters = params.validate(values["parameters"])
    graph = batch.jobs(parameters, values["categories"], values["grouping"], values["until"])
    batch.run_job(graph[a.job])
    print(batch.progress(graph, a.job))
    return 0


def _report(a: argparse.Namespace) -> int:
    from defectlib.report import build

    batch = a.batch or _parameters(a).dataset_folder() / "batch.json"
    if not batch.is_file():
        raise FileNotFoundError(f"{batch} is missing: nothing was run for this data set yet; make reproduce")
    page = build.report(json.loads(batch.read_text()))
    print(page)
    if a.receipt:
        paths.write_text(a.receipt, json.dumps({"page": str(page)}))
    return 0


def _notebooks(a: argparse.Namespace) -> int:
    from defectlib import batch

    if unknown := [name for name in a.names if name not in batch.NOTEBOOKS]:
        raise ValueError(f"there is no notebook '{unknown[0]}'; there are: {', '.join(batch.NOTEBOOKS)}")
    for name in a.names or batch.NOTEBOOKS:
        print(name, f"{batch.execute_in_place(name, a.profile):.0f} s", flush=True)
    return 0


def _export(a: argparse.Namespace) -> int:
    from defectlib.export import export

    print(export(_parameters(a), a.method, a.seed, a.to).to_string(index=False))
    return 0


def _audit(a: argparse.Namespace) -> int:
    from defectlib import prepare
    from defectlib.data import audit

    parameters = _parameters(a)
    root = prepare.data_root(parameters)
    found = audit.audit(parameters.dataset, root)
    print(f"{parameters.dataset} in {root}: {len(found)} findings")
    if len(found):
        print(found.to_string(index=False))
    return 1 if audit.spoils(found) else 0


def _leaks(a: argparse.Namespace) -> int:
    from defectlib import leaks

    if bool(a.run_folder) == bool(a.train or a.test) or bool(a.train) != bool(a.test):
        raise ValueError("name a run's folder, or give both --train and --test")
    if a.run_folder:
        found, counts = leaks.of_run(a.run_folder, a.data_root)
    else:
        train, test = leaks.listed(a.train), leaks.listed(a.test)
        found, counts = leaks.between(train, test), {"training files": len(train), "test files": len(test)}
    print(f"{', '.join(f'{n} {what}' for what, n in counts.items())}: {len(found)} findings")
    if len(found):
        print(found.round({"likeness": 3}).to_string(index=False))
    if (found["found"] == leaks.NAME).any():
        print(f"{leaks.NAME}: file and folder are called alike, as in many data sets; by itself it is no leak")
    return 1 if leaks.spoils(found) else 0


def _doctor(_: argparse.Namespace) -> int:
    from defectlib import doctor

    print(doctor.page())
    return 0
