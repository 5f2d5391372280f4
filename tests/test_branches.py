"""Two branches in one UNet: off, they are the plain UNet to the bit; on, each part does what its equation says."""

import copy
import functools

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from defectlib import backbone
from defectlib.branches import BranchUNet, Compensation, FoldedInteraction, Interaction, found_again, pair_attention
from defectlib.diffusion import noise_from_x0
from defectlib.types import Shot

STEP = torch.tensor(500)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(base, n=2, seed=0):
    """Noisy latents and text of n pairs."""
    return normal(2 * n, 12, 16, 16, seed=seed), base.embed(["a vfx with sks"] * n + ["sks"] * n)


def disturbed(branches, seed=0):
    """The same with every trained value random: nothing starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in branches.parameters():
            if value.requires_grad:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return branches


def test_a_softmax_over_two_is_a_sigmoid():
    q, k, v = (normal(6, 5, 8, seed=i) for i in range(3))
    pairs = [x.view(2, 3, 5, 8).permute(1, 2, 0, 3) for x in (q, k, v)]  # (N, L, 2, C)
    expected = F.scaled_dot_product_attention(*pairs).permute(2, 0, 1, 3).flatten(0, 1)
    assert (pair_attention(q, k, v) - expected).abs().max() < 1e-6


def test_with_the_partner_masked_out_interaction_is_its_one_token_form():
    """A partner whose logit is -inf leaves softmax = 1 on the own value: Linear_o(v)."""
    layer = Interaction(8, zero=False)
    hidden = normal(4, 5, 8)
    entered = layer.proj_in(layer.norm(hidden))
    query, key, value = layer.query(entered), layer.key(entered), layer.value(entered)
    # One pair after another: the partner's key is pushed against the own query.
    for i in range(4):
        far = key.clone()
        far[(i + 2) % 4] = key[i] - 1e4 * query[i].sign()
        hook = layer.key.register_forward_hook(lambda *_, far=far: far)
        assert torch.allclose(layer(hidden)[i], layer.proj_out(value[i]), atol=1e-5)
        hook.remove()


def test_interaction_is_symmetric_in_the_branches():
    layer, hidden = Interaction(8, zero=False), normal(4, 5, 8)
    assert torch.allclose(layer(hidden.roll(2, 0)), layer(hidden).roll(2, 0), atol=1e-6)


@pytest.mark.parametrize("interaction", [False, True])
def test_untrained_branches_are_the_plain_unet_to_the_bit(untrained, interaction):
    noisy, text = rows(untrained)
    branches = BranchUNet(untrained.unet, 4, 0, interaction=interaction)
    with torch.no_grad():
        assert torch.equal(branches(noisy, STEP, text), untrained.unet(noisy, STEP, text).sample)


def test_each_row_takes_the_lora_of_its_branch(untrained):
    noisy, text = rows(untrained)
    both = disturbed(BranchUNet(untrained.unet, 4, 0, interaction=False))
    names, lora = zip(*((n, p) for n, p in both.named_parameters() if ".lora_" in n), strict=True)
    for branch, own in (("image", slice(0, 2)), ("part", slice(2, 4))):
        grads = torch.autograd.grad(both(noisy, STEP, text)[own].square().mean(), lora, allow_unused=True)
        reached = {n.split(".")[-2] for n, g in zip(names, grads, strict=True) if g is not None and g.abs().max() > 0}
        assert reached == {branch}


def test_a_branch_is_the_unet_with_its_lora_merged(untrained):
    """Against peft's own single-adapter pass, and apart from what an unrouted pass would add up."""
    noisy, text = rows(untrained)
    both = disturbed(BranchUNet(untrained.unet, 4, 0, interaction=False))
    with torch.no_grad():
        predicted = both(noisy, STEP, text)
        for branch, own in (("image", slice(0, 2)), ("part", slice(2, 4))):
            merged = copy.deepcopy(both.unet)
            merged.fuse_lora(adapter_names=[branch])
            merged.unload_lora()
            merged.set_attn_processor(AttnProcessor2_0())
            alone = merged(noisy[own], STEP, text[own]).sample
            assert torch.allclose(predicted[own], alone, atol=1e-4)
            assert (alone - untrained.unet(noisy[own], STEP, text[own]).sample).abs().max() > 1e-2


def test_a_projection_adds_what_pefts_own_batch_of_mixed_adapters_adds(untrained):
    for classes in (0, 3):
        branches = disturbed(BranchUNet(untrained.unet, 4, 0, classes=classes))
        layer = next(m for m in branches.unet.modules() if isinstance(m, LoraLayer))
        hidden = normal(4, 7, layer.in_features)
        of = torch.tensor([2, 0]) if classes else None
        with torch.no_grad(), branches.rows.of(of):
            ours = layer(hidden)
            layer._forward_pre_hooks.clear(), layer._forward_pre_hooks_with_kwargs.clear(), layer._forward_hooks.clear()
            assert torch.allclose(ours, layer(hidden, adapter_names=["image"] * 2 + ["part"] * 2), atol=1e-6)
            assert (ours - layer.get_base_layer()(hidden)).abs().max() > 1e-3, "which is not nothing"


def test_interaction_couples_the_branches_of_a_pair_alone(untrained):
    noisy, text = rows(untrained)
    branches = disturbed(BranchUNet(untrained.unet, 4, 0))
    other = noisy.clone()
    other[2] += 1  # the part of the first pair
    with torch.no_grad():
        moved = (branches(other, STEP, text) - branches(noisy, STEP, text)).abs().amax((1, 2, 3))
    assert moved[0] > 1e-3 and moved[2] > 1e-3 and moved[1] < 1e-5 and moved[3] < 1e-5


@pytest.mark.parametrize("released", [False, True])
def test_a_background_moves_the_image_branch_alone(untrained, released):
    noisy, text = rows(untrained)
    branches = BranchUNet(untrained.unet, 4, 0, interaction=False, compensation=True, released=released)
    disturbed(branches)
    with torch.no_grad():
        looks = [
            branches.background_features(normal(1, 12, 16, 16, seed=seed), STEP, untrained.embed([""]))
            for seed in (5, 6)
        ]
        first, second = (branches(noisy, STEP, text, look) for look in looks)
        many = branches(noisy, STEP, text, [layer.repeat(2, 1, 1) for layer in looks[0]])
    assert (first[:2] - second[:2]).abs().max() > 1e-4 and torch.equal(first[2:], second[2:])
    assert torch.allclose(first, many, atol=1e-5), "one background for all rows, or one each"
    with pytest.raises(ValueError, match="exactly where"):
        branches(noisy, STEP, text)


def test_a_background_is_seen_by_the_base_alone(untrained):
    """What BCM reads does not depend on what is trained: inputs of the frozen base's own self-attention."""
    latents, text = normal(2, 12, 16, 16), untrained.embed([""] * 2)
    branches = disturbed(BranchUNet(untrained.unet, 4, 0, compensation=True))
    layers = [m for m in untrained.unet.modules() if isinstance(m, Attention) and not m.is_cross_attention]
    inputs = {}
    handles = [m.register_forward_pre_hook(lambda m, a, _: inputs.update({m: a[0]}), with_kwargs=True) for m in layers]
    with torch.no_grad():
        untrained.unet(latents, STEP, text)
    for handle in handles:
        handle.remove()
    looked = branches.background_features(latents, STEP, text)
    assert len(looked) == len(layers)
    assert all(torch.equal(seen, inputs[layer]) for seen, layer in zip(looked, layers, strict=True))


def test_compensation_by_hand():
    """Keys and values of phi(z) + gamma MLP(phi(z_b)) for the first half; the released code mixes the two."""
    layer, hidden, behind = Compensation(8), normal(4, 5, 8), normal(1, 5, 8, seed=1)
    queries, keys = layer(hidden, behind)
    assert torch.allclose(keys[:2], hidden[:2] + 0.1 * layer.mlp(behind)) and torch.equal(keys[2:], hidden[2:])
    assert torch.equal(queries, hidden)
    released = Compensation(8, released=True)
    queries, keys = released(hidden, behind)
    assert torch.equal(queries, hidden) and torch.equal(keys, hidden), "gamma starts at 0"
    with torch.no_grad():
        released.gamma.fill_(0.25)
    keys = released(hidden, behind)[1]
    assert torch.allclose(keys[:2], 0.75 * hidden[:2] + 0.25 * released.mlp(behind)) and torch.equal(
        keys[2:], hidden[2:]
    )


@pytest.mark.parametrize("released", [False, True])
def test_folded_for_drawing_predicts_the_same(untrained, released):
    """The layers multiplied out: the same function to rounding, also where backgrounds pass, and undone again."""
    noisy, text = rows(untrained)
    branches = disturbed(BranchUNet(untrained.unet, 4, 0, compensation=True, released=released))
    with torch.no_grad():
        look = branches.background_features(normal(1, 12, 16, 16, seed=5), STEP, untrained.embed([""]))
        before = branches(noisy, STEP, text, look)
        with branches.apart():
            alone = branches(noisy, STEP, text, look)
        branches.fold()
        again = branches.background_features(normal(1, 12, 16, 16, seed=5), STEP, untrained.embed([""]))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(look, again, strict=True))
        folded = branches(noisy, STEP, text, look)
        assert (folded - before).abs().max() < 1e-4 * before.abs().max() < (alone - before).abs().max()
        with branches.apart():
            assert (branches(noisy, STEP, text, look) - alone).abs().max() < 1e-4 * alone.abs().max()
        branches.unfold()
        assert torch.equal(branches(noisy, STEP, text, look), before)
    branches.check()


def test_a_folded_interaction_is_the_layer_to_rounding():
    layer = Interaction(16, zero=False).double()
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(normal(*value.shape, seed=value.numel()))
        hidden = normal(6, 7, 16).double()
        assert torch.allclose(FoldedInteraction(layer)(hidden), layer(hidden), rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_changes_no_gradient(untrained):
    noisy, text = rows(untrained)
    grads, again = [], []
    for checkpointing in (False, True):
        branches = disturbed(BranchUNet(untrained.unet, 4, 0, compensation=True)).eval()
        if checkpointing:
            branches.unet.enable_gradient_checkpointing()
        calls = []
        branches.processors[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        background = branches.background_features(normal(2, 12, 16, 16, seed=5), STEP, untrained.embed([""] * 2))
        branches(noisy, STEP, text, background).square().mean().backward()
        grads.append([p.grad for p in branches.parameters() if p.requires_grad and p.grad is not None])
        again.append(len(calls))
    assert again == [2, 3], "the layer is computed again for its gradient"
    assert len(grads[0]) == len(grads[1]) > 0
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("form", ["csb", "separate", "vera", None])
@pytest.mark.parametrize("compensation", [False, True])
def test_a_step_in_bfloat16(untrained, compensation, form):
    noisy, text = rows(untrained)
    several = {"classes": 2, "form": form, "gates": "prior"} if form else {}
    branches = disturbed(BranchUNet(untrained.unet, 4, 0, compensation=compensation, **several))
    classes = torch.tensor([1, 0]) if form else None
    with torch.autocast("cpu", torch.bfloat16):
        background = None
        if compensation:
            background = branches.background_features(normal(2, 12, 16, 16), STEP, untrained.embed([""] * 2))
        branches(noisy, STEP, text, background, classes).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in branches.parameters() if p.grad is not None)
    q, k, v = (normal(4, 5, 8, seed=i) for i in range(3))
    assert pair_attention(q, k, v.bfloat16()).dtype == torch.bfloat16, "a sum in float32 does not spread"


def test_what_was_dropped_is_an_error(untrained):
    branches = BranchUNet(untrained.unet, 4, 0)
    noisy, text = rows(untrained)
    with pytest.raises(ValueError, match="3 rows are no pairs"):
        branches(noisy[:3], STEP, text[:3])
    next(m for m in branches.unet.modules() if isinstance(m, Attention)).set_processor(AttnProcessor2_0())
    for broken in (branches.check, branches.fold, lambda: branches(noisy, STEP, text)):
        with pytest.raises(RuntimeError, match="1 attention layers lost their processor"):
            broken()
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        branches = BranchUNet(untrained.unet, 4, 0)
        getattr(next(m for m in branches.unet.modules() if isinstance(m, LoraLayer)), hooks).clear()
        for broken in (branches.check, functools.partial(branches, noisy, STEP, text)):
            with pytest.raises(RuntimeError, match="projections have routed LoRA"):
                broken()
    branches = BranchUNet(untrained.unet, 4, 0)
    branches.unet.set_adapter("part")
    with pytest.raises(RuntimeError, match="not active"):
        branches.check()


@pytest.mark.parametrize(("released", "bcm"), [(False, 8.0), (True, 16.01)])
def test_the_counts_of_stable_diffusion(released, bcm):
    """LoRA 12.75 M, SAIM 124.08 M, BCM 8.00 M (reference: sum over the 32 layers), without any memory."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2, down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        )  # fmt: skip
        counts = BranchUNet(unet, 32, 0, compensation=True, released=released).counts()
    assert {part: round(n / 1e6, 2) for part, n in counts.items()} == {"LoRA": 12.75, "SAIM": 124.08, "BCM": bcm}


@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize(("call", "back"), [("disable_adapters", "enable_adapters"), ("fuse_lora", "unfuse_lora")])
def test_a_helper_that_switches_lora_off_is_an_error_until_it_is_on_again(untrained, call, back, classes):
    branches = disturbed(BranchUNet(untrained.unet, 4, 0, interaction=False, classes=classes))
    noisy, text = rows(untrained)
    of = torch.tensor([1, 0]) if classes else None
    with torch.no_grad():
        before = branches(noisy, STEP, text, classes=of)
        getattr(branches.unet, call)()
        for refuses in (branches.check, lambda: branches(noisy, STEP, text, classes=of)):
            with pytest.raises(RuntimeError, match="LoRA is switched off, or merged"):
                refuses()
        getattr(branches.unet, back)()
        branches.check()
        assert torch.allclose(branches(noisy, STEP, text, classes=of), before, atol=1e-4)


@pytest.mark.parametrize("classes", [0, 2])
def test_a_deleted_adapter_is_an_error(untrained, classes):
    branches = BranchUNet(untrained.unet, 4, 0, classes=classes)
    branches.unet.delete_adapters("part")
    with pytest.raises(RuntimeError, match="one branch's LoRA is not active"):
        branches.check()


def test_what_is_found_again_is_all_of_a_defect_by_what_is_true_and_none_by_what_is_sound():
    """What is true leaves the autoencoder's loss alone; the base that ships predicts velocity."""
    base = backbone.load("tiny", device="cpu")
    plate, mask = torch.full((3, 64, 64), 0.4), torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 20:44, 12:40] = True
    shot = Shot(torch.where(mask, torch.tensor(-0.6), plate), mask, "plate", "stain", "0")
    words = torch.zeros(2, 1, 1)
    for pictures, least, most in (
        ((shot.image, shot.image * mask), 0.9, 1.1),
        ((plate, torch.zeros_like(plate)), -0.1, 0.1),
    ):
        beneath = base.encode(torch.stack(pictures))

        def exact(noisy, t, _, beneath=beneath):
            noise = noise_from_x0(noisy, beneath, base.scheduler.alphas_cumprod[t])
            return base.scheduler.get_velocity(beneath, noise, t[None])

        for shares in found_again(exact, words, base, shot, (900, 500, 100), 0):
            assert all(least < share < most for share in shares)
