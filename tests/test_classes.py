"""CSB-LoRA, TDAM and SGRL as parts: hand-worked numbers, and off they are not there."""

import copy

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from defectlib import diffusion
from defectlib.branches import BranchUNet, classes, gates, guidance
from defectlib.branches.classes import ClassScaled, Rows, Separate, coefficient_map, scaled_layers
from defectlib.branches.routing import BRANCHES, PROJECTIONS, lora
from defectlib.branches.vera import Vectors

STEP = torch.tensor(500)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(base, n=2, seed=0):
    return normal(2 * n, 12, 16, 16, seed=seed), base.embed(["a vfx with sks"] * n + ["sks"] * n)


def disturbed(branches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in branches.parameters():
            if value.requires_grad:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    return branches


def layer(blocks=None, start=0.5, n=3):
    linear = torch.nn.Linear(5, 4, bias=False)
    return ClassScaled(linear, n, Rows(), torch.Generator().manual_seed(0), blocks=blocks, start=start)


def test_coefficients_by_hand():
    scaled, hidden = layer(), normal(2, 3, 5)
    with scaled.rows.of(torch.tensor([2, 0])):
        found = scaled(hidden)
    entered = hidden @ scaled.weight.T
    for i, k in enumerate((2, 0)):
        assert torch.allclose(found[i], entered[i] * (1 + scaled.departure[k]))
    assert torch.equal(scaled(hidden), entered), "outside, what all share"


def test_between_two_classes_lies_their_weighted_mean():
    scaled, hidden = layer(), normal(1, 3, 5)
    with scaled.rows.of(torch.tensor([[0.25, 0.75, 0.0]])):
        found = scaled(hidden)
    scale = 1 + 0.25 * scaled.departure[0] + 0.75 * scaled.departure[1]
    assert torch.allclose(found, hidden @ scaled.weight.T * scale, atol=1e-6)


def test_tied_blocks_are_a_mixture_of_bases():
    """sum_k a_(c,k) B_k A_k with K = 2 is B diag(s_c) A with s_c constant on two halves."""
    scaled, up = layer(blocks=2), normal(6, 4)
    mixture = sum(
        (1 + scaled.departure[1, k]) * up[:, 2 * k : 2 * k + 2] @ scaled.weight[2 * k : 2 * k + 2] for k in range(2)
    )
    assert torch.allclose(up @ torch.diag(scaled.coefficients()[1]) @ scaled.weight, mixture, atol=1e-6)
    with pytest.raises(ValueError, match="3 blocks do not divide rank 4"):
        layer(blocks=3)


def test_regularisers_by_hand():
    first, second = layer(n=2), layer(n=2)
    with torch.no_grad():
        first.departure.copy_(torch.tensor([[3.0, 0, 0, 0], [0, 4.0, 0, 0]]))
        second.departure.zero_()
        first.weight.copy_(torch.eye(4, 5))
        second.weight.copy_(torch.tensor([[1.0, 0, 0, 0, 0]] * 4))
    assert classes.orthogonality([first]) == 0 and classes.orthogonality([second]) == 12
    assert classes.discrepancy([first, second], 0.0) == 0
    assert classes.discrepancy([first, second], -0.5) == 0.5
    assert classes.discrepancy([layer(n=1)], 0.0) == 0


def same_gradients(one, predicted, other, expected):
    """Of what both have, to the bit: they take the same training step."""
    for model, output in ((one, predicted), (other, expected)):
        model.zero_grad()
        output.square().mean().backward()
    mine, wanted = ({name: p.grad for name, p in m.named_parameters() if p.grad is not None} for m in (one, other))
    assert len(wanted) > 50 and all(torch.equal(mine[name], gradient) for name, gradient in wanted.items())


def test_one_class_without_a_departure_is_lora_to_the_bit(untrained):
    noisy, text = rows(untrained)
    plain = disturbed(BranchUNet(untrained.unet, 4, 0))
    with_classes = BranchUNet(untrained.unet, 4, 0, classes=1, start=0.0)
    with_classes.load_state_dict(with_classes.state_dict() | plain.state_dict())
    expected = plain(noisy, STEP, text)
    found = with_classes(noisy, STEP, text, classes=torch.zeros(2, dtype=torch.long))
    assert torch.equal(found, expected)
    with torch.no_grad():
        assert torch.equal(with_classes(noisy, STEP, text), expected)
    same_gradients(with_classes, found, plain, expected)


def test_a_mixed_batch_is_each_class_by_itself(untrained):
    noisy, text = rows(untrained, 3)
    branches = disturbed(BranchUNet(untrained.unet, 4, 0, classes=3))
    of = torch.tensor([2, 0, 1])
    with torch.no_grad():
        together = branches(noisy, STEP, text, classes=of)
        for i, k in enumerate(of):
            pair = [i, 3 + i]
            alone = branches(noisy[pair], STEP, text[pair], classes=k[None])
            assert torch.allclose(together[pair], alone, atol=1e-4)
            branches.fold(k[None])
            assert (branches(noisy[pair], STEP, text[pair]) - alone).abs().max() < 1e-4 * alone.abs().max()
            branches.unfold()
        other = branches(noisy, STEP, text, classes=of.flip(0))
    assert (other - together).abs().max() > 1e-3, "and classes tell"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([0], r"must be \(2,\) or \(2, 3\) for 2 pairs and 3 classes, got \(1,\)"),
        ([0, 1, 2], r"got \(3,\)"),
        ([[1.0, 0.0], [0.5, 0.5]], r"got \(2, 2\)"),
        ([0, -1], r"must lie in 0 to 2, got \[0, -1\]"),
        ([3, 0], r"must lie in 0 to 2, got \[3, 0\]"),
    ],
)
def test_classes_that_are_not_those_of_the_pairs(untrained, wrong, message):
    noisy, text = rows(untrained)
    branches = BranchUNet(untrained.unet, 4, 0, classes=3)
    with pytest.raises(ValueError, match=message):
        branches(noisy, STEP, text, classes=torch.tensor(wrong))
    with pytest.raises(ValueError, match="for 1 pairs and 3 classes|must lie in 0 to 2"):
        branches.fold(torch.tensor(wrong[-1:] if len(wrong) == 2 and wrong[0] == 0 else [0, 1]))


def test_an_adapter_call_keeps_the_coefficients(untrained):
    branches = BranchUNet(untrained.unet, 4, 0, classes=2)
    before = len(scaled_layers(branches))
    branches.unet.set_adapter("part")
    with pytest.raises(RuntimeError, match="one branch's LoRA is not active"):
        branches(*rows(untrained)[:1], STEP, rows(untrained)[1])
    branches.unet.set_adapter(["image", "part"])
    branches.check()
    assert len(scaled_layers(branches)) == before == 8 * len(branches.processors)
    assert all(found.departure.requires_grad for found in scaled_layers(branches))
    copied = copy.deepcopy(branches)
    assert all(a.rows is copied.rows for a in scaled_layers(copied)), "a copy has rows of its own"


def of_image(branches):
    return [layer.lora_A["image"] for layer in branches.modules() if isinstance(layer, LoraLayer)]


def test_what_classes_share_is_a_lora_of_pefts(untrained, tmp_path):
    """By its own reading and writing: into a UNet that knows nothing of classes, and from it into one that does."""
    branches, plain = disturbed(BranchUNet(untrained.unet, 4, 0, classes=2)), copy.deepcopy(untrained.unet)
    plain.add_adapter(lora(4, PROJECTIONS), "image")
    kept = get_peft_model_state_dict(branches.unet, adapter_name="image")
    safetensors.torch.save_file({n: v.contiguous() for n, v in kept.items()}, tmp_path / "lora.safetensors")
    found = set_peft_model_state_dict(plain, safetensors.torch.load_file(tmp_path / "lora.safetensors"), "image")
    assert found.unexpected_keys and all(name.endswith(".departure") for name in found.unexpected_keys)
    again = BranchUNet(untrained.unet, 4, 1, classes=2)
    set_peft_model_state_dict(again.unet, safetensors.torch.load_file(tmp_path / "lora.safetensors"), "image")
    own = [coefficient_map([m for m in scaled_layers(b) if m in of_image(b)]) for b in (branches, again)]
    assert torch.equal(*own), "with the coefficients, where there are any"
    into = BranchUNet(untrained.unet, 4, 1, classes=2)
    set_peft_model_state_dict(into.unet, get_peft_model_state_dict(plain, adapter_name="image"), "image")
    layers = [[m for m in of.modules() if isinstance(m, LoraLayer)] for of in (branches.unet, plain, into.unet)]
    assert len(layers[1]) == 4 * len(branches.processors)
    for ours, theirs, back in zip(*layers, strict=True):
        assert torch.equal(ours.get_delta_weight("image"), theirs.get_delta_weight("image"))
        assert torch.equal(ours.get_delta_weight("image"), back.get_delta_weight("image"))


def vera(untrained, n=2):
    return BranchUNet(untrained.unet, 4, 0, classes=n, form="vera")


def test_vera_is_pefts_to_the_rule(untrained):
    """diag(b) B diag(d) A, against the layer of peft itself with our bases and one class's vectors in it."""
    from peft import VeraConfig, get_peft_model

    linear = torch.nn.Sequential(torch.nn.Linear(6, 5))
    theirs = get_peft_model(copy.deepcopy(linear), VeraConfig(r=4, target_modules=["0"])).base_model.model[0]
    rows_of = Rows()
    down, up = (Vectors(theirs.__getattr__(f"vera_{x}")["default"], 3, rows_of, s) for x, s in (("A", 0.1), ("B", 0.0)))
    assert torch.equal(down.vectors[0], theirs.vera_lambda_d["default"]), "d starts as peft's"
    assert torch.equal(up.vectors[0], theirs.vera_lambda_b["default"]), "and so does b"
    with torch.no_grad():
        down.vectors.copy_(normal(3, 4)), up.vectors.copy_(normal(3, 5, seed=1))
        theirs.vera_lambda_d["default"].copy_(down.vectors[1]), theirs.vera_lambda_b["default"].copy_(up.vectors[1])
        hidden = normal(2, 7, 6)
        with rows_of.of(torch.tensor([1, 1])):
            assert torch.allclose(linear(hidden) + up(down(hidden)), theirs(hidden), atol=1e-5)
        one = torch.tensor([1])
        assert torch.allclose(up.of_class(one) @ down.of_class(one), theirs.get_delta_weight("default"), atol=1e-5)


def test_vera_shares_frozen_bases_and_starts_at_the_base_model(untrained):
    branches, noisy, text = vera(untrained), *rows(untrained)
    with torch.no_grad():
        first = branches(noisy, STEP, text, classes=torch.tensor([0, 1]))
        assert torch.equal(first, branches(noisy, STEP, text, classes=torch.tensor([1, 0]))), "b is zero"
    found = [m for m in branches.modules() if isinstance(m, Vectors)]
    assert len(found) == 2 * 8 * len(branches.processors)
    storages = {m.frozen.untyped_storage().data_ptr() for m in found}
    assert len(storages) == 2, "one A and one B for all projections and branches"
    learned = {name for name, value in branches.named_parameters() if value.requires_grad and ".lora_" in name}
    assert learned and all(name.endswith(".vectors") for name in learned)
    again = {name: value for name, value in vera(untrained).named_buffers() if name.endswith(".frozen")}
    assert all(torch.equal(value, again[n]) for n, value in branches.named_buffers() if n.endswith(".frozen"))
    branches.unet.set_adapter(list(BRANCHES))
    assert {n for n, v in branches.named_parameters() if v.requires_grad and ".lora_" in n} == learned


def test_vera_in_a_mixed_batch_is_each_class_by_itself_and_folded(untrained):
    branches, noisy, text = disturbed(vera(untrained)), *rows(untrained)
    with torch.no_grad():
        together = branches(noisy, STEP, text, classes=torch.tensor([1, 0]))
        for i, k in enumerate((1, 0)):
            branches.fold(torch.tensor([k]))
            folded = branches(noisy[[i, 2 + i]], STEP, text[[i, 2 + i]])
            branches.unfold()
            assert (folded - together[[i, 2 + i]]).abs().max() < 1e-4 * together.abs().max()
        assert (branches(noisy, STEP, text, classes=torch.tensor([0, 1])) - together).abs().max() > 1e-3


def test_the_counts_of_stable_diffusion():
    """32 coefficients a LoRA, 32 layers of 4 projections in 2 branches: 8,192 a class; 3 gates of 2 numbers a layer."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2, down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        )  # fmt: skip
    counts = BranchUNet(unet, 32, 0, classes=5, gates="neutral").counts()
    frozen = BranchUNet(unet, 32, 0, classes=5, form="vera").counts()
    widths = [m.out_features for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    assert frozen["LoRA"] == 0 and frozen["VeRA"] == 5 * 2 * sum(32 + width for width in widths)
    assert BranchUNet(unet, 32, 0, classes=5, form="separate").counts()["LoRA"] == 5 * counts["LoRA"]
    assert counts["CSB"] == 5 * 8192 and counts["TDAM"] == 192 and round(counts["LoRA"] / 1e6, 2) == 12.75


def test_neutral_gates_are_no_gates_to_the_bit(untrained):
    noisy, text = rows(untrained)
    plain, gated = (BranchUNet(untrained.unet, 4, 0, compensation=True, gates=kind) for kind in (None, "neutral"))
    generous = disturbed(plain).state_dict()
    gated.load_state_dict(generous, strict=False)
    behind = normal(1, 12, 16, 16, seed=5)
    looks = [b.background_features(behind, STEP, untrained.embed([""])) for b in (plain, gated)]
    expected, found = (b(noisy, STEP, text, look) for b, look in zip((plain, gated), looks, strict=True))
    assert torch.equal(found, expected)
    same_gradients(gated, found, plain, expected)
    with torch.no_grad():
        next(p.gates for p in gated.processors).slope.fill_(1.0)
        early, late = (gated(noisy, torch.tensor(t), text, looks[1]) for t in (900, 100))
        same = [plain(noisy, torch.tensor(t), text, looks[0]) for t in (900, 100)]
    assert not torch.equal(early, same[0]) and not torch.equal(late, same[1])


@torch.no_grad()
def test_each_gate_acts_in_its_place(untrained):
    """Closed: no interaction is branches apart, no background is injected, no fusion leaves the identity path alone."""
    noisy, text = rows(untrained)
    branches = disturbed(BranchUNet(untrained.unet, 4, 0, compensation=True, gates="neutral"))
    behind, other = (
        branches.background_features(normal(1, 12, 16, 16, seed=seed), STEP, untrained.embed([""])) for seed in (5, 6)
    )
    outputs = []
    for layer in (m for m in branches.modules() if isinstance(m, Attention)):
        layer.register_forward_hook(lambda layer, given, output: outputs.append(output.abs().max()))

    def passed(closed=None, background=behind, apart=False):
        outputs.clear()
        for processor in branches.processors:
            processor.gates.slope.zero_()
            processor.gates.offset.copy_(torch.tensor([-40.0 if kind == closed else 0.0 for kind in gates.KINDS]))
            processor.apart = apart
        return branches(noisy, STEP, text, background)

    def alike(a, b):
        return torch.allclose(a, b, atol=1e-4)

    whole, apart = passed(), passed(apart=True)
    assert alike(passed("interaction"), apart) and not alike(whole, apart)
    assert alike(passed("background"), passed("background", other)) and not alike(whole, passed(background=other))
    assert not alike(passed("fusion"), whole) and max(outputs) < 1e-6


def test_gates_by_hand():
    tau = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(gates.Gates("neutral")(tau), torch.ones(3, 3))
    prior = gates.Gates("prior")(tau)
    assert torch.allclose(prior[0], 2 * torch.sigmoid(torch.tensor([-1.0, 0.0, 1.0])))
    assert (prior[0].diff() > 0).all() and (prior[1].diff() < 0).all() and torch.equal(prior[1], prior[2])
    fixed, cosine = gates.Gates("fixed"), gates.Gates("cosine")
    assert torch.equal(fixed(tau), prior) and torch.allclose(cosine(tau), prior, atol=1e-6)
    between = 1 - np.tanh(np.array(gates.PRIOR) / 4) * np.cos(np.pi / 4)
    assert cosine(torch.tensor([0.25]))[:, 0].tolist() == pytest.approx(between.tolist())
    assert not [*fixed.parameters(), *cosine.parameters()]


def test_a_lora_a_class_by_hand():
    """Rank 2 for each of two classes: B diag(s_c) A is B_c A_c, and each A starts as a LoRA's of rank 2 does."""
    linear = torch.nn.Linear(5, 4, bias=False)
    drawn, up = linear.weight.detach().clone(), normal(6, 4)
    layer = Separate(linear, 2, Rows())
    assert torch.equal(layer.weight, 2 * drawn)
    for k in range(2):
        own = slice(2 * k, 2 * k + 2)
        assert torch.allclose(up @ layer.of_class(torch.tensor([k])), up[:, own] @ layer.weight[own], atol=1e-6)
    assert torch.allclose(layer.of_class(None), layer.weight / 2)
    with layer.rows.of(torch.tensor([1, 0])):
        found = layer(hidden := normal(2, 3, 5))
    entered = hidden @ layer.weight.T
    assert (found[0, :, :2] == 0).all() and torch.equal(found[0, :, 2:], entered[0, :, 2:])
    assert (found[1, :, 2:] == 0).all() and torch.equal(found[1, :, :2], entered[1, :, :2])


def test_a_unet_whose_attention_adds_its_own_input_is_refused(untrained):
    unet = copy.deepcopy(untrained.unet)
    next(m for m in unet.modules() if isinstance(m, Attention)).residual_connection = True
    with pytest.raises(ValueError, match="an attention layer of this UNet adds its own input to its output"):
        BranchUNet(unet, 4, 0)


def mask(*box):
    found = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    found[0, 0, box[0] : box[1], box[2] : box[3]] = True
    return found


def test_weights_by_hand():
    """One of 16 x 16 cells inside, a band of eight around it and itself: 1 + 4 + 2, 1 + 2, and 1 elsewhere."""
    found = guidance.spatial_weights(mask(32, 36, 32, 36), (16, 16), mask_weight=4, band_weight=2, radius=1)
    total = 7 + 8 * 3 + (256 - 9)
    assert found[0, 0, 8, 8] == pytest.approx(7 * 256 / total) and found[0, 0, 7, 8] == pytest.approx(3 * 256 / total)
    assert found[0, 0, 0, 0] == pytest.approx(256 / total) and found.mean() == pytest.approx(1)


def test_a_crack_of_one_pixel_weighs():
    found = guidance.spatial_weights(mask(10, 11, 5, 60), (16, 16), mask_weight=4, band_weight=0)
    assert found[0, 0, 2, 5] == pytest.approx(5 * found[0, 0, 9, 9].item())


def test_a_large_defect_takes_half_at_most():
    found = guidance.spatial_weights(mask(0, 64, 0, 28), (16, 16), mask_weight=4, band_weight=0)
    assert found[0, 0, :, :7].sum() / found.sum() == pytest.approx(0.5)
    most = guidance.spatial_weights(mask(0, 64, 0, 60), (16, 16), mask_weight=4, band_weight=0)
    assert torch.allclose(most, torch.ones(1, 1, 16, 16)), "one that covers most is not favoured"


def test_without_weights_all_are_one():
    masks = torch.cat([mask(10, 20, 10, 30), torch.zeros(1, 1, 64, 64, dtype=torch.bool)])
    assert torch.equal(
        guidance.spatial_weights(masks, (16, 16), mask_weight=0, band_weight=0), torch.ones(2, 1, 16, 16)
    )
    soft = guidance.spatial_weights(masks, (16, 16), mask_weight=4, band_weight=0, softness=1.5)
    assert soft[0, 0, 3, 9] > soft[0, 0, 3, 15] and torch.equal(soft[1], torch.ones(1, 16, 16))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_errors_of_x0(kind):
    """min(SNR, 5) |x_0 - x_0'|^2 for a wrong prediction, against diffusers' own x_0."""
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    clean, wrong, timesteps = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([20, 400, 900])
    noisy, _, target = diffusion.noised(clean, scheduler, torch.Generator().manual_seed(0), timesteps)
    scheduler.set_timesteps(1000)
    weights = guidance.min_snr(timesteps, scheduler)
    for i, t in enumerate(timesteps):
        guess = scheduler.step(wrong[i : i + 1], t, noisy[i : i + 1]).pred_original_sample
        alpha_bar = scheduler.alphas_cumprod[t]
        expected = (alpha_bar / (1 - alpha_bar)).clamp_max(5) * (guess - clean[i : i + 1]).square()
        assert torch.allclose(weights[i] * (wrong[i] - target[i]).square(), expected[0], rtol=2e-2, atol=1e-4)
