import numpy as np
from PIL import Image, ImageEnhance

from defectlib.data import exposures, likeness


def test_likeness_is_a_correlation(picture):
    some = np.stack([likeness.structure(picture(k)) for k in range(9)])
    alike = likeness.likeness(some, some)
    assert np.allclose(np.diag(alike), 1, atol=1e-5) and np.allclose(alike, alike.T, atol=1e-5)
    assert alike[~np.eye(9, dtype=bool)].max() < 0.6
    flat = likeness.structure(Image.new("L", (50, 40), 90))
    assert not flat.any() and (likeness.likeness(np.stack([flat]), some[:3]) == 0).all()


def test_what_all_pictures_share_tells_nothing(picture):
    """A camera's stripes make strangers alike until they are taken out."""
    stripes = 60 * np.sin(np.arange(96) / 2.0)[None]
    striped = [
        Image.fromarray(np.uint8(np.clip(np.asarray(picture(k)) * 0.3 + 60 + stripes, 0, 255))) for k in range(12)
    ]
    some = np.stack([likeness.structure(image) for image in striped])
    apart = ~np.eye(6, dtype=bool)
    assert likeness.likeness(some[:3], some[3:6]).max() > 0.8, "too few to tell what is shared"
    assert likeness.likeness(some[:6], some[6:])[apart].max() < 0.7


def test_a_list_with_itself_is_as_two_lists(picture):
    some = np.stack([likeness.structure(picture(k)) for k in (0, 1, 2, 0, 3, 4, 5, 6, 7, 8)])
    some[3] = np.roll(some[3], (1, -4), axis=(0, 1))
    assert np.allclose(likeness.among(some), likeness.likeness(some, some), atol=1e-6)
    assert likeness.among(some)[0, 3] > 0.9 > likeness.among(some, shift=1)[0, 3]


def test_one_piece_under_two_exposures_is_one_group_however_far_apart_it_was_taken(picture):
    ids = [
        "exp1_num_1000",
        "exp2_num_1020",
        "exp1_num_90000",
        "exp4_num_70000",
        *(f"exp1_num_{k}000" for k in range(200, 206)),
    ]
    pictures = [picture(k) for k in (0, 1, 2, 3, *range(10, 16))]
    pictures[2] = ImageEnhance.Brightness(picture(0)).enhance(0.6)
    structures = np.stack([likeness.structure(one) for one in pictures])
    found = exposures.groups(ids, [None] * len(ids), structures)
    assert found == [0, 0, 0, 3, *range(4, 10)]


def test_a_lesser_likeness_joins_what_was_taken_soon_after(picture):
    """A picture seen through half of another: alike by more than 0.6 and less than 0.9."""
    frames = [1000, 1300, 90000, *range(200000, 208000, 1000)]
    mixed = Image.blend(picture(0), picture(5), 0.4)
    structures = np.stack(
        [likeness.structure(p) for p in (picture(0), mixed, mixed, *(picture(k) for k in range(10, 18)))]
    )
    assert exposures.ALIKE_NEAR < likeness.among(structures)[0, 1] < exposures.ALIKE
    ids = [f"exp1_num_{frame}" for frame in frames]
    assert exposures.groups(ids, [None] * len(ids), structures)[:3] == [0, 0, 0], "the third is the second again"
    ids[1] = "exp1_num_1500"
    assert exposures.groups(ids, [None] * len(ids), structures)[:3] == [0, 1, 1]
