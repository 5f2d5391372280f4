"""One page on what is here and what is missing, each with the exact command or step that gets it."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from packaging.requirements import Requirement

from defectlib import backbone, paths, profiles, runs
from defectlib.data import layouts
from defectlib.masks import saliency
from defectlib.metrics import files


def page() -> str:
    """The whole page as text."""
    parts = [_machine(), _packages(), _profiles(), _base_models(), _weights(), _data()]
    return "\n\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in parts)


def _machine() -> tuple[str, list[str]]:
    commit, dirty = runs.git_state()
    return "Machine", [
        f"python      {platform.python_version()} ({platform.system()} {platform.machine()})",
        f"device      {runs.device_name()}",
        f"code        {commit[:12]}{' with uncommitted changes' if dirty else ''} in {paths.ROOT}",
    ]


def _packages() -> tuple[str, list[str]]:
    """Installed against locked versions."""
    locked = locked_versions((paths.ROOT / "requirements.lock").read_text())
    lines = []
    for name in runs.PACKAGES:
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name:28} MISSING: make env")
            continue
        same = here.split("+")[0] == locked.get(name, here)
        lines.append(f"{name:28} {here}{'' if same else f'  (locked: {locked[name]}; make env)'}")
    return "Packages", lines


def locked_versions(text: str) -> dict[str, str]:
    """Name -> version of a lock file's pins, of those whose marker holds for the Python that runs."""
    pins = [
        Requirement(line.removesuffix("\\"))
        for line in text.splitlines()
        if "==" in line and not line.startswith((" ", "#"))
    ]
    return {
        pin.name: str(pin.specifier).removeprefix("==") for pin in pins if pin.marker is None or pin.marker.evaluate()
    }


def _profiles() -> tuple[str, list[str]]:
    return "Profiles", [
        f"{name:16} {s.data.image_size} px, {', '.join(s.asked(None))}; needs {', '.join([s.backbone, *s.weights()])}"
        for name in profiles.names()
        for s in (profiles.load(name),)
    ]


def _base_models() -> tuple[str, list[str]]:
    """``DEFECTLIB_SD15`` may name another folder for Stable Diffusion 1.5."""
    return "Base models", [
        f"{name:10} {backbone.problem(name) or f'present: {backbone.folder_of(name)}'}" for name in backbone.known()
    ]


def _weights() -> tuple[str, list[str]]:
    return "Weights", [
        f"{name:10} {'present: ' + str(where) if present else 'missing: ' + how}"
        for name, (present, where, how) in sorted(files.available().items())
    ] + [f"{'u2net':10} {saliency.problem() or 'present: ' + str(paths.WEIGHTS / saliency.FILE)} (optional)"]


def _data() -> tuple[str, list[str]]:
    lines = []
    for name, spec in layouts.DATASETS.items():
        root = Path(paths.DATA / name)
        if name == "mini":
            lines.append(f"{name:14} built in; made at first use in {root}")
        elif name == "folder":
            lines.append(f"{name:14} any folder in MVTec AD's layout: make reproduce DATASET=folder DATA_ROOT=...")
        else:
            lines.append(f"{name:14} {'present: ' + str(root) if root.is_dir() else 'missing: ' + spec.obtain}")
    return "Data sets", lines
