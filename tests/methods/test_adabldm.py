"""AdaBLDM on an untrained base model: its stages, its training set, its hint, and one sentence for each fault."""

import numpy as np
import pytest
import torch

from defectlib.augmentation import composite
from defectlib.diffusion import at_level, dilated, to_latents
from defectlib.masks import trimap
from defectlib.methods import adabldm
from defectlib.methods.adabldm import AdaBLDM, AdaBLDMConfig
from defectlib.training import digest
from defectlib.types import Request, Shot

PROMPTS = {"hole": "a plate with a hole"}
QUICK = {
    "steps": 2, "composites": 6, "train_batch_size": 2, "adapt_steps": 0, "num_inference_steps": 10, "batch_size": 2,
    "guidance_scale": 2.0, "decoder_steps": 2,
}  # fmt: skip


def surface(seed):
    """A dark plate on a light ground."""
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(seed)) - 0.5
    picture = noise * 0.05 + 0.9
    picture[:, 8:56, 8:56] = noise[:, 8:56, 8:56] * 0.3
    return picture


def disc(y, x, radius):
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    return ((rows - y) ** 2 + (columns - x) ** 2 <= radius**2)[None]


SHOTS = [
    Shot(surface(k).where(~disc(y, 30, 5), torch.tensor(-0.9)), disc(y, 30, 5), "plate", "hole", f"{k}")
    for k, y in enumerate((20, 24, 28))
]
NORMALS = [surface(50 + k) for k in range(3)]


def request(seed, mask=None, normal=None, defect="hole"):
    return Request(
        surface(50 + seed) if normal is None else normal, disc(40, 36, 7) if mask is None else mask, "plate", defect,
        PROMPTS["hole"], seed, seed,
    )  # fmt: skip


REQUESTS = [request(1), request(2)]


def fit(config, base, folder, shots=SHOTS, normals=NORMALS, prompts=PROMPTS):
    method = AdaBLDM(config, base)
    method.fit(shots, normals, prompts=prompts, seed=0, workdir=folder)
    return method


@pytest.fixture(scope="module")
def fitted(untrained, tmp_path_factory):
    return fit(AdaBLDMConfig(**QUICK), untrained, tmp_path_factory.mktemp("fit"))


def with_config(method, **changes):
    other = AdaBLDM(AdaBLDMConfig(**method.config.model_dump() | changes), method.base)
    other.backbone, other.states = method.backbone, method.states
    return other


def images(method, requests=REQUESTS):
    return torch.stack([sample.image for sample in method.sample(requests)])


@pytest.mark.parametrize("steps", [10, 50])
def test_the_stages_are_the_papers_fractions(steps):
    config = AdaBLDMConfig()
    stages = [config.stage((i + 1) / steps) for i in range(steps)]
    sizes = [stages.count(name) for name in ("free", "latent", "image")]
    assert sizes == [steps * 2 // 5, steps // 2, steps // 10], "20, 25 and 5 of 50 steps"
    assert stages == sorted(stages, key=["free", "latent", "image"].index)


def test_released_stages_count_as_in_the_released_loop():
    released = AdaBLDMConfig.as_released()
    stages = [released.stage((i + 1) / 50) for i in range(50)]
    # Latents are edited before the steps 26 to 45, which is after the steps 25 to 44; pixels after 45 to 49.
    assert [i for i, name in enumerate(stages) if name == "latent"] == list(range(25, 45))
    assert [i for i, name in enumerate(stages) if name == "image"] == list(range(45, 50))
    assert (released.renoise, released.adapt_steps, released.empty_prompt) == ("current", 0, 0.0)


@pytest.mark.parametrize(
    "change",
    [
        {"latent_editing": False}, {"image_editing": False}, {"decoder": None}, {"renoise": "current"},
        {"latent_from": 0.0}, {"image_from": 0.5}, {"dilation": 0.3}, {"guidance_scale": 4.0},
        {"decoder": "last_layer"}, {"decoder_steps": 5}, {"decoder_learning_rate": 1e-2},
        {"decoder_schedule": "cycle", "decoder_learning_rate": 1e-3}, {"num_inference_steps": 20},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)  # fmt: skip
def test_every_field_of_drawing_changes_the_picture(fitted, change):
    assert not torch.equal(images(fitted), images(with_config(fitted, **change)))


def test_the_list_above_holds_every_field_of_drawing():
    (mark,) = test_every_field_of_drawing_changes_the_picture.pytestmark
    named = {name for change in mark.args[1] for name in change}
    assert named | {"controlnet_scale", "batch_size"} == set(AdaBLDMConfig.DRAWING), "the scale has a test of its own"


def test_controlnet_scale_reads_the_trained_residuals(fitted, untrained, tmp_path):
    trained = fit(AdaBLDMConfig(**QUICK | {"learning_rate": 1e-3}), untrained, tmp_path)
    assert not torch.equal(images(trained), images(with_config(trained, controlnet_scale=0.0)))


def test_latent_editing_leaves_the_normals_latents_outside_the_dilated_mask(fitted):
    method = with_config(fitted, image_editing=False, image_from=1.0)
    latents = method.denoised(REQUESTS)
    normal = fitted.backbone.encode(torch.stack([r.normal for r in REQUESTS]))
    cells = dilated(to_latents(torch.stack([r.mask for r in REQUESTS]), (16, 16)), 1).expand_as(latents)
    assert torch.allclose(latents[~cells], normal[~cells], atol=1e-5)
    assert (latents - normal)[cells].abs().mean() > 0.05


def test_after_image_editing_latents_are_as_noisy_as_the_level_that_follows(fitted):
    """Their noise is white of the next step's standard deviation; the released form's is that of the step before."""
    seen = {}

    normals, masks = (torch.stack([getattr(r, part) for r in REQUESTS]) for part in ("normal", "mask"))

    def note(done, latents, x0):
        if method.config.stage(done) == "image":
            clean = fitted.backbone.encode(normals.where(~masks, fitted.backbone.decode(x0)))
            rest = latents - level(done).sqrt() * clean
            seen[method.config.renoise, round(done, 3)] = rest.std().item()
        return latents

    def level(done):
        steps, timesteps = method.config.num_inference_steps, fitted.backbone.scheduler.timesteps
        at = round(done * steps) - (method.config.renoise == "current")
        return fitted.backbone.scheduler.alphas_cumprod[timesteps[at]] if at < steps else torch.tensor(1.0)

    for renoise in ("next", "current"):
        method = with_config(fitted, renoise=renoise, image_from=0.5, latent_from=0.2)
        method.denoised(REQUESTS, [note])
        for done in (0.6, 0.8):
            wanted = (1 - level(done)).sqrt().item()
            assert seen[renoise, done] == pytest.approx(wanted, rel=0.05), (renoise, done)
    assert seen["next", 1.0] == pytest.approx(0, abs=1e-5), "after the last step no noise is left"
    assert seen["current", 0.8] > 1.1 * seen["next", 0.8]


def test_at_level_is_the_schedule_by_hand(fitted):
    scheduler = fitted.backbone.scheduler
    scheduler.set_timesteps(10)
    clean, noise = torch.ones(1, 2, 4, 4), torch.full((1, 2, 4, 4), 2.0)
    a = scheduler.alphas_cumprod[scheduler.timesteps[4]]
    assert torch.allclose(at_level(clean, noise, scheduler, 0.4), (a.sqrt() + 2 * (1 - a).sqrt()).expand(1, 2, 4, 4))
    assert torch.equal(at_level(clean, noise, scheduler, 1.0), clean)


def test_the_decoder_brings_the_background_near_the_normal_image_and_not_onto_it(fitted):
    """The measured error outside the masks, not a promise."""
    outside = ~torch.stack([r.mask for r in REQUESTS]).expand(-1, 3, -1, -1)
    normals = torch.stack([r.normal for r in REQUESTS])

    def error(**changes):
        return (images(with_config(fitted, **changes)) - normals).abs()[outside].mean().item()

    edited = error(decoder=None)
    adapted = error(decoder_steps=60, decoder_learning_rate=3e-3, decoder_schedule="cycle")
    assert 0 < adapted < 0.5 * edited
    assert not AdaBLDM.preserves_background


def test_a_sample_does_not_depend_on_how_many_are_drawn(fitted):
    one, two, three = (images(fitted, [request(k)])[0] for k in (1, 2, 3))
    assert torch.equal(images(fitted, [request(2), request(1)]), torch.stack([two, one])), "place in a batch"
    assert torch.equal(images(fitted, [request(1), request(3), request(2)]), torch.stack([one, three, two]))


def test_composites_are_functions_of_seed_and_number_inside_the_object(fitted):
    objects = [trimap.foreground(image) for image in NORMALS]
    few, more = (with_config(fitted, composites=n).composites(SHOTS, NORMALS, objects, 3) for n in (5, 20))
    assert (few.masks == more.masks[:5]).all() and torch.allclose(few.latents, more.latents[:5], atol=1e-4)
    assert (few.of_normal == more.of_normal[:5]).all() and len(set(more.of_normal)) > 1
    masks = torch.from_numpy(np.unpackbits(more.masks, axis=-1, count=64).astype(bool))
    assert all((mask <= objects[k]).all() and mask.any() for mask, k in zip(masks, more.of_normal))
    other = with_config(fitted, composites=5).composites(SHOTS, NORMALS, objects, 4)
    assert not (other.masks == few.masks).all()


def test_a_composites_black_defect_pixels_are_defect_and_its_outside_is_the_normal():
    black = Shot(surface(0).where(~disc(30, 30, 4), torch.tensor(-1.0)), disc(30, 30, 4), "plate", "hole", "b")
    image, mask = composite([black], NORMALS[0], trimap.foreground(NORMALS[0]), np.random.default_rng(0), flip=False)
    assert abs(int(mask.sum()) - int(black.mask.sum())) <= 0.4 * black.mask.sum()
    assert (image[:, mask[0]] < -0.5).float().mean() > 0.7 and torch.equal(image[:, ~mask[0]], NORMALS[0][:, ~mask[0]])


def test_the_hint_is_the_trimap_or_the_mask(fitted):
    mask, found = disc(30, 30, 4), trimap.foreground(NORMALS[0])
    hint = fitted._hints(mask[None], [found])
    assert hint.shape == (1, 3, 64, 64) and sorted(hint.unique().tolist()) == [0.0, 0.5, 1.0]
    assert torch.equal(hint[0, 0] == 1, mask[0]) and torch.equal(hint[0, 0] >= 0.5, (mask | found)[0])
    plain = with_config(fitted, hint="mask")._hints(mask[None], [found])
    assert torch.equal(plain[0], mask.float().expand(3, -1, -1))


def test_what_is_trained_on_changes_the_weights(untrained, tmp_path):
    def weights(n, **changes):
        values = QUICK | {"learning_rate": 1e-3} | changes
        state = fit(AdaBLDMConfig(**values), untrained, tmp_path / str(n)).states["hole"]
        return torch.cat([value.flatten() for value in state.values()])

    plain = weights(0)
    assert torch.equal(weights(1, gradient_checkpointing=True), plain), "the same sums, made twice"
    assert not untrained.unet.is_gradient_checkpointing, "others draw with this base model"
    for n, changes in enumerate(
        ({"hint": "mask"}, {"mask_weight": 5.0}, {"empty_prompt": 0.9}, {"placement": "as_shots"}, {"composites": 7}), 2
    ):
        assert not torch.equal(weights(n, **changes), plain), changes


def test_the_controlnet_never_reads_the_prompt(untrained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(adabldm, "denoising_loss", lambda *a, control_text, **k: seen.append((a, control_text)) or sum(
        p.sum() * 0 for p in a[0].parameters()
    ))  # fmt: skip
    fit(AdaBLDMConfig(**QUICK | {"steps": 40, "empty_prompt": 0.5}), untrained, tmp_path)
    nothing, text = untrained.embed([""])[0], untrained.embed([PROMPTS["hole"]])[0]
    assert all(torch.equal(row, nothing) for _, control in seen for row in control)
    rows = [row for arguments, _ in seen for row in arguments[3]]
    empty = [torch.equal(row, nothing) for row in rows]
    assert 0.3 < np.mean(empty) < 0.7 and all(torch.equal(r, text) for r, none in zip(rows, empty) if not none)


def test_a_killed_fit_keeps_the_defects_that_were_done(untrained, tmp_path, monkeypatch):
    shots = [*SHOTS, *[Shot(s.image, s.mask, s.category, "dent", s.id) for s in SHOTS]]
    prompts = PROMPTS | {"dent": "a plate with a dent"}
    config = AdaBLDMConfig(**QUICK)
    whole = fit(config, untrained, tmp_path / "a", shots, prompts=prompts).states
    calls, real = [], adabldm.denoising_loss

    def killed(*arguments, **named):
        calls.append(1)
        if len(calls) == 4:  # the second step of the second defect
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(adabldm, "denoising_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(config, untrained, tmp_path / "b", shots, prompts=prompts)
    resumed = fit(config, untrained, tmp_path / "b", shots, prompts=prompts)
    assert len(calls) == 5, "the first defect is not trained again, nor the second's first step"
    for defect in whole:
        assert all(torch.equal(whole[defect][name], value) for name, value in resumed.states[defect].items())
    resumed.save(tmp_path / "b")
    assert not (tmp_path / "b" / "ended").exists()


def test_an_adapted_base_model_is_kept_with_the_method(fitted, untrained, tmp_path):
    values = QUICK | {"adapt_steps": 2, "adapt_rank": 2, "adapt_learning_rate": 1e-2}
    method = fit(AdaBLDMConfig(**values), untrained, tmp_path)
    method.save(tmp_path)
    assert not torch.equal(images(method), images(fitted)) and not (tmp_path / "adaptation").exists()
    assert torch.equal(images(AdaBLDM.load(tmp_path, untrained)), images(method))


def test_the_base_models_decoder_is_never_written_to(fitted):
    before = digest(fitted.base.vae.state_dict().values())
    fitted.sample(REQUESTS)
    assert digest(fitted.base.vae.state_dict().values()) == before
    assert not any(p.requires_grad for p in fitted.base.vae.parameters())


def test_faults_are_one_sentence(fitted, untrained, tmp_path):
    config = fitted.config
    with pytest.raises(ValueError, match="AdaBLDM needs a base model"):
        AdaBLDM(config)
    with pytest.raises(ValueError, match="at least one in train/good"):
        fit(config, untrained, tmp_path, normals=[])
    with pytest.raises(ValueError, match="there is no prompt for the defect hole"):
        fit(config, untrained, tmp_path, prompts={})
    with pytest.raises(ValueError, match="image_size 60 must be a multiple of"):
        small = [image[:, :60, :60] for image in NORMALS]
        fit(config, untrained, tmp_path, normals=small)
    wide = Shot(surface(0), torch.ones(1, 64, 64, dtype=torch.bool), "plate", "hole", "wide")
    with pytest.raises(
        ValueError, match="the mask of shot hole/wide covers 4096 px, more than the object of any normal"
    ):
        fit(config, untrained, tmp_path, shots=[*SHOTS, wide])
    with pytest.raises(ValueError, match="request 1 has no mask or an all-black one"):
        fitted.sample([request(1, torch.zeros(1, 64, 64, dtype=torch.bool))])
    with pytest.raises(ValueError, match="covers 4096 px, more than the object of its normal image"):
        fitted.sample([request(1, torch.ones(1, 64, 64, dtype=torch.bool))])
    with pytest.raises(ValueError, match="was fitted on hole, not on 'dent'"):
        fitted.sample([request(1, defect="dent")])
    with pytest.raises(ValueError, match="latent_from 0.9 must not be after image_from 0.5"):
        AdaBLDMConfig(latent_from=0.9, image_from=0.5)
    fitted.save(tmp_path)
    described = (tmp_path / "method.json").read_text().replace(untrained.digest, "0" * 64)
    (tmp_path / "method.json").write_text(described)
    with pytest.raises(ValueError, match="was fitted on another base model than .*: fit it anew"):
        AdaBLDM.load(tmp_path, untrained)
