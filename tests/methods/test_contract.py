"""One contract for all methods: a method is tested by existing."""

import pytest
import torch

from defectlib import sampling
from defectlib.methods import base
from defectlib.types import Sample, Shot

SIZE = 64
PROMPTS = {"crack": "a plate with a crack", "stain": "a plate with a stain"}


def surface(seed):
    """A dark plate that lies on a light, plain ground."""
    noise = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    picture = (noise - 0.5) * 0.05 + 0.9
    picture[:, 4:60, 4:60] = (noise[:, 4:60, 4:60] - 0.5) * 0.3 + 0.2
    return picture


def shot(defect, k):
    image, mask = surface(100 + k), torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    if defect == "crack":
        mask[0, 10 + 3 * k : 12 + 3 * k, 8:50] = True
    else:
        mask[0, 20 : 36 + k, 12 + k : 30] = True
    return Shot(torch.where(mask, torch.full_like(image, -0.9), image), mask, "plate", defect, f"{k:03d}")


SHOTS = [shot(defect, k) for defect in PROMPTS for k in range(3)]
NORMALS = [surface(k) for k in range(4)]
# Fewer steps than the papers' for what is trained; a method that is not named here runs with its defaults.
QUICK = {
    "defectsynth": {"steps": 2, "train_batch_size": 2, "num_inference_steps": 2, "batch_size": 3},
    "dualanodiff": {"steps": 2, "train_batch_size": 2, "rank": 4, "num_inference_steps": 2, "batch_size": 3},
    "adabldm": {
        "steps": 2, "composites": 6, "train_batch_size": 2, "adapt_steps": 1, "num_inference_steps": 4,
        "batch_size": 3, "decoder_steps": 2,
    },
    "symmetry_aware": {"steps": 2, "train_batch_size": 2, "rank": 4, "num_inference_steps": 2, "batch_size": 3},
}  # fmt: skip


# Beside each method as it is: what changes the path that its samples take.
FORMS = [*((name, {}) for name in base.names()), ("dualanodiff", {"compensation": True}),
         ("dualanodiff", {"compensation": True, "released": True}),
         ("symmetry_aware", {"compensation": True, "gates": "prior"}),
         ("symmetry_aware", {"adapters": "shared", "gates": "cosine", "x0_space": True}),
         ("symmetry_aware", {"adapters": "separate", "gates": "fixed"})]  # fmt: skip


def mask_source(rng, shots, normal):
    return shots[rng.integers(len(shots))].mask


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: "-".join([form[0], *form[1]]))
def fitted(request, untrained, tmp_path_factory):
    name, changes = request.param
    cls = base.get(name)
    method = cls(base.configure(name, QUICK.get(name, {}) | changes), untrained)
    method.fit(SHOTS, NORMALS, prompts=PROMPTS, seed=0, workdir=tmp_path_factory.mktemp("fit"))
    source = None if cls.makes_masks else mask_source
    return method, sampling.plan(
        SHOTS, NORMALS, 4, source, 0, PROMPTS, group_size=2, one_normal_a_group=cls.one_normal_a_group
    )


def same(a: Sample, b: Sample):
    return torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)


def test_one_sample_a_request_in_order(fitted):
    method, requests = fitted
    samples = method.sample(requests)
    assert [(s.seed, s.group, s.category, s.defect) for s in samples] == [
        (r.seed, r.group, r.category, r.defect) for r in requests
    ]
    assert all(s.image.shape == (3, SIZE, SIZE) for s in samples), "ranges and types are checked by Sample itself"


def test_same_request_same_image_whatever_the_batch(fitted):
    method, requests = fitted
    whole = {s.seed: s for s in method.sample(requests)}
    groups = {}
    for request in requests:
        groups.setdefault(request.group, []).append(request)
    # Three at a time: a group of two shares its batch with another in the whole, and with padding by itself.
    for group in reversed(groups.values()):
        assert all(same(s, whole[s.seed]) for s in method.sample(group))
    turned = [request for group in reversed(groups.values()) for request in group]
    assert all(same(s, whole[s.seed]) for s in method.sample(turned))


def test_other_seeds_draw_other_images(fitted):
    method, requests = fitted
    samples = [s for s in method.sample(requests) if s.defect == "stain"]
    assert not any(same(a, b) for i, a in enumerate(samples) for b in samples[:i])


def test_the_global_random_state_is_neither_used_nor_moved(fitted):
    method, requests = fitted
    torch.manual_seed(1)
    first = method.sample(requests[:2])
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = method.sample(requests[:2])
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_defect_is_really_drawn(fitted):
    method, requests = fitted
    for request, sample in zip(requests, method.sample(requests), strict=True):
        assert sampling.teaches(sample) or (method.makes_masks and sample.notes["flaw"])
        if not sample.mask.any():
            continue
        change = (sample.image - request.normal).abs().mean(0, keepdim=True)
        assert change[sample.mask].mean() > 0.05
        if method.preserves_background:
            assert (change[~sample.mask] == 0).all()
        if not method.makes_masks:
            assert torch.equal(sample.mask, request.mask)


def test_save_and_load_give_the_same_images(fitted, untrained, tmp_path):
    method, requests = fitted
    method.save(tmp_path)
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} <= {".safetensors", ".json"}
    loaded = type(method).load(tmp_path, untrained)
    assert loaded.config == method.config
    assert all(same(a, b) for a, b in zip(loaded.sample(requests), method.sample(requests), strict=True))


def test_fit_is_a_function_of_its_seed(fitted, untrained, tmp_path):
    method, requests = fitted
    again = type(method)(method.config, untrained)
    again.fit(SHOTS, NORMALS, prompts=PROMPTS, seed=0, workdir=tmp_path)
    assert all(same(a, b) for a, b in zip(again.sample(requests[:2]), method.sample(requests[:2]), strict=True))


def test_an_unknown_defect_is_one_sentence(fitted):
    method, requests = fitted
    request = type(requests[0])(requests[0].normal, requests[0].mask, "plate", "dent", "a plate with a dent", 1, 1)
    with pytest.raises(ValueError, match="dent"):
        method.sample([request])


def test_unknown_configuration_is_refused(fitted):
    with pytest.raises(ValueError, match="no_such_field"):
        base.configure(type(fitted[0]).name, {"no_such_field": 1})


def test_no_shots_is_refused(fitted, untrained, tmp_path):
    with pytest.raises(ValueError, match="at least one shot"):
        method = type(fitted[0])(fitted[0].config, untrained)
        method.fit([], NORMALS, prompts=PROMPTS, seed=0, workdir=tmp_path)


@pytest.mark.parametrize("name", base.names())
def test_fields_of_drawing_are_fields_and_leave_a_fit_valid(name):
    config = base.configure(name, QUICK.get(name, {}))
    assert set(config.DRAWING) <= set(type(config).model_fields)
    assert set(config.fit_values()) == set(type(config).model_fields) - set(config.DRAWING)
