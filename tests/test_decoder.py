"""Online decoder adaptation: the decoder's layers in order, what each form trains, and what it leaves alone."""

import pytest
import torch

from defectlib import decoder
from defectlib.training import digest

NORMALS = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
MASKS = torch.zeros(3, 1, 64, 64, dtype=torch.bool)
for k in range(3):
    MASKS[k, :, 20 : 36 + 4 * k, 24:40] = True
STEPS = {"steps": 30, "learning_rate": 3e-3, "schedule": "cycle"}
PARTS = ("whole", "last_block", "norms", "last_layer")


@pytest.fixture(scope="module")
def latents(untrained):
    return untrained.encode(torch.where(MASKS, torch.full_like(NORMALS, -0.8), NORMALS))


def error(images):
    return ((images - NORMALS).square() * ~MASKS).sum((1, 2, 3))


def test_the_layers_in_order_are_the_decoder(untrained, latents):
    z = latents / untrained.vae.config.scaling_factor
    whole = decoder.layers(untrained)(untrained.vae.post_quant_conv(z))
    assert torch.equal(whole, untrained.vae.decode(z).sample)
    assert {id(p) for p in decoder.layers(untrained).parameters()} == {
        id(p) for p in untrained.vae.decoder.parameters()
    }


@pytest.mark.parametrize("part", PARTS)
def test_every_form_removes_error_outside_and_restores_the_decoder(untrained, latents, part):
    before = digest(untrained.vae.state_dict().values())
    images = decoder.adapted(untrained, latents, NORMALS, MASKS, part=part, **STEPS)
    assert images.shape == NORMALS.shape and images.abs().max() <= 1 and not images.requires_grad
    assert (error(images) < error(untrained.decode(latents))).all()
    assert digest(untrained.vae.state_dict().values()) == before
    assert all(p.grad is None and not p.requires_grad for p in untrained.vae.parameters())


def test_the_first_step_is_adamws_by_hand(untrained, latents):
    """From the bias of the last layer: Adam's first step is the learning rate against the gradient's sign."""
    one = slice(0, 1)
    plain = untrained.decode(latents[one])
    goal = torch.where(MASKS[one], plain, NORMALS[one])
    weights = torch.where(MASKS[one], 1.0, 100.0)
    slope = (weights * (plain - goal)).sum((0, 2, 3))
    head = decoder.layers(untrained)
    biased = decoder.adapted(
        untrained, latents[one], NORMALS[one], MASKS[one], part="last_layer", steps=1, learning_rate=1e-3
    )
    with torch.no_grad():
        z = untrained.vae.post_quant_conv(latents[one] / untrained.vae.config.scaling_factor)
        before = head[:-1](z)
        patches = torch.nn.functional.unfold(before, 3, padding=1)
        d = (weights * (head[-1](before) - goal)).flatten(2)
        gradient = torch.einsum("bop,bip->oi", d, patches)
        decay = 1 - 1e-3 * 0.01  # AdamW's own decoupled decay
        weight = head[-1].weight.flatten(1) * decay - 1e-3 * gradient.sign()
        bias = head[-1].bias * decay - 1e-3 * slope.sign()
        expected = (torch.einsum("oi,bip->bop", weight, patches) + bias[None, :, None]).view_as(plain).clamp(-1, 1)
    assert torch.allclose(biased, expected, atol=2e-4)


@pytest.mark.parametrize("part", ["whole", "last_block"])
def test_together_is_one_after_the_other(untrained, latents, part):
    apart, together = (
        decoder.adapted(untrained, latents, NORMALS, MASKS, part=part, steps=4, learning_rate=1e-4, together=flag)
        for flag in (False, True)
    )
    moved = (apart - untrained.decode(latents)).abs().mean()
    assert (apart - together).abs().mean() < 0.05 * moved, "sums in another order turn the sign of small gradients"


def test_an_image_does_not_depend_on_the_others(untrained, latents):
    alone = decoder.adapted(untrained, latents[1:2], NORMALS[1:2], MASKS[1:2], part="last_block", **STEPS)
    among = decoder.adapted(untrained, latents, NORMALS, MASKS, part="last_block", **STEPS)
    assert torch.equal(alone[0], among[1])


def test_the_defect_weighs_a_hundredth_of_its_surroundings(untrained, latents, monkeypatch):
    """Where both weigh alike the defect keeps nearer to what it was, and the background comes less near."""
    assert decoder.OUTSIDE == 100
    plain, there = untrained.decode(latents), MASKS.expand_as(NORMALS)
    found = {}
    for weight in (100.0, 1.0):
        monkeypatch.setattr(decoder, "OUTSIDE", weight)
        images = decoder.adapted(untrained, latents, NORMALS, MASKS, **STEPS)
        found[weight] = (images - plain).abs()[there].mean().item(), error(images).sum().item()
    assert found[100.0][0] > 1.1 * found[1.0][0] and found[100.0][1] < found[1.0][1]
