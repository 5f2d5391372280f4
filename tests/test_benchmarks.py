"""Benchmarks are run by hand (`make bench`); here they are only imported, so that a renamed part is seen."""

import importlib.util

import pytest

from defectlib import paths


@pytest.mark.parametrize("file", sorted((paths.ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_a_benchmark_finds_what_it_imports(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))  # as python does for the file that it runs
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main) and module.__doc__
