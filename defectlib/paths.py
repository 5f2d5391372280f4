"""The only place that knows folders, and how a file is written. The root is found from this file, not the cwd."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(os.environ.get("DEFECTLIB_ROOT", Path(__file__).resolve().parents[1]))
PARAMS = ROOT / "papermill_params"
NOTEBOOKS = ROOT / "notebooks"
RUNS = Path(os.environ.get("DEFECTLIB_RUNS", ROOT / "runs"))
FIGURES = ROOT / "figures"
DATA = Path(os.environ.get("DEFECTLIB_DATA", ROOT / "data"))
WEIGHTS = Path(os.environ.get("DEFECTLIB_WEIGHTS", ROOT / "weights"))


def write_text(path: Path | str, text: str) -> None:
    """Write a text file by atomic rename: readers see the old file or the whole new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path | str, content: bytes) -> None:
    """Write a file by atomic rename, creating its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def remove(folder: Path) -> None:
    """Remove a folder, if it is there: out of sight in one step, so that a killed removal leaves no half of it."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (created if missing); the kernel drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path | str) -> str:
    """Hex sha256 of a file's bytes; read once while the file's size and time of change stay the same."""
    status = os.stat(path)
    return _sha256(Path(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, _size: int, _changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
