import pytest
import torch

from defectlib import backbone
from defectlib.masks.extraction import FLOOR, extract


def grey(noise=0.02, seed=0):
    return noise * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed))


def test_a_part_without_a_defect_gives_an_empty_mask():
    found = extract(grey())
    assert not found.mask.any() and found.by == "floor" and found.threshold == FLOOR
    assert not extract(torch.zeros(3, 64, 64)).mask.any()


def test_what_the_autoencoder_leaves_on_grey_is_no_defect():
    """The residue of the base model that ships, on grey and on latents up to 5 % of a latent's spread off it.

    Of 64 such decodings none departs by more than 0.10; at 7 % two, at 10 % sixty are above the floor.
    """
    base = backbone.load("tiny", device="cpu")
    latents = base.encode(torch.zeros(1, 3, 64, 64)).repeat(8, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for part in base.decode(latents + 0.05 * noise * torch.linspace(0, 1, 8)[:, None, None, None]):
        assert part.abs().max() > 0 and not extract(part).mask.any()


@pytest.mark.parametrize("part", [grey() - 0.5, grey(0.5), torch.linspace(-1, 1, 64).expand(3, 64, 64)])
def test_a_part_without_its_grey_gives_a_full_mask(part):
    """A whole picture in the place of a part: Otsu alone would cut out its bright half."""
    found = extract(part.clamp(-1, 1))
    assert found.mask.all() and found.by == "border"


@pytest.mark.parametrize("level", [-0.8, -0.3, 0.5])
def test_a_defect_of_any_tone_is_found_to_the_pixel(level):
    part, truth = grey(), torch.zeros(1, 64, 64, dtype=torch.bool)
    truth[0, 20:30, 24:50] = True
    part[:, truth[0]] += level
    assert torch.equal(extract(part).mask, truth)


def test_a_faint_halo_around_a_strong_defect_is_cut_off_by_otsu():
    part, core = grey(), torch.zeros(1, 64, 64, dtype=torch.bool)
    part[:, 18:42, 18:42] = 0.2
    core[0, 20:40, 20:40] = True
    part[:, core[0]] = 0.9
    found = extract(part)
    assert torch.equal(found.mask, core) and found.by == "otsu" and found.threshold > 0.2


def test_one_coloured_channel_is_enough():
    part = grey()
    part[2, 10:20, 10:20] = 0.7
    assert extract(part).mask.sum() == 100


def test_specks_are_dropped_and_second_pieces_stay():
    part = grey()
    part[:, 5:25, 5:25] = part[:, 40:50, 40:50] = part[:, 60, 60] = -0.9
    assert extract(part).mask.sum() == 500


@pytest.mark.parametrize("ground", [-0.15, 0.1])
def test_a_tinted_ground_is_ground_until_it_is_too_far_off_grey(ground):
    """By channel: what departs is told from the ground as it was drawn, not from mid-grey."""
    truth = torch.zeros(1, 64, 64, dtype=torch.bool)
    truth[0, 20:30, 24:50] = True
    part = grey() + ground * torch.tensor([1.0, 0.5, 0.0])[:, None, None]
    assert not extract(part).mask.any()
    part[:, truth[0]] -= 0.4
    found = extract(part)
    assert torch.equal(found.mask, truth) and found.tint == pytest.approx(abs(ground), abs=0.01)
    assert extract(part, tint=0.05).by == "border" and extract(grey() + 0.25).by == "border"


def test_a_part_of_a_shot_has_grey_for_ground():
    """A defect of one tone over most of the border would be taken for a tinted ground, and the rest for the defect."""
    part = torch.full((3, 64, 64), 0.15)
    part[:, 20:40, 20:40] = 0
    assert extract(part).mask.sum() == 400 and extract(part, tint=0).mask.all()
