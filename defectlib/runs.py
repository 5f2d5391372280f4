"""Run folders, stage files, provenance, and :func:`collect`.

``runs/<profile>/<dataset>/<category>/<method>/s<seed>/`` holds what one run made and one ``<stage>.json`` a stage. A
stage file is written last, by atomic rename: it exists, so that stage is complete. Its ``key`` is a hash of the stage's
parameters and of the stages it was made from; a stage whose key no longer matches is moved to ``superseded/``, never
deleted, and made anew. Beside the methods' folders ``adapted_base/`` keeps base models adapted to the category.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from defectlib import paths

SCHEMA = 1
STAGES = ("fit", "sample", "quality", "downstream", "checkpoints", "learning_curve")
ARTEFACTS = {
    "fit": ("model",),
    "sample": ("images", "masks", "parts", "samples.csv"),
    "quality": (),
    "downstream": ("predictions",),
    "checkpoints": (),
    "learning_curve": ("curve",),
}
CODE = ("defectlib", "papermill_params", "workflow", "pyproject.toml", "requirements.lock")
PACKAGES = (
    "torch", "torchvision", "diffusers", "peft", "transformers", "accelerate", "torch-fidelity", "lpips",
    "segmentation-models-pytorch", "scikit-learn", "scikit-image", "scipy", "numpy", "pandas", "papermill",
)  # fmt: skip
COLUMNS = (
    "profile", "split", "dataset", "category", "method", "seed", "stage", "defect", "metric", "value", "sd", "protocol",
    "extractor", "n_real", "n_generated", "git_sha", "dirty", "wall_s", "peak_memory_mb", "device",
    "path",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """One (dataset, category, method, seed) of a profile, on disk."""

    path: Path

    @property
    def model(self) -> Path:
        """Fitted weights: safetensors and JSON only."""
        return self.path / "model"

    def stage_file(self, stage: str) -> Path:
        """The file whose presence means that ``stage`` is complete."""
        return self.path / f"{stage}.json"

    def record(self, stage: str) -> dict[str, Any] | None:
        """The stage file's content, or None where the stage has not been completed."""
        file = self.stage_file(stage)
        return json.loads(file.read_text()) if file.is_file() else None

    def complete(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record of ``stage`` if it was made with this key, else None."""
        record = self.record(stage)
        return record if record is not None and record["key"] == key else None

    def supersede(self, stage: str, key: str) -> None:
        """Move a stage made (or begun) with another key aside, with all that was made from it.

        What a stage makes over time is marked by ``.<stage>.key``, so that a half-made stage of other parameters is not
        continued.
        """
        mark = self.path / f".{stage}.key"
        record = self.record(stage)
        begun = record["key"] if record else mark.read_text() if mark.is_file() else key
        if begun != key:
            aside = self.path / "superseded" / f"{time.strftime('%Y%m%d-%H%M%S')}-{begun[:8]}"
            aside.mkdir(parents=True, exist_ok=True)
            # From quality on, none is made from files of another: a key that changed is seen by whoever used it.
            for later in [stage] if stage in STAGES[2:] else STAGES[STAGES.index(stage) :]:
                for name in (f"{later}.json", f".{later}.key", *ARTEFACTS[later]):
                    if (self.path / name).exists():
                        shutil.move(self.path / name, aside / name)
            print(
                f"parameters changed: the earlier {stage} of {self.path} is kept in {aside.name}",
                file=sys.stderr,
            )
        paths.write_text(mark, key)


def stage_key(parameters: dict[str, Any], upstream: list[str]) -> str:
    """sha256 over a stage's parameters and the keys of the stages it is made from."""
    text = json.dumps([SCHEMA, parameters, upstream], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def git_state() -> tuple[str, bool]:
    """(commit, dirty): dirty where what runs differs from it or is new; ("unknown", True) outside a repository.

    Looked at are :data:`CODE` and the notebooks' text; results, which a run rewrites, and a user's own files are none.
    """

    def git(*words: str) -> str:
        call = subprocess.run(["git", "-C", str(paths.ROOT), *words], capture_output=True, text=True, check=True)
        return call.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=normal", "--", *CODE, "notebooks/*.py")
        return git("rev-parse", "HEAD"), bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def stopwatch() -> tuple[str, Callable[[], float]]:
    """What time is told by, and its seconds since now.

    "cpu": of this process, where it computes on one thread of a processor, so that jobs beside it do not count; else
    "wall": the clock's, after the accelerator has come to an end where there is one.
    """
    import torch

    def wall() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    name, read = ("cpu", time.process_time) if alone else ("wall", wall)
    start = read()
    return name, lambda: read() - start


def device_name() -> str:
    """The accelerator's name, or the processor's architecture and the threads torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()}, {torch.get_num_threads()} thread(s)"


def provenance() -> dict[str, Any]:
    """The birth certificate's part that does not depend on the run: code, packages, machine."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit, dirty = git_state()
    return {
        "git_sha": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "versions": versions,
        "device": device_name(),
    }


@contextlib.contextmanager
def stage(
    folder: RunFolder,
    name: str,
    key: str,
    identity: dict[str, Any],
    parameters: dict[str, Any],
    inputs: dict[str, str],
) -> Iterator[list[dict[str, Any]]]:
    """Run one stage: yields the list to put metric rows in, and writes the stage file when the block ends well.

    The resolved parameters go to ``params.json`` before any work.

    Args:
        folder: Where the run lives.
        name: One of ``STAGES``.
        key: From :func:`stage_key`.
        identity: profile, split, dataset, category, method and seed.
        parameters: The resolved parameters of this stage.
        inputs: Keys of what the stage was made from: the split's sha256, or the stage before it.

    A metric row is ``{"metric", "value", "sd", "defect", "protocol"}``; ``sd`` and ``defect`` may be missing.
    """
    folder.supersede(name, key)
    resolved = folder.path / "params.json"
    with paths.locked(folder.path / ".params.lock"):  # stages of one run may be made side by side
        known = json.loads(resolved.read_text()) if resolved.is_file() else {}
        paths.write_text(resolved, json.dumps(known | {name: parameters}, indent=1))
    metrics: list[dict[str, Any]] = []
    _forget_peak_memory()
    started, clock = time.strftime("%Y-%m-%dT%H:%M:%S%z"), time.perf_counter()
    yield metrics
    record = {
        "schema": SCHEMA, "stage": name, "key": key, **identity, "parameters": parameters, "inputs": inputs,
        "metrics": metrics, "started": started, "wall_s": round(time.perf_counter() - clock, 3),
        "peak_memory_mb": peak_memory_mb(), **provenance(),
    }  # fmt: skip
    paths.write_text(folder.stage_file(name), json.dumps(record, indent=1))


def alone(make: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A stage, (study, method, seed) to its record, never made by two processes of a machine at once.

    Two notebooks may ask for one fit, and jobs of many methods for the row of the shots: the later one reads what is
    there then. A stage waits only for those that it is made from, so two cannot wait for each other.
    """

    @functools.wraps(make)
    def waiting(s: Any, method: str, seed: int) -> dict[str, Any]:
        with paths.locked(s.folder(method, seed).path / f".{make.__name__}.lock"):
            return make(s, method, seed)

    return waiting


def _forget_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb(of: int = resource.RUSAGE_SELF) -> int:
    """Peak memory: on the GPU where there is one, of this stage; else what this process held at most so far.

    Args:
        of: ``resource.RUSAGE_CHILDREN`` asks for the largest child that has ended, in the machine's memory.
    """
    import torch

    if of == resource.RUSAGE_SELF and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(of).ru_maxrss * unit // 2**20


def collect(root: Path | str | None = None, profile: str | None = None, dataset: str | None = None) -> pd.DataFrame:
    """All completed stages under ``root`` as one long frame: a row a number, the columns are ``COLUMNS``.

    Args:
        root: The runs folder; default ``runs/``.
        profile: Keep the runs of this profile only (whatever their split), and only where they were made: a copy in
            another profile's folder would count twice.
        dataset: Keep the runs of this data set only.
    """
    rows = []
    root = Path(root or paths.RUNS)
    for file in sorted(root.glob(f"{profile or '*'}/{dataset or '*'}/*/*/s[0-9]*/*.json")):
        if file.stem not in STAGES:
            continue
        record = json.loads(file.read_text())
        if profile not in (None, record["profile"]) or dataset not in (None, record["dataset"]):
            continue
        common = {name: record[name] for name in COLUMNS if name in record}
        for metric in record["metrics"]:
            protocol = metric.get("protocol", {})
            rows.append({
                **common, "defect": metric.get("defect", ""), "metric": metric["metric"], "value": metric["value"],
                "sd": metric.get("sd"), "protocol": json.dumps(protocol, sort_keys=True),
                "extractor": protocol.get("extractor", ""), "n_real": protocol.get("n_real"),
                "n_generated": protocol.get("n_generated"), "path": os.path.relpath(file, root),
            })  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    numeric = ["value", "sd", "n_real", "n_generated", "wall_s", "peak_memory_mb"]
    frame[numeric] = frame[numeric].apply(pd.to_numeric)
    return frame


def collect_parquet(root: Path | str, target: Path | str) -> pd.DataFrame:
    """Write :func:`collect` of ``root`` as one Parquet file for pandas or DuckDB, and return it."""
    frame = collect(root)
    paths.write_bytes(target, frame.to_parquet(index=False))
    return frame
