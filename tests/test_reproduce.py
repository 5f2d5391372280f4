"""The README's first command in reduced form: notebooks under Snakemake, killed in the middle, started again."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from defectlib import batch, evaluation, params, paths, stages, study
from defectlib.runs import RunFolder

FAST = ["--profile", "smoke", "--cores", "2"]


def command(tmp_path, *words):
    return [sys.executable, "-m", "defectlib", "reproduce", *FAST, "--runs", str(tmp_path / "runs"), *words]


def receipts(folder):
    return {f.stem: f.stat().st_mtime_ns for f in (folder / "notebooks").glob("*.json")}


def wait_for(condition, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.2)


def test_a_killed_batch_goes_on_where_it_stopped(tiny_mini, tmp_path):
    folder = tmp_path / "runs" / "smoke" / "folder"
    root, category = tmp_path / "my parts", "metal nut"
    shutil.copytree(min(p for p in tiny_mini.iterdir() if p.is_dir()), root / category)
    # Without the learned methods' many variants, which nbval runs: a killed fit has tests of its own.
    words = command(
        tmp_path, "--dataset", "folder", "--data-root", str(root), "--category", category, "--methods", "crop_paste"
    )
    first = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any(name.startswith(("03", "05")) for name in receipts(folder)) or first.poll() is not None)
    assert first.poll() is None, "still at work"
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    done = receipts(folder)
    asked = set(batch.NOTEBOOKS) - {"04_methods"}  # it would train what was not asked for
    assert 0 < len(done) < len(asked), "killed in the middle"
    again = subprocess.run(words, capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"continuing: {len(done)} of 8 done" in again.stdout
    assert "without 04_methods, which trains defectsynth" in again.stdout
    assert "[8/8] " in again.stdout and f"] 07_quality.{category} … " in again.stdout
    after = receipts(folder)
    assert {name: after[name] for name in done} == done, "what was complete is not repeated"
    assert {name.split(".")[0] for name in after} == asked | {"report"}
    page = folder / "figures" / "report.html"
    assert page.stat().st_size > 20_000 and (folder / "figures" / "table_2.csv").is_file()
    assert json.loads((folder / "notebooks" / "report.json").read_text())["page"] == str(page)
    undisturbed = {
        "profile": "smoke", "dataset": "folder", "data_root": str(root), "category": category,
        "runs_root": str(tmp_path / "undisturbed"),
    }  # fmt: skip
    s = study.open_category(params.validate(undisturbed))
    for stage in (stages.quality, evaluation.downstream):
        values = [m["value"] for m in stage(s, "crop_paste", 0)["metrics"]]
        ours = RunFolder(folder / category / "crop_paste" / "s0").record(stage.__name__)
        assert [m["value"] for m in ours["metrics"]] == values, "equal to an undisturbed run's"
    third = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert third.returncode == 0 and receipts(folder) == after, "nothing to do the third time"


def test_a_second_batch_on_the_same_folder_waits_its_turn(tiny_mini, tmp_path, monkeypatch):
    import fcntl

    folder = tmp_path / "runs" / "smoke" / "mini"
    folder.mkdir(parents=True)
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with open(folder / ".reproduce.lock", "w") as held:
        held.write("4711")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        values = {
            "parameters": {"profile": "smoke", "data_root": str(tiny_mini), "runs_root": str(tmp_path / "runs")},
            "categories": ["any"], "grouping": "category", "until": None,
        }  # fmt: skip
        with pytest.raises(RuntimeError, match="process 4711 is already working in .*: wait for it or stop it"):
            batch.reproduce(values, [])


def test_make_hands_over_values_with_spaces():
    values = ["DATASET=folder", "DATA_ROOT=/my parts", "CATEGORY=metal nut,gear", "SEEDS=0, 1", "UNTIL=06_generation"]
    # A make above this one hands down its own flags and says which folder it enters.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    words = ["make", "-n", "reproduce", *values]
    shown = subprocess.run(words, capture_output=True, text=True, cwd=paths.ROOT, env=alone).stdout.splitlines()[-1]
    given = shlex.split(shown)
    assert given[:4] == [".venv/bin/python", "-m", "defectlib", "reproduce"]
    assert {"/my parts", "metal nut,gear", "0, 1", "folder"} <= set(given)
    assert given[given.index("--until") + 1] == "06_generation"


@pytest.mark.parametrize("profile", ["default", "slurm"])
def test_dry_run_of_both_workflow_profiles(tiny_mini, tmp_path, profile):
    words = command(
        tmp_path, "--data-root", str(tiny_mini), "--dry-run", "--workflow-profile", profile, "--grouping", "run"
    )
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first = sorted(p.name for p in tiny_mini.iterdir() if p.is_dir())[0]
    assert f"09_downstream.{first}.crop_paste.s0" in done.stdout + done.stderr
    assert not list((tmp_path / "runs").rglob("*.ipynb")), "nothing ran"


def test_one_notebook_by_bare_papermill_with_a_category_file(tiny_mini, tmp_path):
    """What README shows; papermill's own command line, no help from `batch`."""
    category = sorted(p.name for p in tiny_mini.iterdir() if p.is_dir())[0]
    out = tmp_path / "01.ipynb"
    words = [
        sys.executable, "-m", "papermill", str(paths.NOTEBOOKS / "01_data.ipynb"), str(out),
        "-f", str(paths.PARAMS / "mini" / f"{category}.yaml"), "-r", "data_root", str(tiny_mini),
        "-r", "runs_root", str(tmp_path / "runs"),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "DEFECTLIB_PROFILE": "smoke"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert category in out.read_text()
