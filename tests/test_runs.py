import json
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from defectlib import paths, runs
from defectlib.runs import RunFolder

IDENTITY = {"profile": "p", "split": "first_third", "dataset": "d", "category": "c", "method": "m", "seed": 0}


def make(folder, stage, key, value=1.0):
    with runs.stage(folder, stage, key, IDENTITY, {"n": 1}, {}) as metrics:
        metrics.append({"metric": "score", "value": value, "protocol": {"extractor": "tiny", "n_real": 3}})


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "p" / "d" / "c" / "m" / "s0")


def test_a_stage_is_complete_only_with_its_key(folder):
    assert folder.complete("fit", "k1") is None
    make(folder, "fit", "k1")
    assert folder.complete("fit", "k1")["metrics"][0]["value"] == 1.0
    assert folder.complete("fit", "k2") is None


def test_a_failed_stage_writes_no_stage_file(folder):
    with pytest.raises(RuntimeError), runs.stage(folder, "fit", "k", IDENTITY, {}, {}):
        raise RuntimeError("killed")
    assert folder.record("fit") is None


def test_other_parameters_move_the_stage_and_what_follows_aside(folder):
    make(folder, "fit", "k1")
    make(folder, "sample", "s1")
    (folder.path / "images").mkdir()
    (folder.path / "images" / "000000.png").write_bytes(b"x")
    make(folder, "sample", "s2", value=2.0)
    assert folder.complete("fit", "k1"), "what came before is kept"
    assert not (folder.path / "images").exists()
    (aside,) = (folder.path / "superseded").iterdir()
    assert json.loads((aside / "sample.json").read_text())["key"] == "s1"
    assert (aside / "images" / "000000.png").read_bytes() == b"x"


def test_other_measures_leave_the_downstream_scores(folder):
    for stage in ("fit", "sample", "quality", "downstream"):
        make(folder, stage, f"{stage}1")
    folder.supersede("quality", "quality2")
    assert folder.record("quality") is None and folder.complete("downstream", "downstream1")
    folder.supersede("sample", "sample2")
    assert folder.record("downstream") is None and folder.complete("fit", "fit1")


def test_a_half_made_stage_of_other_parameters_is_not_continued(folder):
    with pytest.raises(RuntimeError), runs.stage(folder, "sample", "s1", IDENTITY, {}, {}):
        (folder.path / "images").mkdir()
        raise RuntimeError("killed")
    folder.supersede("sample", "s1")
    assert (folder.path / "images").exists(), "same parameters: go on"
    folder.supersede("sample", "s2")
    assert not (folder.path / "images").exists(), "other parameters: aside"


def test_key_depends_on_parameters_and_upstream():
    keys = {runs.stage_key({"n": 1}, ["a"]), runs.stage_key({"n": 2}, ["a"]), runs.stage_key({"n": 1}, ["b"])}
    assert len(keys) == 3
    assert runs.stage_key({"a": 1, "b": 2}, []) == runs.stage_key({"b": 2, "a": 1}, [])


def test_collect_is_one_long_frame(tmp_path, folder):
    make(folder, "fit", "k1", value=0.5)
    make(folder, "quality", "q1", value=None)
    assert json.loads((folder.path / "params.json").read_text()) == {"fit": {"n": 1}, "quality": {"n": 1}}
    frame = runs.collect(tmp_path)
    assert list(frame.columns) == list(runs.COLUMNS)
    assert frame["value"].tolist()[0] == 0.5 and frame["value"].isna().tolist() == [False, True]
    assert frame["extractor"].unique().tolist() == ["tiny"] and frame["n_real"].unique().tolist() == [3]
    assert frame["seed"].tolist() == [0, 0] and frame["path"][0] == "p/d/c/m/s0/fit.json"
    assert runs.collect(tmp_path, profile="other").empty
    shutil.copytree(tmp_path / "p", tmp_path / "copied")
    assert runs.collect(tmp_path, profile=IDENTITY["profile"], dataset="d").equals(frame), "a copy does not count twice"
    shutil.rmtree(tmp_path / "copied")
    assert runs.collect_parquet(tmp_path, tmp_path / "all.parquet").equals(frame)


def test_the_record_is_a_birth_certificate(folder):
    make(folder, "fit", "k1")
    record = folder.record("fit")
    assert record["versions"]["torch"] and record["device"] and record["wall_s"] >= 0 and record["peak_memory_mb"] > 0
    assert {"git_sha", "dirty", "parameters", "inputs", "started", *IDENTITY} <= set(record)


@pytest.mark.parametrize("threads, clock", [(1, "cpu"), (2, "wall")])
def test_on_one_thread_waiting_for_others_does_not_count(threads, clock):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        name, passed = runs.stopwatch()
    finally:
        torch.set_num_threads(before)
    time.sleep(0.3)
    assert name == clock and (passed() >= 0.3) == (clock == "wall")


def test_no_two_make_a_stage_at_once(tmp_path):
    class Here:
        def folder(self, method, seed):
            return RunFolder(tmp_path / method / f"s{seed}")

    inside, most = [], []

    @runs.alone
    def made(s, method, seed):
        inside.append(method)
        most.append(inside.count(method))
        time.sleep(0.02)
        inside.remove(method)
        return {}

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: made(Here(), ("a", "b")[i % 2], 0), range(8)))
    assert len(most) == 8 and max(most) == 1


def test_what_makes_code_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert runs.git_state() == ("unknown", True)
    for name in ("defectlib/a.py", "notebooks/01.py", "notebooks/01.ipynb", "README.md"):
        paths.write_text(tmp_path / name, "")

    def git(*words):
        named = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True, capture_output=True)

    for words in (("init",), ("add", "."), ("commit", "-m", "all")):
        git(*words)
    for name in ("notebooks/01.ipynb", "README.md", "figures/a.png", "my_images/b.png"):
        paths.write_text(tmp_path / name, "new")
    assert len(runs.git_state()[0]) == 40 and not runs.git_state()[1], "results, text and a user's own files"
    for name in ("defectlib/a.py", "notebooks/01.py", "papermill_params/b.yaml"):
        paths.write_text(tmp_path / name, "new")
        assert runs.git_state()[1], name
        git("add", ".")
        git("commit", "-m", name)
        assert not runs.git_state()[1]
