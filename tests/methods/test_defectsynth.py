"""DefectSynth on an untrained base model: each idea changes the picture, and each fault is one sentence."""

import pytest
import torch

from defectlib.control import denoising_loss, embedded_once
from defectlib.diffusion import reach, to_latents
from defectlib.methods import defectsynth
from defectlib.methods.defectsynth import DefectSynth, DefectSynthConfig
from defectlib.types import Request, Shot

PROMPTS = {"hole": "a plate with a hole"}
QUICK = {"steps": 2, "train_batch_size": 2, "num_inference_steps": 3, "batch_size": 2}


def picture(seed):
    return torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) * 0.4 - 0.2


def disc(y, x, radius):
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)[None]


SHOTS = [
    Shot(
        picture(k).where(~disc(20 + 4 * k, 30, 6), torch.tensor(-0.9)), disc(20 + 4 * k, 30, 6), "plate", "hole", f"{k}"
    )
    for k in range(3)
]


def request(seed, group=0, mask=None):
    return Request(
        picture(50 + seed), disc(40, 36, 7) if mask is None else mask, "plate", "hole", PROMPTS["hole"], seed, group
    )


REQUESTS = [request(1), request(2)]


@pytest.fixture(scope="module")
def fitted(untrained, tmp_path_factory):
    method = DefectSynth(DefectSynthConfig(**QUICK), untrained)
    method.fit(SHOTS, [], prompts=PROMPTS, seed=0, workdir=tmp_path_factory.mktemp("fit"))
    return method


def with_config(method, **changes):
    other = DefectSynth(method.config.model_copy(update=changes), method.backbone)
    other.shots, other.controlnet = method.shots, method.controlnet
    return other


def images(method, requests=REQUESTS):
    return torch.stack([sample.image for sample in method.sample(requests)])


@pytest.mark.parametrize(
    "change",
    [
        {"sae": False}, {"sff": False}, {"sae_form": "released"}, {"sae_softmax": "image"}, {"sae_cap": 1.1},
        {"sff_within": "image"}, {"eta": 1.0}, {"guidance_scale": 4.0}, {"dilation": 0.5}, {"controlnet_scale": 0.0},
        {"match_colours": True}, {"num_inference_steps": 6}, {"sff_rate": 0.9}, {"sff_base_weight": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_every_field_changes_the_picture(fitted, change):
    assert not torch.equal(images(fitted), images(with_config(fitted, **change)))


def test_outside_the_mask_the_latents_are_the_normals(fitted):
    latents = with_config(fitted, sff=False)._denoise(REQUESTS)
    for drawn, asked in zip(latents, REQUESTS, strict=True):
        normal = fitted.backbone.encode(asked.normal[None])[0]
        inside = to_latents(asked.mask[None], (16, 16))[0, 0]
        assert torch.allclose(drawn[:, ~inside], normal[:, ~inside], atol=1e-5)
        assert (drawn - normal)[:, inside].abs().mean() > 0.05


def test_fusion_needs_a_second_sample_and_never_leaves_its_group(fitted):
    alone = images(fitted, [request(1, group=1)])
    assert torch.equal(alone, images(with_config(fitted, sff=False), [request(1, group=1)]))
    assert not torch.equal(alone[0], images(fitted)[0])
    apart = images(fitted, [request(1, group=1), request(2, group=2)])
    assert torch.equal(apart[0], alone[0])


def test_a_sample_does_not_depend_on_how_many_are_drawn(fitted):
    many = [request(k, group=k // 2) for k in range(6)]
    assert torch.equal(images(fitted, many)[2:4], images(fitted, many[2:4]))


def test_training_moves_the_controlnet_alone(fitted, untrained, tmp_path):
    before = untrained.unet.conv_in.weight.clone()
    method = DefectSynth(fitted.config.model_copy(update={"steps": 20, "learning_rate": 1e-3}), untrained)
    method.fit(SHOTS, [], prompts=PROMPTS, seed=0, workdir=tmp_path)
    assert torch.equal(untrained.unet.conv_in.weight, before)
    assert any(p.abs().max() > 0 for p in method.controlnet.controlnet_down_blocks.parameters()), "zero-initialised"


def test_the_hint_is_embedded_once_to_the_same_residuals(fitted):
    net, hint = fitted.controlnet, REQUESTS[0].mask.float().expand(1, 3, -1, -1)
    embedding, calls = net.controlnet_cond_embedding, []
    latents, text = torch.randn(1, 12, 16, 16), fitted.backbone.embed([PROMPTS["hole"]])
    plain = net(latents, 500, text, hint, return_dict=False)
    handle = embedding.register_forward_hook(lambda *_: calls.append(1))
    with embedded_once(net, hint) as embedded:
        once = [net(latents, 500, text, embedded, return_dict=False) for _ in range(2)][1]
    handle.remove()
    assert len(calls) == 1 and net.controlnet_cond_embedding is embedding
    assert all(torch.equal(a, b) for a, b in zip([*plain[0], plain[1]], [*once[0], once[1]], strict=True))
    with pytest.raises(RuntimeError, match="in the loop"), embedded_once(net, hint):
        raise RuntimeError("in the loop")
    assert net.controlnet_cond_embedding is embedding


def test_what_was_released_is_a_configuration():
    released = DefectSynthConfig.as_released()
    assert (released.eta, released.num_inference_steps, released.sae_form) == (1.0, 50, "released")
    assert (released.sff_form, released.match_colours, released.sff_within) == ("released", True, "mask")
    # systems.md 1.3: floor((t + 100) * 16 / 1000) cells of 64 at every seventh of 50 steps.
    assert [reach(981 - 20 * i, 64, released.dilation) for i in range(0, 50, 7)] == [17, 15, 12, 10, 8, 6, 3, 1]
    assert DefectSynthConfig.as_released(num_inference_steps=4).num_inference_steps == 4


def test_the_released_fusion_does_nothing_in_a_group_of_two_and_sums_above_one_in_three(fitted):
    assert torch.equal(images(with_config(fitted, sff_form="released")), images(with_config(fitted, sff=False)))
    three = [request(k) for k in (1, 2, 3)]
    form = {"sff_form": "released", "batch_size": 3}
    latents = torch.ones(3, 12, 16, 16)
    fused = with_config(fitted, **form, sff_rate=1.0)._fused(latents, three, 0)
    inside = to_latents(torch.stack([r.mask for r in three]), (16, 16)).expand_as(fused)
    assert torch.allclose(fused[inside], torch.tensor(0.7 + 0.3 * 2)) and (fused[~inside] == 1).all()


def test_training_options_change_the_weights_or_do_not(untrained, tmp_path):
    def weights(**changes):
        method = DefectSynth(DefectSynthConfig(**QUICK | {"learning_rate": 1e-3} | changes), untrained)
        method.fit(SHOTS, [], prompts=PROMPTS, seed=0, workdir=tmp_path)
        return torch.cat([p.flatten() for p in method.controlnet.parameters()])

    plain = weights()
    assert torch.equal(weights(gradient_checkpointing=True), plain), "the same sums, made twice"
    assert not untrained.unet.is_gradient_checkpointing, "others draw with this base model"
    for changes in ({"mask_weight": 5.0}, {"flips": True}, {"crops": 2}):
        assert not torch.equal(weights(**changes), plain), changes
    assert 0 < (weights(precision="bf16") - plain).abs().max() < 0.01


def test_a_killed_fit_ends_at_the_same_bits(untrained, tmp_path, monkeypatch):
    def fitted(folder, killed_at=None):
        calls = []

        def loss(*arguments):
            calls.append(arguments)
            if len(calls) == killed_at:
                raise KeyboardInterrupt
            return denoising_loss(*arguments)

        monkeypatch.setattr(defectsynth, "denoising_loss", loss)
        method = DefectSynth(DefectSynthConfig(**QUICK | {"steps": 4, "learning_rate": 1e-3}), untrained)
        method.fit(SHOTS, [], prompts=PROMPTS, seed=0, workdir=folder)
        return len(calls), torch.cat([p.flatten() for p in method.controlnet.parameters()])

    _, whole = fitted(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "b", killed_at=4)
    state = torch.get_rng_state()
    steps, resumed = fitted(tmp_path / "b")
    assert steps == 1 and torch.equal(resumed, whole)
    with pytest.raises(KeyboardInterrupt):
        fitted(tmp_path / "c", killed_at=4)
    monkeypatch.setitem(PROMPTS, "hole", "another text")
    assert fitted(tmp_path / "c")[0] == 4, "what was learned of other prompts is not gone on with"
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), state), "a checkpoint does not move the caller's random numbers"


def test_another_batch_size_moves_a_pixel_by_a_grey_level_at_most(fitted):
    four = [request(k, group=k) for k in range(4)]
    alone, together = (images(with_config(fitted, batch_size=size, sff=False), four) for size in (1, 4))
    assert (alone - together).abs().max() <= 1 / 127.5


@pytest.mark.parametrize("within", ["mask", "image"])
def test_what_a_group_lends_does_not_depend_on_the_batch_size(fitted, within):
    four = [request(k) for k in range(4)]
    alone, together = (images(with_config(fitted, batch_size=size, sff_within=within), four) for size in (1, 4))
    assert (alone - together).abs().max() <= 1 / 127.5


def test_epochs_become_steps():
    assert DefectSynthConfig().fit_settings(9, 3).steps == 2000 * 5
    assert DefectSynthConfig(steps=7).fit_settings(9, 3).steps == 21, "of a defect"


def test_faults_are_one_sentence(fitted, untrained, tmp_path):
    with pytest.raises(ValueError, match="needs a base model"):
        DefectSynth(fitted.config)
    with pytest.raises(ValueError, match="there is no prompt for the defect hole"):
        DefectSynth(fitted.config, untrained).fit(SHOTS, [], prompts={}, seed=0, workdir=tmp_path)
    with pytest.raises(ValueError, match="request 1 has no mask or an all-black one"):
        fitted.sample([request(1, mask=torch.zeros(1, 64, 64, dtype=torch.bool))])
    with pytest.raises(ValueError, match="is not fitted"):
        DefectSynth(fitted.config, untrained).sample(REQUESTS)
    fitted.save(tmp_path)
    described = (tmp_path / "method.json").read_text().replace(untrained.digest, "0" * 64)
    (tmp_path / "method.json").write_text(described)
    with pytest.raises(ValueError, match="was fitted on another base model than .*: fit it anew"):
        DefectSynth.load(tmp_path, untrained)


def test_one_shot_is_enough_to_start(untrained, tmp_path):
    method = DefectSynth(DefectSynthConfig(**QUICK), untrained)
    method.fit(SHOTS[:1], [], prompts=PROMPTS, seed=0, workdir=tmp_path)
    assert images(method).isfinite().all()


def test_after_no_steps_the_base_model_draws_alone(fitted, untrained, tmp_path):
    method = DefectSynth(fitted.config.model_copy(update={"steps": 0}), untrained)
    method.fit(SHOTS, [], prompts=PROMPTS, seed=0, workdir=tmp_path)
    assert method.curve == []
    assert torch.equal(images(method), images(with_config(method, controlnet_scale=0.0)))


def test_an_adapted_base_model_is_kept_with_the_method(fitted, untrained, tmp_path):
    values = {"adapt_steps": 2, "adapt_rank": 2, "adapt_learning_rate": 1e-2}
    method = DefectSynth(fitted.config.model_copy(update=values), untrained)
    with pytest.raises(ValueError, match="no normal image to adapt the base model to"):
        method.fit(SHOTS, [], prompts=PROMPTS, seed=0, workdir=tmp_path)
    method.fit(SHOTS, [picture(9)], prompts=PROMPTS, seed=0, workdir=tmp_path)
    method.save(tmp_path)
    assert not torch.equal(images(method), images(fitted)) and not (tmp_path / "adaptation").exists()
    again = DefectSynth.load(tmp_path, untrained)
    assert torch.equal(images(again), images(method))
