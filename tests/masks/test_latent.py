"""The latent branch on a space that is known by hand, and the way there and back on an untrained base model."""

from collections import Counter

import numpy as np
import pytest
import torch

from defectlib import backbone, diffusion
from defectlib.masks import interpolation, latent
from defectlib.pretrain import parts
from defectlib.types import Shot

NORMAL = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.2


def disc(y, x, radius, size=32):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)[None]


def shots(*masks):
    return [Shot(NORMAL, mask, "plate", "hole", str(k)) for k, mask in enumerate(masks)]


def identity(calls=None):
    """Noise is the picture itself: the interpolated picture is a mean of two pictures on the sphere."""

    def to_noise(images):
        if calls is not None:
            calls.append(len(images))
        return images

    return latent.Space(to_noise, lambda noise: noise)


def test_near_an_end_the_frame_is_that_end():
    a, b = disc(12, 12, 6), disc(20, 20, 6)
    frames = latent.interpolate(a, b, identity(), [0.02, 0.98])
    assert torch.equal(frames.masks[0], a) and torch.equal(frames.masks[1], b) and frames.refused == ("", "")


def test_a_black_frame_is_refused_and_named():
    dark = latent.Space(lambda images: images, lambda noise: torch.full_like(noise, -1.0))
    frames = latent.interpolate(disc(12, 12, 6), disc(20, 20, 6), dark)
    assert set(frames.refused) == {"all black"} and len(frames.kept) == 0 and len(frames.masks) == 10


def test_each_mask_is_inverted_once():
    calls = []
    space, masks = identity(calls), (disc(12, 12, 6), disc(20, 20, 6), disc(14, 18, 5))
    for i, j in ((0, 1), (1, 2), (0, 2), (0, 1)):
        latent.interpolate(masks[i], masks[j], space, [0.5])
    assert calls == [1, 1, 1]


def test_each_frame_between_two_masks_is_drawn_once():
    drawn = []
    space = latent.Space(lambda images: images, lambda noise: drawn.append(len(noise)) or noise)
    source, few = latent.hmi_latent(space), shots(disc(12, 12, 6), disc(20, 20, 6), disc(14, 18, 5))
    masks = [source(np.random.default_rng(k % 20), few, NORMAL) for k in range(40)]
    assert len(drawn) <= 20 and len({mask.numpy().tobytes() for mask in masks}) > 2


def test_specks_beyond_both_masks_are_black():
    speck = torch.full((3, 32, 32), -1.0)
    speck[:, 30:, :6] = 1.0
    stained = latent.Space(lambda images: images, lambda noise: speck.expand(len(noise), -1, -1, -1))
    assert set(latent.interpolate(disc(12, 12, 6), disc(20, 20, 6), stained).refused) == {"all black"}
    near = latent.interpolate(disc(12, 12, 6), disc(28, 4, 3), stained)
    assert not any(why == "all black" for why in near.refused) and all(near.refused), "it lies where a mask is"


def test_specks_beside_a_mask_are_dropped_and_refuse_no_frame():
    def speckled(noise):
        noise = noise.clone()
        noise[..., 0, 0] = noise[..., 31, 29:] = 1.0
        return noise

    a, b = disc(12, 12, 6), disc(20, 20, 6)
    frames = latent.interpolate(a, b, latent.Space(lambda images: images, speckled), [0.02, 0.98])
    assert torch.equal(frames.masks[0], a) and torch.equal(frames.masks[1], b) and frames.refused == ("", "")


def test_the_source_never_falls_back_to_image_space():
    dark = latent.Space(lambda images: images, lambda noise: torch.full_like(noise, -1.0))
    with pytest.raises(ValueError, match=r"plate/hole.*all black"):
        latent.hmi_latent(dark)(np.random.default_rng(0), shots(disc(12, 12, 6), disc(20, 20, 6)), NORMAL)


@pytest.mark.parametrize(("other", "why"), [(disc(12, 12, 6, 64), "resize one"), (disc(99, 99, 1), "empty mask")])
def test_masks_that_are_no_pair_are_one_sentence(other, why):
    with pytest.raises(ValueError, match=why):
        latent.interpolate(disc(12, 12, 6), other, identity())


def test_one_shot_is_one_sentence():
    with pytest.raises(ValueError, match="two masks of plate/hole and there is one"):
        latent.hmi_latent(identity())(np.random.default_rng(0), shots(disc(12, 12, 6)), NORMAL)


def test_the_hybrid_takes_the_space_that_the_area_asks_for():
    calls = []
    small, large = shots(disc(12, 12, 3), disc(20, 20, 3)), shots(disc(12, 12, 8), disc(20, 20, 8))
    source = latent.hmi(identity(calls))
    assert interpolation.branch([s.mask for s in small]) == "image"
    assert source(np.random.default_rng(0), small, NORMAL).any() and calls == []
    assert source(np.random.default_rng(0), large, NORMAL).any() and len(calls) == 2


def test_the_hybrid_says_where_latent_space_gave_none():
    dark = latent.Space(lambda images: images, lambda noise: torch.full_like(noise, -1.0))
    refused, large = Counter(), shots(disc(12, 12, 8), disc(20, 20, 8))
    mask = latent.hmi(dark)(np.random.default_rng(0), large, NORMAL, refused)
    assert mask.any() and refused[latent.FELL_BACK] == 1 and refused["all black"] == interpolation.ATTEMPTS


@pytest.mark.parametrize("scheduler", [diffusion.sd_scheduler(), parts.new_scheduler()], ids=["noise", "velocity"])
def test_inversion_comes_back(scheduler):
    """With the best predictor of data N(0, s^2), whose noise is start / s in the limit of many steps."""
    s = 0.6
    start = s * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def predict(latents, timestep):
        a = scheduler.alphas_cumprod[timestep]
        eps, x0 = ((1 - a).sqrt() * latents / (a * s**2 + 1 - a), a.sqrt() * s**2 * latents / (a * s**2 + 1 - a))
        return eps if scheduler.config.prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x0

    plain, solved = [], []
    for steps in (25, 100):
        for iterations, errors in ((1, plain), (4, solved)):
            noise = diffusion.invert(predict, start, scheduler, steps, iterations)
            again = diffusion.denoise(predict, noise, scheduler, steps)
            errors.append(((again - start).norm() / start.norm()).item())
        assert (noise - start / s).norm() / start.norm() < 5 / steps
    assert plain[1] < plain[0] / 2, "the finer the steps, the closer"
    assert max(solved) < max(plain) / 10, "and solved, all the way"


def test_inversion_of_the_shipped_base_brings_a_mask_back():
    """What plain inversion loses of a thin mask, every mask interpolated from it would lose."""
    space, bar = diffusion.latent_space(backbone.load("tiny", device="cpu")), torch.zeros(1, 64, 64, dtype=torch.bool)
    bar[0, 30:34, 10:54] = True
    again = interpolation.threshold(space.from_noise(space.noise(bar)[None])[0])
    assert (bar & again).sum() / (bar | again).sum() >= 0.9


def test_the_base_models_space(untrained):
    space = diffusion.latent_space(untrained, num_inference_steps=2)
    frames = latent.interpolate(disc(24, 24, 12, 64), disc(40, 40, 12, 64), space, [0.3, 0.7])
    assert frames.masks.shape == (2, 1, 64, 64) and frames.masks.dtype == torch.bool
