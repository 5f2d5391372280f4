"""The only place that knows folders. The root is found from this file, never from the working directory."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(os.environ.get("DEFECTLIB_ROOT", Path(__file__).resolve().parents[1]))
PARAMS = ROOT / "papermill_params"
NOTEBOOKS = ROOT / "notebooks"
RUNS = Path(os.environ.get("DEFECTLIB_RUNS", ROOT / "runs"))
FIGURES = ROOT / "figures"
DATA = Path(os.environ.get("DEFECTLIB_DATA", ROOT / "data"))
WEIGHTS = Path(os.environ.get("DEFECTLIB_WEIGHTS", ROOT / "weights"))
