"""`make reproduce` on real data in reduced form: every stage and every table, without the notebooks around them."""

import pytest

from defectlib import params, stages
from defectlib.data import splits
from defectlib.report import build

REAL = [("magnetic_tile", "magnetic_tile"), ("gdxray", "gdxray"), ("folder", "mvtec_3d_tire")]


@pytest.mark.parametrize(("dataset", "folder"), REAL)
def test_all_stages_run_on_real_images(dataset, folder, shared, tmp_path):
    given = {
        "profile": "smoke", "dataset": dataset, "data_root": str(shared / folder), "runs_root": str(tmp_path / "runs"),
    }  # fmt: skip
    if dataset == "folder":
        given["dataset"] = "mvtec_3d"  # its masks hold class ids
    parameters = params.validate(given)
    s = stages.study(parameters)
    table = s.manifest()
    splits.check(table)
    assert (table.loc[table["side"].isin(["shot", "test"]), "box"] != "").all(), "defects are read as tiles"
    sides = table[table["side"].isin(["shot", "test"])].groupby("group")["side"].nunique()
    assert (sides == 1).all(), "crops of one image stay on one side"
    cells = [shot.mask.float().mean().item() * s.size**2 / 16 for shot in s.shots()]
    assert sorted(cells)[len(cells) // 2] >= 4 * 0.9, "the median defect covers four latent cells"
    stages.quality(s, "crop_paste", 0)
    for method in (stages.SHOTS_ONLY, "crop_paste"):
        stages.downstream(s, method, 0)
    page = build.report({"parameters": parameters.model_dump(exclude_none=True), "categories": [s.category]})
    assert page.is_file() and str(tmp_path) in str(page), "real pixels stay out of figures/"
