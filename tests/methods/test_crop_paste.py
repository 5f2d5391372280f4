import numpy as np
import pytest
import torch

from defectlib import augmentation
from defectlib.methods import base, crop_paste
from defectlib.types import Request, Shot


def test_paste_by_hand():
    normal = torch.zeros(3, 4, 4)
    patch = torch.ones(3, 2, 2)
    mask = torch.tensor([[[True, False], [True, True]]])
    image, placed = augmentation.paste(normal, patch, mask, 1, 2, feather=0)
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[1, 2] = expected[2, 2] = expected[2, 3] = True
    assert torch.equal(placed[0], expected)
    assert torch.equal(image[0] == 1, expected)


@pytest.mark.parametrize(("y", "x", "kept"), [(-1, -1, 1), (3, 3, 1), (0, -1, 2)])
def test_what_hangs_over_the_edge_is_cut(y, x, kept):
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    _, placed = augmentation.paste(torch.zeros(3, 4, 4), torch.ones(3, 2, 2), mask, y, x, feather=0)
    assert placed.sum() == kept


def test_feather_blends_inwards_only():
    normal, mask = torch.zeros(3, 16, 16), torch.ones(1, 9, 9, dtype=torch.bool)
    hard, placed = augmentation.paste(normal, torch.ones(3, 9, 9), mask, 3, 3, feather=0)
    soft, same = augmentation.paste(normal, torch.ones(3, 9, 9), mask, 3, 3, feather=2)
    assert torch.equal(placed, same) and (soft[:, ~placed[0]] == 0).all()
    assert soft[0, 3, 7].item() == pytest.approx(1 / 3) and soft[0, 4, 7].item() == pytest.approx(2 / 3)
    assert soft[0, 7, 7] == 1 and not torch.equal(hard, soft)


def shot_on(size, box):
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, box[0] : box[1], box[2] : box[3]] = True
    return Shot(torch.where(mask, 1.0, 0.0).expand(3, -1, -1).clone(), mask, "disc", "dent", "000")


def disc(size, radius):
    y, x = np.mgrid[:size, :size] - size / 2
    noise = np.random.default_rng(0).normal(0, 0.02, (3, size, size))
    image = torch.from_numpy(np.where(np.hypot(y, x) < radius, 0.6, -0.6) + noise).float().clamp(-1, 1)
    return image


def draw(method, normal, seeds):
    return method.sample([Request(normal, None, "disc", "dent", "a disc with a dent", s, s) for s in seeds])


def test_defects_lie_on_the_object():
    method = crop_paste.CropPaste(base.configure("crop_paste", {}))
    method.fit([shot_on(64, (20, 30, 20, 26))], [], prompts={}, seed=0, workdir=None)
    normal = disc(64, 20)
    inside = torch.from_numpy(np.hypot(*(np.mgrid[:64, :64] - 32)) < 22)
    samples = draw(method, normal, range(12))
    assert all(s.mask.any() and not (s.mask[0] & ~inside).any() for s in samples)
    anywhere = crop_paste.CropPaste(base.configure("crop_paste", {"inside_foreground": False}))
    anywhere.fit([shot_on(64, (20, 30, 20, 26))], [], prompts={}, seed=0, workdir=None)
    assert any((s.mask[0] & ~inside).any() for s in draw(anywhere, normal, range(12))), "the rule is what keeps them in"


def test_a_defect_larger_than_the_object_is_cut_to_it():
    method = crop_paste.CropPaste(base.configure("crop_paste", {}))
    method.fit([shot_on(64, (4, 60, 4, 60))], [], prompts={}, seed=0, workdir=None)
    normal = disc(64, 16)
    (sample,) = draw(method, normal, [0])
    assert sample.mask.any() and sample.mask.sum() < 1200
    assert torch.equal(sample.image[:, ~sample.mask[0]], normal[:, ~sample.mask[0]])


def test_without_turns_the_patch_is_the_shots_own():
    still = {"rotate": 0.0, "scale_low": 1.0, "scale_high": 1.0, "flip": False, "inside_foreground": False}
    shot = shot_on(32, (5, 9, 7, 18))
    method = crop_paste.CropPaste(base.configure("crop_paste", still))
    method.fit([shot], [], prompts={}, seed=0, workdir=None)
    for sample in draw(method, torch.full((3, 32, 32), -0.5), range(4)):
        ys, xs = torch.nonzero(sample.mask[0], as_tuple=True)
        assert (ys.max() - ys.min() + 1, xs.max() - xs.min() + 1) == (4, 11) and sample.mask.sum() == 44
        assert (sample.image[:, sample.mask[0]] == 1).all()


def test_registry_refuses_a_second_class_of_the_same_name():
    with pytest.raises(ValueError, match="registered twice"):

        @base.register("crop_paste")
        class Other(crop_paste.CropPaste):
            pass


def test_registry_names_what_is_missing():
    with pytest.raises(ValueError, match="lacks .*makes_masks"):

        @base.register("half_made")
        class HalfMade:
            scope = "category"


def test_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match="no method 'cut_paste'; there are: .*crop_paste"):
        base.get("cut_paste")
