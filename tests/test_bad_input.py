"""Bad input stops a study with one sentence that names the file or the parameter, before any long work."""

import shutil

import numpy as np
import pytest
from PIL import Image

from defectlib import params, stages, study

CATEGORY = "brick"


@pytest.fixture
def root(tiny_mini, tmp_path):
    """A copy of one category, to be spoiled."""
    shutil.copytree(tiny_mini / CATEGORY, tmp_path / "data" / CATEGORY)
    return tmp_path / "data"


def opened(root, tmp_path, **changes):
    given = {"profile": "smoke", "data_root": str(root), "runs_root": str(tmp_path / "runs"), "category": CATEGORY}
    return study.open_category(params.validate(given | changes))


def masks(root, defect=None):
    """The masks of one defect, the first by default, in order."""
    truth = root / CATEGORY / "ground_truth"
    return sorted((truth / (defect or min(f.name for f in truth.iterdir()))).glob("*.png"))


def keep(root, n):
    """Leave one defect ``n`` pairs; returns its name."""
    for mask in masks(root)[n:]:
        (root / CATEGORY / "test" / mask.parent.name / f"{mask.stem.removesuffix('_mask')}.png").unlink()
        mask.unlink()
    return masks(root)[0].parent.name


def test_a_mask_of_another_size_than_its_image(root, tmp_path):
    mask = masks(root)[2]
    Image.open(mask).resize((50, 40)).save(mask)
    sentence = rf"mask and image differ in size: .*{mask.name}. Export the mask again .*image 64 x 64, mask 50 x 40"
    with pytest.raises(ValueError, match=sentence):
        opened(root, tmp_path)


def test_an_all_black_mask_is_said_and_its_image_is_no_shot(root, tmp_path, capsys):
    mask = masks(root)[0]
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(mask)
    shots = opened(root, tmp_path, methods=["crop_paste"]).shots()
    said = capsys.readouterr().err
    assert f"{CATEGORY}/ground_truth/{mask.parent.name}/{mask.name}: empty mask. Draw the defect, or move" in said
    assert mask.stem.removesuffix("_mask") not in {shot.id for shot in shots if shot.defect == mask.parent.name}
    opened(root, tmp_path, methods=["crop_paste"])
    assert capsys.readouterr().err == "", "once"


def test_a_defect_with_black_masks_only(root, tmp_path):
    for mask in masks(root):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(mask)
    with pytest.raises(ValueError, match=f"{CATEGORY} has no defect {mask.parent.name} with shots; it has: "):
        opened(root, tmp_path, defects=[mask.parent.name])


def test_one_shot_where_masks_are_interpolated(root, tmp_path):
    defect = keep(root, 1)
    sentence = f"{CATEGORY}/{defect} has one shot, and the mask source 'hmi' of defectsynth interpolates between two: "
    with pytest.raises(ValueError, match=sentence):
        opened(root, tmp_path, defects=[defect])
    alone = opened(root, tmp_path, defects=[defect], methods=["crop_paste"])
    assert len(alone.shots()) == 1, "a method that makes its own masks needs no second"


def test_no_normals(root, tmp_path):
    shutil.rmtree(root / CATEGORY / "train" / "good")
    with pytest.raises(
        ValueError, match=rf"category without normals: {CATEGORY}/.* Put at least one defect-free image"
    ):
        opened(root, tmp_path)


def test_normals_that_the_split_keeps_out(root, tmp_path):
    """A normal that is a copy of a test image is not trained on: the audit sees a file, the split keeps none."""
    good = root / CATEGORY / "train" / "good"
    shutil.rmtree(good)
    good.mkdir()
    shutil.copy(next((root / CATEGORY / "test").glob("[!g]*/*.png")), good / "000.png")
    with pytest.raises(
        ValueError, match=f"{CATEGORY} has no normal image to draw on: put at least one into train/good"
    ):
        opened(root, tmp_path)


def test_a_prompt_for_an_unknown_defect(root, tmp_path):
    with pytest.raises(ValueError, match=f"prompts: {CATEGORY} has no defect 'craack'; it has: "):
        opened(root, tmp_path, prompts={"craack": "a brick with a crack"})


@pytest.mark.parametrize(
    ("method", "file"),
    [
        ("crop_paste", "shots.safetensors"), ("crop_paste", "method.json"),
        ("defectsynth", "controlnet/diffusion_pytorch_model.safetensors"), ("defectsynth", "controlnet/config.json"),
    ],
)  # fmt: skip
def test_a_fit_that_is_cut_off(root, tmp_path, method, file):
    s = opened(root, tmp_path, methods=[method])
    stages.fit(s, method, 0)
    folder = s.folder(method, 0)
    damaged = folder.model / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"the model in {folder.model} cannot be read: delete {folder.path} to fit"):
        stages.sample(s, method, 0)
    shutil.rmtree(folder.path)
    assert stages.sample(s, method, 0)["metrics"], "the remedy helps"
