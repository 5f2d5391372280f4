"""Strict papermill runs: one process a notebook, typed parameters, a receipt written last.

papermill alone warns about unknown parameters, marks the cells of a dead kernel as completed, and takes ``sys.exit(0)``
for success. Here an unknown parameter is refused before the kernel starts, every code cell must have run, and the stage
files that the notebook promises must exist; only then is the receipt written that Snakemake waits for.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defectlib import params, paths, profiles, runs
from defectlib.params import Parameters

# notebook -> (unit of one run, the notebooks it needs, the stage it completes); each stands after those it needs
NOTEBOOKS = {
    "01_data": ("dataset", (), None),
    "02_masks": ("category", ("01_data",), None),
    "03_backbone": ("dataset", ("01_data",), None),
    "05_training": ("run", ("01_data",), "fit"),
    "04_methods": ("dataset", ("05_training",), None),
    "06_generation": ("run", ("05_training",), "sample"),
    "07_quality": ("run", ("06_generation",), "quality"),
    "08_ablation": ("category", ("07_quality",), "quality"),
    "09_downstream": ("run", ("06_generation",), "downstream"),
}
COORDINATOR = "DEFECTLIB_COORDINATOR"
CELL_TIMEOUT_S = 14 * 24 * 3600
# Kernels are reached over TCP ports; unencrypted, they warn in every log. When the last cell is done there is nothing
# left to end gently, and the interrupt that comes with it is sometimes logged as an error.
KERNELS = {
    "KernelManager": {"transport_encryption": "auto"},
    "NotebookClient": {"shutdown_kernel": "immediate"},
}


@dataclass(frozen=True)
class Job:
    """One papermill run: a notebook and its full parameters; ``needs`` are names of jobs."""

    name: str
    notebook: str
    parameters: Parameters
    needs: tuple[str, ...]


def jobs(
    parameters: Parameters, categories: list[str], grouping: str = "category", until: str | None = None
) -> dict[str, Job]:
    """The run graph over data set x category x method x seed; with 04_methods if all that it trains is asked for.

    Args:
        parameters: What all jobs share; ``methods`` and ``seeds`` default to the profile's.
        categories: The categories to cover.
        grouping: "category": one kernel serves all methods and seeds of a category (one machine, where imports cost
            10 s a kernel); "run": one job a method and seed (a cluster).
        until: A notebook: it and those that it needs alone; None is all.

    Raises:
        ValueError: There is no such grouping or notebook.
    """
    settings = parameters.settings()
    methods = settings.asked(parameters.methods)
    seeds = parameters.seeds or settings.seeds
    groups = {"": (methods, seeds)}
    if grouping == "run":
        groups = {f".{m}.s{s}": ([m], [s]) for m in methods for s in seeds}
    elif grouping != "category":
        raise ValueError(f"grouping must be 'category' or 'run', got '{grouping}'")
    wanted = set(NOTEBOOKS) if until is None else _with_needs(until)
    graph: dict[str, Job] = {}
    by_scope: dict[tuple[str, str, str], str] = {}

    def add(notebook: str, category: str, group: str, values: dict[str, Any]) -> None:
        name = ".".join(part for part in (notebook, category) if part) + group
        needs = tuple(
            found
            for (need, of, part), found in by_scope.items()
            if need in NOTEBOOKS[notebook][1] and of in ("", values["category"]) and (part in ("", group) or not group)
        )
        if parameters.variants is not None:
            values = values | {"variants": settings.variants_of(values["methods"])}
        shared = parameters.model_dump(exclude_none=True)
        graph[name] = Job(name, notebook, params.validate({**shared, **values}, name), needs)
        by_scope[notebook, category, group] = name

    for notebook, (unit, _, _) in NOTEBOOKS.items():
        if notebook not in wanted or (notebook == "04_methods" and not profiles.explains(methods)):
            continue
        if unit == "dataset":
            add(notebook, "", "", {"category": categories[0], "methods": methods, "seeds": seeds})
            continue
        for category in categories:
            for group, (some, few) in groups.items() if unit == "run" else [("", (methods, seeds))]:
                add(notebook, category, group, {"category": category, "methods": some, "seeds": few})
    return graph


def _with_needs(notebook: str) -> set[str]:
    """A notebook and all that it needs."""
    if notebook not in NOTEBOOKS:
        raise ValueError(f"there is no notebook '{notebook}'; there are: {', '.join(NOTEBOOKS)}")
    return {notebook}.union(*map(_with_needs, NOTEBOOKS[notebook][1]))


def watch_coordinator() -> None:
    """End this process when the one that started the batch is gone, so that a killed batch leaves nothing running."""
    host, _, pid = os.environ.get(COORDINATOR, "").partition(":")
    if not pid or host != socket.gethostname():
        return

    def watch() -> None:
        while True:
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                os._exit(137)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()


def notebook_parameters(notebook: Path) -> set[str]:
    """The names in a notebook's cell tagged ``parameters``; ValueError if there is not exactly one such cell."""
    import ast

    cells = json.loads(notebook.read_text())["cells"]
    tagged = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook} has {len(tagged)} cells tagged 'parameters'; it must have exactly one")
    tree = ast.parse("".join(tagged[0]["source"]))
    return {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}


def check_pairs() -> None:
    """ValueError if a notebook differs from its text half: what would run is not what is reviewed."""
    import jupytext

    for name in NOTEBOOKS:
        text, book = (paths.NOTEBOOKS / f"{name}.{suffix}" for suffix in ("py", "ipynb"))
        halves = [
            [(c.cell_type, c.source, c.metadata.get("tags")) for c in jupytext.read(f).cells] for f in (text, book)
        ]
        if halves[0] != halves[1]:
            raise ValueError(f"{book} is not in step with {text.name}: jupytext --sync {text}, or make notebooks")


def execute(notebook: Path, output: Path, parameters: Parameters) -> None:
    """Execute one notebook by papermill and make sure that it ran to its end.

    Raises:
        ValueError: A parameter is unknown to the notebook (before the kernel starts).
        RuntimeError: A cell failed, the kernel died, or cells were left out; the sentence names the executed notebook.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    values = parameters.model_dump(exclude_none=True)
    unknown = set(values) - notebook_parameters(notebook)
    if unknown:
        raise ValueError(f"{notebook} has no parameter {', '.join(sorted(unknown))}: add it to its parameters cell")
    output.parent.mkdir(parents=True, exist_ok=True)
    threads = str(parameters.settings().threads)
    os.environ.update(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, DEFECTLIB_BATCH="1")
    try:
        papermill.execute_notebook(
            str(notebook), str(output), parameters=values, kernel_name="python3", progress_bar=False,
            cwd=str(paths.ROOT), execution_timeout=CELL_TIMEOUT_S, autosave_cell_every=300,
            config=Config(KERNELS),
        )  # fmt: skip
    except PapermillExecutionError as error:
        message = f"{notebook.name} failed in cell {error.exec_count}: {error.ename}: {error.evalue} (see {output})"
        raise RuntimeError(message) from error
    except DeadKernelError as error:
        raise RuntimeError(f"the kernel of {notebook.name} died (killed, or out of memory); see {output}") from error
    except CellTimeoutError as error:
        raise RuntimeError(f"a cell of {notebook.name} ran longer than {CELL_TIMEOUT_S} s; see {output}") from error
    cells = [c for c in json.loads(output.read_text())["cells"] if c["cell_type"] == "code" and c["source"]]
    left = [i for i, cell in enumerate(cells) if cell["execution_count"] is None]
    if left:
        raise RuntimeError(f"{notebook.name} stopped before its code cell {left[0] + 1} of {len(cells)}; see {output}")


def execute_in_place(name: str, profile: str) -> float:
    """Bring ``notebooks/<name>.ipynb`` in step with its text and execute it where it lies; returns seconds.

    papermill is not used: its injected cell would break the pair.
    """
    import jupytext
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    clock = time.perf_counter()
    text = paths.NOTEBOOKS / f"{name}.py"
    notebook = jupytext.read(text)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{name[:2]}-{i:02d}"
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    threads = str(profiles.load(profile).threads)
    os.environ.update(
        DEFECTLIB_PROFILE=profile, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads, DEFECTLIB_BATCH="1"
    )  # fmt: skip
    where = {"metadata": {"path": str(paths.ROOT)}}
    NotebookClient(notebook, timeout=CELL_TIMEOUT_S, resources=where, config=Config(KERNELS)).execute()
    # Dropped afterwards: told to store none, nbclient 0.11 fails on what a widget shows at its start.
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["language_info"] = {"name": "python"}
    paths.write_text(text.with_suffix(".ipynb"), nbformat.writes(notebook) + "\n")
    return time.perf_counter() - clock


def made_from(parameters: Parameters) -> str:
    """sha256 over what a notebook reads besides its parameters: profile, prompts, the split's files, the base model."""
    from defectlib import backbone, study  # imports torch, which the run graph must not wait for

    s = study.open_category(parameters)
    base = backbone.digest(s.settings.backbone)
    read = [s.settings.model_dump(), s.prompts(), [s.data_key(seed) for seed in s.seeds], base]
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def run_job(job: Job) -> Path:
    """Execute a job, check what it promised, and write its receipt; returns the receipt."""
    watch_coordinator()
    read = made_from(job.parameters)
    folder = job.parameters.notebooks_folder()
    executed = folder / f"{job.name}.ipynb"
    clock = time.perf_counter()
    execute(paths.NOTEBOOKS / f"{job.notebook}.ipynb", executed, job.parameters)
    promised = [str(file) for file in stage_files(job)]
    missing = [file for file in promised if not Path(file).is_file()]
    if missing:
        raise RuntimeError(f"{job.name} ended without {missing[0]}; see {executed}")
    receipt = folder / f"{job.name}.json"
    content = {
        "job": job.name, "parameters": job.parameters.model_dump(exclude_none=True), "stage_files": promised,
        "made_from": read, "wall_s": round(time.perf_counter() - clock, 1), "git": runs.git_state()[0],
        "peak_memory_mb": runs.peak_memory_mb(resource.RUSAGE_CHILDREN), "device": runs.device_name(),
    }  # fmt: skip
    paths.write_text(receipt, json.dumps(content, indent=1))
    return receipt


def stage_files(job: Job) -> list[Path]:
    """The stage files a notebook run over one category must leave behind: the ablation's are its variants' too."""
    stage, asked = NOTEBOOKS[job.notebook][2], job.parameters
    if stage is None:
        return []
    names = list(asked.methods)
    if job.notebook == "08_ablation":
        settings = asked.settings()  # what only some categories have cannot be promised
        names += [name for name in settings.variants_of(asked.methods) if settings.variants[name].everywhere]
    folder = asked.dataset_folder() / asked.category
    return [folder / name / f"s{seed}" / f"{stage}.json" for name in names for seed in asked.seeds]


def withdraw_stale_receipts(graph: dict[str, Job]) -> list[str]:
    """Remove receipts whose stage files are gone, or whose parameters, profile, prompts or data were others.

    The report's goes with them: while it lies there, Snakemake does not ask for what it was made from.

    Returns:
        The names of their jobs.
    """
    stale = []
    for job in graph.values():
        receipt = job.parameters.notebooks_folder() / f"{job.name}.json"
        if not receipt.is_file():
            continue
        content = json.loads(receipt.read_text())
        same = content["parameters"] == job.parameters.model_dump(exclude_none=True)
        same = same and content.get("made_from") == made_from(job.parameters)
        if not same or not all(Path(file).is_file() for file in content["stage_files"]):
            receipt.unlink()
            (receipt.parent / "report.json").unlink(missing_ok=True)
            stale.append(job.name)
    return stale


def finished(graph: dict[str, Job]) -> list[str]:
    """The names of the jobs that Snakemake would not repeat: their receipts are newer than what they were made from."""
    times: dict[str, int] = {}
    for job in graph.values():  # each stands after those it needs
        receipt, text = job.parameters.notebooks_folder() / f"{job.name}.json", paths.NOTEBOOKS / f"{job.notebook}.py"
        if receipt.is_file() and all(need in times for need in job.needs):
            made = receipt.stat().st_mtime_ns
            if made >= max([text.stat().st_mtime_ns, *(times[need] for need in job.needs)]):
                times[job.name] = made
    return list(times)


def progress(graph: dict[str, Job], name: str) -> str:
    """The line that a finished job shows: how many are finished, its name and its seconds."""
    receipt = graph[name].parameters.notebooks_folder() / f"{name}.json"
    return f"[{len(finished(graph))}/{len(graph)}] {name} … {json.loads(receipt.read_text())['wall_s']:.0f} s"


def snakemake(values: dict[str, Any], folder: Path, words: list[str]) -> list[str]:
    """The command line that runs ``workflow/Snakefile`` with these configuration values in ``folder``."""
    config = folder / "batch.json"
    paths.write_text(config, json.dumps(values, indent=1))
    return [
        sys.executable, "-m", "snakemake", "--snakefile", str(paths.ROOT / "workflow" / "Snakefile"),
        "--configfile", str(config), "--directory", str(folder), *words,
    ]  # fmt: skip


def reproduce(values: dict[str, Any], words: list[str]) -> None:
    """Run the whole graph by Snakemake under a lock of our own; this process becomes Snakemake's.

    ``kill -9`` leaves Snakemake's own lock behind; since ours is dropped by the kernel with its last holder, holding it
    means that any other lock is stale, so it is cleared.
    """
    import fcntl

    check_pairs()
    parameters = params.validate(values["parameters"])
    graph = jobs(parameters, values["categories"], values["grouping"], values["until"])
    folder = parameters.dataset_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".reproduce.lock", os.O_RDWR | os.O_CREAT)
    for attempt in range(15):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == 14:
                holder = os.pread(lock, 32, 0).decode().strip()
                raise RuntimeError(f"process {holder} is already working in {folder}: wait for it or stop it") from None
            time.sleep(1)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    os.set_inheritable(lock, True)
    if "04_methods" not in graph and values["until"] in (None, "04_methods"):
        print(
            f"without 04_methods, which trains {', '.join(profiles.EXPLAINED)}: not all of them are asked for",
            flush=True,
        )
    stale = withdraw_stale_receipts(graph)
    if stale:
        print("to be made again:", ", ".join(stale), flush=True)
    if done := finished(graph):
        print(f"continuing: {len(done)} of {len(graph)} done", flush=True)
    command = snakemake(values, folder, words)
    if any((folder / ".snakemake" / "locks").glob("*")):
        subprocess.run([*command, "--unlock", "--cores", "1", "--quiet", "all"], check=True, stderr=subprocess.DEVNULL)
    os.environ[COORDINATOR] = f"{socket.gethostname()}:{os.getpid()}"
    os.execv(command[0], command)
