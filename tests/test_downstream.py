import numpy as np
import pytest
import torch

from defectlib import downstream
from defectlib.profiles import TrainSettings

SETTINGS = TrainSettings(
    architecture="resnet34", pretrained=False, epochs=None, steps=12, batch_size=8, learning_rate=1e-3
)
LOCALISER = SETTINGS.model_copy(update={"architecture": "smp-unet-resnet18"})


def discs(n, seed):
    """Bright discs on noise, with masks; label 1 where the disc is large."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.normal(0, 0.1, (n, 3, 32, 32))
    masks = np.zeros((n, 1, 32, 32), bool)
    for i in range(n):
        cy, cx = rng.integers(10, 22, 2)
        masks[i, 0] = np.hypot(*(np.mgrid[:32, :32] - np.array([cy, cx])[:, None, None])) < (9 if labels[i] else 4)
        images[i] += masks[i] * 0.8
    return torch.from_numpy(images).float().clamp(-1, 1), torch.from_numpy(masks), torch.from_numpy(labels)


def test_batches_are_full_and_even():
    drawn = np.concatenate(list(downstream.batches(5, 4, 5, np.random.default_rng(0))))
    assert np.bincount(drawn).tolist() == [4] * 5


def test_no_batch_of_a_few_images_weighs_as_much_as_a_full_one():
    assert downstream.batch_sizes(81) == [14, 14, 14, 13, 13, 13] and downstream.batch_sizes(17) == [9, 8]
    assert downstream.batch_sizes(32) == [16, 16] and downstream.batch_sizes(3) == [3]
    for n in range(1, 70):
        sizes = downstream.batch_sizes(n)
        assert sum(sizes) == n and max(sizes) <= 16 and max(sizes) - min(sizes) <= 1


def test_the_settled_statistics_are_those_of_the_batches():
    """One channel, 17 images of which one is far off: alone in a batch it would weigh as much as 16."""
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1)).train()
    images = torch.zeros(17, 1, 2, 2)
    images[5] = 17.0
    settled = downstream._settled(model, images)
    mean = settled[0].running_mean.item()  # of batches of nine and of eight
    assert (mean == pytest.approx(17 / 9 / 2) or mean == pytest.approx(17 / 8 / 2)) and not settled.training


def test_steps_from_epochs():
    by_epoch = SETTINGS.model_copy(update={"epochs": 30, "steps": None})
    assert downstream.n_steps(by_epoch, 17) == 90 and downstream.n_steps(SETTINGS, 17) == 12


def test_length_is_given_once():
    with pytest.raises(ValueError, match="exactly one of epochs and steps"):
        TrainSettings(**{**SETTINGS.model_dump(), "epochs": 3})


def test_flips_are_the_same_for_image_and_mask():
    image = torch.arange(2 * 9).view(2, 1, 3, 3).float()
    for seed in range(6):
        x, y = downstream.flipped([image, image.clone()], np.random.default_rng(seed))
        assert torch.equal(x, y)
    assert any(not torch.equal(downstream.flipped([image], np.random.default_rng(s))[0], image) for s in range(6))


def test_classifier_learns_and_is_a_function_of_its_seed():
    images, _, labels = discs(32, 0)
    test, _, truth = discs(16, 1)
    state, settings = torch.get_rng_state(), SETTINGS.model_copy(update={"steps": 30})
    model, curve = downstream.train_classifier(images, labels, 2, settings, seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is given back"
    p = downstream.predict_classes(model, test)
    assert p.shape == (16, 2) and torch.allclose(p.sum(1), torch.ones(16))
    assert (p.argmax(1) == truth).float().mean() > 0.8 and curve[-1] < curve[0]
    again, _ = downstream.train_classifier(images, labels, 2, settings, seed=0)
    assert torch.equal(downstream.predict_classes(again, test), p)
    other, _ = downstream.train_classifier(images, labels, 2, settings, seed=1)
    assert not torch.equal(downstream.predict_classes(other, test), p)


def test_localiser_learns_where_the_disc_is():
    images, masks, _ = discs(24, 0)
    normals = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(0.1).clamp(-1, 1)
    settings = SETTINGS.model_copy(update={"architecture": "smp-unet-resnet18", "steps": 20})
    model, curve = downstream.train_localiser(images, masks, normals, settings, seed=0)
    test, truth, _ = discs(8, 1)
    maps = downstream.predict_maps(model, test)
    assert maps.shape == (8, 32, 32) and maps.min() >= 0 and maps.max() <= 1
    assert maps[truth[:, 0]].mean() > maps[~truth[:, 0]].mean() + 0.3
    assert torch.allclose(downstream.predict_maps(model, test, batch_size=3), maps, atol=1e-5)


def test_checkpoints_change_nothing_in_a_training_and_the_earliest_of_the_best_is_taken():
    images, masks, labels = discs(16, 0)
    test, _, _ = discs(4, 1)
    seen, values = [], iter([0.2, 0.9, 0.9, 0.1])

    def score(model):
        torch.randn(3)  # what a score draws is not missed by the training
        seen.append(downstream.predict_classes(model, test))
        return next(values)

    plain, losses = downstream.train_classifier(images, labels, 2, SETTINGS, seed=0)
    looked = downstream.Checkpoints(4, score)
    again, same = downstream.train_classifier(images, labels, 2, SETTINGS, 0, looked)
    assert same == losses and torch.equal(seen[-1], downstream.predict_classes(plain, test)), (
        "the last is the plain model"
    )
    assert torch.equal(downstream.predict_classes(again, test), seen[-1]), "which is given back"
    assert looked.scores == [(3, 0.2), (6, 0.9), (9, 0.9), (12, 0.1)], "evenly, the last at the end"
    assert torch.equal(downstream.predict_classes(looked.best, test), seen[1]) and not torch.equal(seen[1], seen[2])
    few = downstream.Checkpoints(5, lambda model: 0.0)
    downstream.train_localiser(images, masks, images[:2], LOCALISER.model_copy(update={"steps": 2}), 0, few)
    assert [step for step, _ in few.scores] == [1, 2], "a training of two steps has two"


def test_a_seeded_tenth_of_each_defect_is_held_back():
    defects = ["a"] * 30 + ["b"] * 4 + ["c"]
    back = downstream.held_back(defects, seed=0)
    assert [int(back[np.array(defects) == d].sum()) for d in "abc"] == [3, 1, 1]
    assert (downstream.held_back(defects, seed=0) == back).all()
    assert any((downstream.held_back(defects, seed=seed) != back).any() for seed in (1, 2))


def test_the_paper_scale_localiser_is_near_draems():
    """DRAEM's discriminative sub-network, base 64, 3 channels in and 1 out, by its layers: (in, out) a convolution."""
    model = downstream.build_localiser(SETTINGS.model_copy(update={"architecture": "smp-unet-vgg13_bn"}))
    down = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), *[(512, 512)] * 4]
    up = [(512, 512), (1024, 512), (512, 512), (512, 256), (768, 256), (256, 256), (256, 128), (384, 128), (128, 128)]
    up += [(128, 64), (192, 64), (64, 64), (64, 64), (128, 64), (64, 64)]
    draem = sum(9 * a * b + 3 * b for a, b in down + up) + 9 * 64 + 1
    ours = sum(p.numel() for p in model.parameters())
    assert (draem, ours) == (28_371_841, 25_158_529), "what the docstring states"
    layers = [*model.encoder.modules(), *model.decoder.center.modules()]
    layers = [(m.in_channels, m.out_channels) for m in layers if isinstance(m, torch.nn.Conv2d)]
    assert layers == down, "the way down is DRAEM's"
    assert {block.interpolation_mode for block in model.decoder.blocks} == {"bilinear"}


def test_the_paper_scale_localiser_trains_and_takes_512_px():
    images, masks, _ = discs(10, 0)
    wide = torch.nn.functional.interpolate
    images, masks = wide(images, 64), wide(masks.float(), 64) > 0
    settings = SETTINGS.model_copy(update={"architecture": "smp-unet-vgg13_bn", "steps": 2, "batch_size": 4})
    model, curve = downstream.train_localiser(images, masks, images[:4], settings, seed=0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(curve) == 2 and all(int(m.num_batches_tracked) == 1 for m in norms), "14 images, one batch, anew"
    assert downstream.predict_maps(model, torch.zeros(1, 3, 512, 512)).shape == (1, 512, 512)


@pytest.mark.parametrize("name", ["smp-unet-resnet18", "smp-unet-vgg13_bn"])
def test_weights_that_are_not_here_are_refused(name):
    with pytest.raises(ValueError, match=f"no weights for {name} here: set pretrained to false"):
        TrainSettings(**SETTINGS.model_dump() | {"architecture": name, "pretrained": True})
