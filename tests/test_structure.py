"""The plan of the house, held by the syntax tree: rooms import upwards, notebooks stay notebooks, files agree."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib

import jupytext
import nbformat
import pytest

from defectlib import batch, params, paths

ROOMS = [
    *("paths", "types", "images", "profiles", "params", "data", "masks", "augmentation"),
    *("backbone", "attention", "diffusion", "control", "fusion", "training", "branches", "adaptation", "decoder"),
    *(
        "methods",
        "sampling",
        "metrics",
        "downstream",
        "pretrain",
        "prepare",
        "runs",
        "study",
        "judges",
        "stages",
        "evaluation",
        "learning",
        "export",
        "leaks",
    ),
    *("published", "report", "doctor", "batch", "cli"),
]
NOTEBOOKS = sorted(batch.NOTEBOOKS)


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "defectlib":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("defectlib."))


def test_rooms_import_only_rooms_above_them():
    for file in (paths.ROOT / "defectlib").rglob("*.py"):
        room = file.relative_to(paths.ROOT / "defectlib").parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for name in imported(ast.parse(file.read_text())):
            assert ROOMS.index(name) <= ROOMS.index(room), f"{file.name}: {room} imports {name}"


def test_importing_the_package_is_light():
    code = "import sys, defectlib; print([m for m in ('torch', 'numpy', 'pandas', 'diffusers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def called(node):
    """The dotted names that are called in a syntax tree."""
    return [ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)]


def leaking_seeds(tree):
    """How many calls of ``torch.manual_seed`` stand outside a ``with torch.random.fork_rng()``."""
    forked = [
        node for node in ast.walk(tree) if isinstance(node, ast.With) and any("fork_rng" in f for f in called_by(node))
    ]
    inside = {id(n) for node in forked for n in ast.walk(node)}
    seeds = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.manual_seed"]
    return sum(id(n) not in inside for n in seeds)


def called_by(node):
    """What a ``with`` enters."""
    return [name for item in node.items for name in called(item.context_expr)]


def test_no_global_seed_and_no_exit_in_the_library():
    for file in (paths.ROOT / "defectlib").rglob("*.py"):
        tree = ast.parse(file.read_text())
        used = set(called(tree))
        assert not used & {"np.random.seed", "random.seed", "seed_everything"}, file
        assert not leaking_seeds(tree), f"{file}: a seed must not leak to the caller"
        assert file.stem in ("cli", "__main__") or not used & {"sys.exit", "exit", "quit"}, file


def test_a_seed_that_leaks_is_found():
    safe = "with torch.random.fork_rng():\n    torch.manual_seed(0)\n"
    assert [leaking_seeds(ast.parse(code)) for code in (safe, safe + "torch.manual_seed(1)")] == [0, 1]


def test_notebook_pairs_are_in_step():
    batch.check_pairs()


def test_a_pair_out_of_step_is_refused(tmp_path, monkeypatch):
    shutil.copytree(paths.NOTEBOOKS, tmp_path / "notebooks")
    text = tmp_path / "notebooks" / "03_backbone.py"
    text.write_text(text.read_text() + "\n# %%\nprint('new')\n")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    with pytest.raises(ValueError, match=r"03_backbone\.ipynb is not in step with 03_backbone\.py"):
        batch.check_pairs()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_valid(name):
    nbformat.validate(nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_executed_small_and_clean(name):
    file = paths.NOTEBOOKS / f"{name}.ipynb"
    assert file.stat().st_size <= 400_000
    code = [c for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1)), "executed once, in order"
    outputs = [o for c in code for o in c.outputs]
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.get("name") == "stderr"], "no warning on the page"
    assert str(paths.ROOT) not in file.read_text(), "no path of the machine that executed it"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_parameters(name):
    file = paths.NOTEBOOKS / f"{name}.ipynb"
    assert batch.notebook_parameters(file) == set(params.Parameters.model_fields)
    first = next(c for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code")
    assert first.metadata.tags == ["parameters"], "the first code cell"
    namespace = {}
    exec(first.source, namespace)
    assert params.read(namespace) == params.Parameters(), "literal defaults only, the same as the model's"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_explain_and_call(name):
    for cell in jupytext.read(paths.NOTEBOOKS / f"{name}.py").cells:
        if cell.cell_type != "code":
            continue
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, ast.ClassDef), f"{name}: a class belongs in defectlib"
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 10, f"{name}: {node.name} belongs in defectlib"


def test_environment_agrees_with_the_lock():
    """No conda is needed to see that environment.yml installs the lock, and that the lock holds every dependency."""
    import yaml

    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1] == {"pip": ["--requirement requirements.lock"]}
    lock = (paths.ROOT / "requirements.lock").read_text()
    pinned = set(re.findall(r"^([a-z0-9][a-z0-9._-]*)==", lock, re.M))
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    wanted = [re.split(r"[<>=!]", d)[0] for d in project["dependencies"] + project["optional-dependencies"]["test"]]
    assert set(wanted) <= pinned
    named = "torch diffusers peft jupyterlab papermill nbval matplotlib pandas torch-fidelity lpips ipywidgets"
    assert set(named.split()) <= set(wanted)
    assert environment["dependencies"][0] == "python=3.11" and project["requires-python"] == ">=3.11"
    blocks = re.findall(r"^[a-z0-9][^\n]*==[^\n]*(?:\n    [^\n]*)*", lock, re.M)
    assert all("--hash=sha256:" in block for block in blocks)
    assert "://" not in re.sub(r"^\s*#.*$", "", lock, flags=re.M), "no registry is named"
