"""`make reproduce` on real data in reduced form: every stage and every table, without the notebooks around them."""

import shutil

import pytest

from defectlib import evaluation, images, params, stages, study
from defectlib.data import layouts, splits
from defectlib.report import build

REAL = [
    ("magnetic_tile", "magnetic_tile"), ("gdxray", "gdxray"), ("mvtec_3d", "mvtec_3d_tire"), ("folder", "mvtec_3d_tire")
]  # fmt: skip


def as_mvtec_ad(source, target):
    """The tire's images in MVTec AD's layout, its masks of class ids as black and white."""
    for row in layouts.index("mvtec_3d", source).itertuples():
        side = "train" if row.role == "train" else "test"
        picture = target / row.category / side / row.defect / f"{row.id.split('_')[-1]}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / row.image, picture)
        if row.defect != "good":
            mask = target / row.category / "ground_truth" / row.defect / f"{picture.stem}_mask.png"
            images.write_mask(mask, layouts.read_mask(row, source))
    return target


@pytest.mark.parametrize(("dataset", "folder"), REAL)
def test_all_stages_run_on_real_images(dataset, folder, shared, tmp_path):
    given = {
        "profile": "smoke", "dataset": dataset, "data_root": str(shared / folder), "runs_root": str(tmp_path / "runs"),
    }  # fmt: skip
    if dataset == "folder":
        given["data_root"] = str(as_mvtec_ad(shared / folder, tmp_path / "parts"))
    parameters = params.validate(given)
    s = study.open_category(parameters)
    table = s.manifest()
    splits.check(table)
    assert (table.loc[table["side"].isin(["shot", "test"]), "box"] != "").all(), "defects are read as tiles"
    sides = table[table["side"].isin(["shot", "test"])].groupby("group")["side"].nunique()
    assert (sides == 1).all(), "crops of one image stay on one side"
    cells = [shot.mask.float().mean().item() * s.size**2 / 16 for shot in s.shots()]
    assert sorted(cells)[len(cells) // 2] >= 4 * 0.9, "the median defect covers four latent cells"
    evaluation.downstream(s, study.SHOTS_ONLY, 0)
    for method in ("crop_paste", "defectsynth"):
        stages.quality(s, method, 0)
        evaluation.downstream(s, method, 0)
    page = build.report({"parameters": parameters.model_dump(exclude_none=True), "categories": [s.category]})
    assert page.is_file() and str(tmp_path) in str(page), "real pixels stay out of figures/"
