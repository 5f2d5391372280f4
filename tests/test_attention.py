import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig
from torch import nn

from defectlib import attention
from defectlib.attention import (
    AttentionWeights,
    ReweightedAttnProcessor,
    reweighted,
    selective_weights,
    text_maps,
    watched_text,
    watched_weights,
)


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(*rows):
    """Two channels of which the second never differs: the mean over channels is half the square of the first."""
    first = torch.tensor(rows, dtype=torch.float32)[None, None]
    return torch.cat([first, torch.zeros_like(first)], 1)


MASK = torch.tensor([[True, True], [False, False]])[None, None]
STEP = math.sqrt(2 * math.log(3))


@pytest.mark.parametrize(
    ("softmax_over", "expected"),
    [
        # Inside: softmax(0, ln 3) = (1/4, 3/4), times two pixels, + 1.
        ("mask", [[1.5, 2.5], [1, 1]]),
        # All four: (1, 3, 1, 1) / 6; the difference of 9 outside the mask does not count, its share of weight does.
        ("image", [[4 / 3, 2], [4 / 3, 4 / 3]]),
    ],
)
def test_equation_7_by_hand(softmax_over, expected):
    reference = by_hand([0, STEP], [9, 0])
    found = selective_weights(reference, torch.zeros_like(reference), MASK, softmax_over=softmax_over)
    assert found.dtype == torch.float32 and torch.allclose(found[0, 0], torch.tensor(expected), atol=1e-6)


def test_the_released_form_by_hand():
    """Half squares 1, 2, 4 inside and 0 outside the mask: a quarter, a half, and the whole of the range."""
    mask = torch.tensor([[True, True], [True, False]])[None, None]
    reference = by_hand([math.sqrt(2), 2], [math.sqrt(8), 7])
    found = selective_weights(reference, torch.zeros_like(reference), mask, form="released")
    assert torch.allclose(found[0, 0], torch.tensor([[1.25, 1.5], [2, 1]]), atol=1e-6)
    # With no pixel outside, the smallest difference is the zero of the scale.
    whole = selective_weights(by_hand([0, 2], [2, 2]) + 1, torch.zeros(1, 2, 2, 2), MASK | True, form="released")
    assert whole.min() == 1 and whole.max() == 2


def test_the_mean_inside_is_two_and_a_cap_cuts_the_tail():
    mask = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    mask[..., 3:9, 2:12] = True
    reference, latents = 2 * normal(0, 1, 4, 16, 16), normal(1, 1, 4, 16, 16)
    free = selective_weights(reference, latents, mask)
    assert free[mask].mean().item() == pytest.approx(2, abs=1e-5) and (free[~mask] == 1).all()
    assert free.max() > 5
    capped = selective_weights(reference, latents, mask, cap=5)
    assert torch.equal(capped, free.clamp(max=5)), "what is cut is not handed on"


@pytest.mark.parametrize("options", [{}, {"softmax_over": "image"}, {"form": "released"}])
def test_a_sample_does_not_depend_on_its_batch_and_an_empty_mask_gives_ones(options):
    reference, latents = normal(2, 3, 4, 8, 8), normal(3, 3, 4, 8, 8)
    mask = normal(4, 3, 1, 8, 8) > 0.5
    mask[1] = False
    whole = selective_weights(reference, latents, mask, **options)
    assert (whole[1] == 1).all() and (whole[0] > 1).any()
    for i in range(3):
        alone = selective_weights(reference[i : i + 1], latents[i : i + 1], mask[i : i + 1], **options)
        assert torch.equal(alone[0], whole[i])
    same = selective_weights(latents, latents, mask, **options)
    assert torch.isfinite(same).all(), "no difference at all"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": torch.zeros(1, 4, 8, 7)}, "must both be"),
        ({"mask": torch.zeros(1, 1, 8, 8)}, "mask must be bool"),
        ({"mask": torch.zeros(1, 1, 64, 64, dtype=torch.bool)}, r"mask must be bool \(1, 1, 8, 8\)"),
        ({"softmax_over": "pixels"}, "softmax_over"),
        ({"form": "code"}, "form"),
        ({"cap": 0.5}, "cap must be at least 1"),
    ],
)
def test_wrong_input_is_one_sentence(change, message):
    given = {
        "reference": torch.zeros(1, 4, 8, 8), "latents": torch.zeros(1, 4, 8, 8),
        "mask": torch.zeros(1, 1, 8, 8, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        selective_weights(**given | change)


def test_weights_on_a_coarser_level_are_means_and_repeat_for_guidance():
    holder = AttentionWeights()
    weights = torch.arange(32.0).reshape(2, 1, 4, 4)
    holder.set(weights)
    rows = holder.rows(torch.zeros(4, 4, 3))
    assert rows.shape == (4, 4, 1) and rows.dtype == torch.float32
    assert rows[:, :, 0].tolist() == [[2.5, 4.5, 10.5, 12.5], [18.5, 20.5, 26.5, 28.5]] * 2
    assert torch.equal(holder.rows(torch.zeros(2, 16, 3))[:, :, 0], weights.flatten(1))
    assert holder.rows(torch.zeros(2, 1, 3, dtype=torch.float16)).tolist() == [[[7.5]], [[23.5]]]
    holder.set(torch.rand(1, 1, 5, 6))
    assert holder.rows(torch.zeros(1, 9, 3)).shape == (1, 9, 1), "odd sides are halved upwards, as convolutions do"
    with pytest.raises(ValueError, match="no halving of weights of 5 x 6 has 10 pixels"):
        holder.rows(torch.zeros(1, 10, 3))
    holder.set(weights)
    with pytest.raises(ValueError, match="2 weight maps cannot serve a batch of 3"):
        holder.rows(torch.zeros(3, 16, 3))
    with pytest.raises(ValueError, match="weights must be"):
        holder.set(weights[0])


def layer(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Attention(**{"query_dim": 16, "cross_attention_dim": 12, "heads": 4, "dim_head": 4} | options).eval()


def materialised(attn, hidden, text, weights):
    """Equation 8 as printed: w times the softmax, a full (queries, keys) matrix, then times V."""

    def split(x):
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    query, key, value = split(attn.to_q(hidden)), split(attn.to_k(text)), split(attn.to_v(text))
    scores = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, -1)
    out = (weights.flatten(2)[..., None] * scores) @ value
    return attn.to_out[0](out.transpose(1, 2).flatten(2))


def test_equation_8_equals_its_materialised_form_and_its_gradient():
    attn, holder = layer(), AttentionWeights()
    weights = 1 + 9 * torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    text, results = normal(1, 2, 7, 12), []
    attn.set_processor(ReweightedAttnProcessor(holder))
    holder.set(weights)
    for form in (lambda x: attn(x, text), lambda x: materialised(attn, x, text, weights)):
        hidden = normal(0, 2, 64, 16).requires_grad_()
        out = form(hidden)
        out.square().sum().backward()
        results.append((out.detach(), hidden.grad))
    (ours, ours_grad), (printed, printed_grad) = results
    assert (ours - printed).abs().max() <= 1e-5
    assert torch.allclose(ours_grad, printed_grad, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(attn(hidden, text), ours), "in place or not"
        holder.set(torch.ones_like(weights))
        assert (attn(hidden, text) - ours).abs().max() > 0.1, "on differs from off"


CASES = [
    (True, {}, {"attention_mask": torch.tensor([0.0, 0, -1e4]).expand(2, 1, 3)}),
    (True, {"cross_attention_norm": "layer_norm", "qk_norm": "layer_norm", "bias": True}, {}),
    (True, {"norm_num_groups": 4, "rescale_output_factor": 2.0}, {}),
    (False, {"norm_num_groups": 4, "residual_connection": True}, {}),
    # diffusers' spatial norm has 32 groups.
    (False, {"query_dim": 32, "spatial_norm_dim": 5}, {"temb": normal(3, 2, 5, 4, 4)}),
]


@pytest.mark.parametrize(("flat", "options", "arguments"), CASES)
def test_without_weights_every_bit_is_the_stock_processors(flat, options, arguments):
    attn, text = layer(**options), normal(2, 2, 3, 12)
    hidden = normal(1, 2, 16, 16) if flat else normal(1, 2, options.get("query_dim", 16), 4, 4)
    holder = AttentionWeights()
    with torch.no_grad():
        attn.set_processor(AttnProcessor2_0())
        stock = attn(hidden, text, **arguments)
        attn.set_processor(ReweightedAttnProcessor(holder))
        assert torch.equal(attn(hidden, text, **arguments), stock)
        holder.set(torch.ones(2, 1, 4, 4))
        assert torch.equal(attn(hidden, text, **arguments), stock)
        holder.set(torch.full((2, 1, 4, 4), 3.0))
        assert not torch.allclose(attn(hidden, text, **arguments), stock, atol=1e-3)


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=4,
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=12,
            attention_head_dim=2,
        ).eval()  # fmt: skip


def predict(unet, latents, text):
    with torch.no_grad():
        return unet(latents, 500, text).sample


def test_a_unet_is_reweighted_at_every_level_and_restored(unet, monkeypatch):
    latents, text = normal(0, 2, 3, 8, 8), normal(1, 2, 3, 12)
    before, stock = dict(unet.attn_processors), predict(unet, latents, text)
    holder, sizes = AttentionWeights(), []
    pool = attention.F.adaptive_avg_pool2d
    monkeypatch.setattr(attention.F, "adaptive_avg_pool2d", lambda w, size: sizes.append(size) or pool(w, size))
    with reweighted(unet, holder):
        changed = {name for name, processor in unet.attn_processors.items() if processor is not before[name]}
        assert changed == {name for name in before if "attn2" in name}
        assert torch.equal(predict(unet, latents, text), stock)
        holder.set(torch.full((2, 1, 8, 8), 4.0))
        strong = predict(unet, latents, text)
        assert (strong - stock).abs().max() > 1e-3
        assert sizes == [(8, 8), (4, 4)], "once a level, however many layers"
        holder.set(torch.full((2, 1, 8, 8), 2.0))
        assert not torch.equal(predict(unet, latents, text), strong), "the next step reads its own weights"
    assert unet.attn_processors == before and torch.equal(predict(unet, latents, text), stock)
    with pytest.raises(RuntimeError, match="in the loop"), reweighted(unet, holder):
        raise RuntimeError("in the loop")
    assert unet.attn_processors == before


def test_guidance_repeats_the_weights_for_both_halves(unet):
    latents, texts, holder = normal(0, 2, 3, 8, 8), normal(1, 4, 3, 12), AttentionWeights()
    weights = 1 + 4 * normal(2, 2, 1, 8, 8).abs()
    with reweighted(unet, holder):
        holder.set(weights)
        both = predict(unet, torch.cat([latents] * 2), texts)
        for i in range(4):
            holder.set(weights[i % 2, None])
            alone = predict(unet, latents[i % 2, None], texts[i, None])
            assert torch.allclose(both[i], alone[0], atol=1e-5)


def test_lora_layers_in_place_of_projections_are_called(unet):
    latents, text, holder = normal(0, 1, 3, 8, 8), normal(1, 1, 3, 12), AttentionWeights()
    plain = predict(unet, latents, text)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet.add_adapter(config)
    adapted = predict(unet, latents, text)
    with reweighted(unet, holder):
        assert torch.equal(predict(unet, latents, text), adapted)
        holder.set(torch.full((1, 1, 8, 8), 4.0))
        assert (predict(unet, latents, text) - adapted).abs().max() > 1e-3
    unet.delete_adapters("default")
    assert not torch.allclose(plain, adapted, atol=1e-4)


def test_a_model_without_cross_attention_or_with_trained_processors_is_refused(unet):
    with pytest.raises(ValueError, match="no cross-attention layer named attn2"), reweighted(nn.Linear(2, 2), None):
        pass

    class Trained(nn.Module):
        pass

    block = nn.ModuleDict({"attn2": layer()})
    block["attn2"].set_processor(Trained())
    with pytest.raises(ValueError, match="attn2 has a processor with weights of its own"), reweighted(block, None):
        pass
    assert isinstance(block["attn2"].processor, Trained)


def test_the_weights_of_every_step_can_be_watched(unet):
    latents, text, holder = normal(0, 2, 3, 8, 8), normal(1, 2, 3, 12), AttentionWeights()
    first, second = 1 + normal(2, 2, 1, 8, 8).abs(), 1 + normal(3, 2, 1, 8, 8).abs()
    with watched_weights(unet) as seen:
        predict(unet, latents, text)
        with reweighted(unet, holder):
            predict(unet, latents, text)
            assert seen == [], "nothing is re-weighted yet"
            for weights in (first, second):
                holder.set(weights)
                predict(unet, latents, text)
    assert [timestep for timestep, _ in seen] == [500, 500]
    assert torch.equal(seen[0][1], first) and torch.equal(seen[1][1], second)
    with reweighted(unet, holder):
        predict(unet, latents, text)
    assert len(seen) == 2, "no longer watched"


def test_watched_text_is_the_share_of_attention_and_leaves_the_model_as_it_is(unet):
    latents, text = normal(0, 2, 3, 8, 8), normal(1, 2, 3, 12)
    stock = predict(unet, latents, text)
    with watched_text(unet) as seen:
        assert torch.equal(predict(unet, latents, text), stock)
    layers = [m for name, m in unet.named_modules() if name.endswith("attn2")]
    assert sorted({tuple(shares.shape) for shares in seen}) == [(2, 16, 3), (2, 64, 3)] and len(seen) == len(layers)
    maps = text_maps(seen, (8, 8))
    assert maps.shape == (2, 3, 8, 8) and torch.allclose(maps.sum(1), torch.ones(2, 8, 8), atol=1e-5)
    predict(unet, latents, text)
    assert len(seen) == len(layers), "no longer watched"


def test_watched_text_by_hand():
    """One head of width one: the score is the product, so a cell of 1 sees the keys 0 and ln 3 as 1 to 3."""
    attn = layer(query_dim=1, cross_attention_dim=1, heads=1, dim_head=1)
    for projection in (attn.to_q, attn.to_k):
        nn.init.ones_(projection.weight)
    block = nn.ModuleDict({"attn2": attn})
    hidden, text = torch.tensor([0.0, 1, 0, 0])[None, :, None], torch.tensor([0, math.log(3)])[None, :, None]
    with watched_text(block) as seen, torch.no_grad():
        attn(hidden, encoder_hidden_states=text)
    maps = text_maps(seen, (2, 2))
    assert torch.allclose(maps[0, 1], torch.tensor([[0.5, 0.75], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="no cross-attention layer"), watched_text(nn.Linear(2, 2)):
        pass
