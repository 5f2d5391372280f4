import pytest
import torch

from defectlib import fusion
from defectlib.fusion import fuse

RELEASED = {"neighbours": "simultaneous", "similarity": "cosine"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def row(*features):
    """Latents (1, C, 1, W) from W features."""
    return torch.tensor(features, dtype=torch.float32).T[None, :, None]


def features(latents):
    return [[round(v, 4) for v in point] for point in latents[:, 0].T.tolist()]


def plain(latents, generator, rate=0.2, base_weight=0.7, masks=None, sequential=True):
    """Equation 9 read aloud: every sample, every point, every other sample."""
    fused = latents.clone()
    count, _, height, width = latents.shape
    for i in range(count):
        drawn = torch.randperm(height * width, generator=generator)[: round(rate * height * width)]
        for p in drawn.tolist():
            y, x = divmod(p, width)
            value = base_weight * fused[i, :, y, x]
            for j in range(count):
                if j != i:
                    candidates = (fused if sequential else latents)[j].flatten(1)
                    best = (fused[i, :, y, x] @ candidates).argmax()
                    value = value + (1 - base_weight) / (count - 1) * candidates[:, best]
            if masks is None or masks[i, 0, y, x]:
                fused[i, :, y, x] = value
    return fused


def test_equation_9_by_hand():
    """At rate 1 every point is drawn. Sample 0 is matched to (2, 0) and (0, 2); then 1 to what 0 has become."""
    latents = torch.cat([row((1, 0), (0, 1)), row((2, 0), (0, 2))])
    one = [[1.3, 0], [0, 1.3]]
    fused = fuse(latents, seeded(), rate=1)
    assert features(fused[0]) == one
    assert features(fused[1]) == [[1.79, 0], [0, 1.79]], "0.7 x 2 + 0.3 x 1.3"
    old = fuse(latents, seeded(), rate=1, neighbours="simultaneous")
    assert features(old[0]) == one and features(old[1]) == [[1.7, 0], [0, 1.7]], "0.7 x 2 + 0.3 x 1"
    shared = fuse(torch.cat([latents, row((4, 0), (0, 4))]), seeded(), rate=1)
    assert features(shared[0]) == [[1.6, 0], [0, 1.6]], "0.7 x 1 + 0.15 x 2 + 0.15 x 4"


def test_a_dot_product_prefers_long_features_and_cosine_aligned_ones():
    latents = torch.cat([row((1, 0)), row((0.5, 0))])
    wide = torch.cat([row((1, 0), (1, 0)), row((0.5, 0), (3, 4))])
    assert features(fuse(latents, seeded(), rate=1)[0]) == [[0.85, 0]]
    assert features(fuse(wide, seeded(), rate=1)[0]) == [[1.6, 1.2]] * 2
    assert features(fuse(wide, seeded(), rate=1, similarity="cosine")[0]) == [[0.85, 0]] * 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("neighbours", ["sequential", "simultaneous"])
def test_the_whole_equals_the_loop_over_points(neighbours, masked, monkeypatch):
    latents = normal(1, 3, 4, 8, 8)
    masks = normal(2, 3, 1, 8, 8) > 0.5 if masked else None
    wanted = plain(latents, seeded(5), masks=masks, sequential=neighbours == "sequential")
    found = fuse(latents, seeded(5), masks=masks, neighbours=neighbours)
    assert torch.allclose(found, wanted, atol=1e-6)
    monkeypatch.setattr(fusion, "SIMILARITIES", 300)
    assert torch.allclose(fuse(latents, seeded(5), masks=masks, neighbours=neighbours), wanted, atol=1e-6), "in chunks"
    if masked:
        changed = (found != latents).any(1, keepdim=True)
        assert changed.any() and not (changed & ~masks).any()
    other = "simultaneous" if neighbours == "sequential" else "sequential"
    assert not torch.allclose(fuse(latents, seeded(5), masks=masks, neighbours=other), wanted, atol=1e-3)


@pytest.mark.parametrize("released", [False, True])
def test_a_group_of_two_is_changed(released):
    """The released code replaces a single reference by the base itself: nothing changes at its default batch."""
    latents = normal(3, 2, 4, 16, 16)
    masks = torch.ones(2, 1, 16, 16, dtype=torch.bool)
    fused = fuse(latents, seeded(), **({"masks": masks} | RELEASED if released else {}))
    share = (fused != latents).any(1).float().mean((1, 2))
    assert torch.allclose(share, torch.full((2,), 51 / 256)), "rate x H x W positions, drawn without repetition"
    assert (fused - latents).abs().max() > 0.1


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("options", [{}, RELEASED])
def test_weights_sum_to_one_and_equal_samples_stay(count, options):
    """Constant latents are a fixed point only if the weights sum to one (the released ones: 0.7 + 0.3 (B - 1))."""
    constant = torch.full((count, 4, 8, 8), 1.7)
    assert torch.allclose(fuse(constant, seeded(), **options), constant, atol=1e-6)
    equal = normal(4, 1, 4, 8, 8).expand(count, -1, -1, -1)
    # A feature's dot product is largest with itself where all are of one length; the cosine needs no such condition.
    equal = equal if options else torch.nn.functional.normalize(equal, dim=1)
    assert torch.allclose(fuse(equal, seeded(), **options), equal, atol=1e-6)


def test_the_generator_alone_decides_and_the_input_is_left_alone():
    latents = normal(6, 3, 4, 8, 8)
    kept = latents.clone()
    first = fuse(latents, seeded(1))
    assert torch.equal(latents, kept)
    assert torch.equal(fuse(latents, seeded(1)), first) and not torch.equal(fuse(latents, seeded(2)), first)
    single = latents[:, :1].contiguous()
    kept = single.clone()
    assert not torch.equal(fuse(single, seeded(1)), kept) and torch.equal(single, kept), "one channel"
    half = latents.half()
    assert torch.equal(fuse(half, seeded(1)), fuse(half.float(), seeded(1)).half()), "computed in float32"


def test_one_sample_no_points_and_an_empty_mask_change_nothing():
    latents = normal(7, 3, 4, 8, 8)
    assert torch.equal(fuse(latents[:1], seeded()), latents[:1])
    assert torch.equal(fuse(latents, seeded(), rate=0), latents)
    masks = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    assert torch.equal(fuse(latents, seeded(), masks=masks), latents)
    masks[1] = True
    fused = fuse(latents, seeded(), masks=masks)
    assert torch.equal(fused[[0, 2]], latents[[0, 2]]) and not torch.equal(fused[1], latents[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(4, 8, 8)}, r"latents must be \(B, C, H, W\)"),
        ({"masks": torch.zeros(2, 1, 8, 8)}, "masks must be bool"),
        ({"masks": torch.zeros(2, 1, 64, 64, dtype=torch.bool)}, r"masks must be bool \(2, 1, 8, 8\)"),
        ({"rate": 1.2}, "rate and base_weight"),
        ({"base_weight": -0.1}, "rate and base_weight"),
        ({"neighbours": "old"}, "unknown neighbours"),
        ({"similarity": "l2"}, "unknown neighbours"),
    ],
)
def test_wrong_input_is_one_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        fuse(**{"latents": torch.zeros(2, 4, 8, 8), "generator": seeded()} | change)
