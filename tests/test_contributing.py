"""What CONTRIBUTING shows is executed: a data set and a method from outside run through all stages."""

import re

import numpy as np
import pytest
from PIL import Image

from defectlib import evaluation, params, paths, stages, study
from defectlib.data.catalog import DATASETS
from defectlib.methods import base


@pytest.fixture
def shown():
    text = (paths.ROOT / "CONTRIBUTING.md").read_text()
    namespace = {"__name__": "contributing"}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, namespace)
    yield namespace
    DATASETS.pop("bolts")
    base._REGISTRY.pop("shade")


def bolts(root):
    """A small tree in the layout that CONTRIBUTING invents."""
    rng = np.random.default_rng(0)

    def save(path, array):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    for i in range(9):
        save(root / "ok" / f"{i}.png", rng.integers(120, 140, (64, 64, 3), np.uint8))
    for k, defect in enumerate(("dent", "rust")):
        for i in range(6):
            image = rng.integers(120, 140, (64, 64, 3), np.uint8)
            mask = np.zeros((64, 64), np.uint8)
            mask[10 + 4 * i : 20 + 4 * i, 20:40] = 255  # below tau: interpolated in image space
            image[mask > 0] = 30 + 60 * k
            save(root / "ng" / defect / f"{i}.png", image)
            save(root / "ng" / defect / f"{i}.mask.bmp", mask)


def test_a_data_set_and_a_method_from_outside_run_through_all_stages(tmp_path, shown):
    bolts(tmp_path / "line3")
    given = {
        "profile": "smoke", "dataset": "bolts", "data_root": str(tmp_path / "line3"), "methods": ["shade"],
        "runs_root": str(tmp_path / "runs"),
    }  # fmt: skip
    s = study.open_category(params.validate(given))
    assert (s.category, s.defects) == ("bolt", ("dent", "rust"))
    assert stages.quality(s, "shade", 0)["metrics"]
    assert evaluation.downstream(s, "shade", 0)["metrics"]
    found = study.results(s.parameters, [s.category])
    assert set(found["stage"]) == {"fit", "sample", "quality", "downstream"} and set(found["method"]) == {"shade"}
    drawn = found[found["metric"] == "bad_samples"]["value"]
    assert (drawn == 0).all()
