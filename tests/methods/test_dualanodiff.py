"""DualAnoDiff on an untrained base model: what it learns from, what it draws, and each fault in one sentence."""

import numpy as np
import pytest
import torch

from defectlib import backbone, profiles, sampling
from defectlib.augmentation import background, crop_box, training_pictures
from defectlib.branches import dual_loss
from defectlib.diffusion import noise_like
from defectlib.images import TURNS
from defectlib.masks.extraction import extract
from defectlib.methods import pairs
from defectlib.methods.dualanodiff import DualAnoDiff, DualAnoDiffConfig
from defectlib.metrics.regions import mask_iou
from defectlib.training import FitSettings
from defectlib.types import Request, Shot

QUICK = {"steps": 2, "train_batch_size": 2, "rank": 4, "num_inference_steps": 2, "batch_size": 2}


def normal(seed=0):
    """A dark square on a light, plain background, so that there is a foreground."""
    image = 0.7 + 0.02 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed))
    image[:, 16:48, 16:48] -= 1.0
    return image.clamp(-1, 1)


def shot(k=0):
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 24 + k : 30 + k, 20:40] = True
    return Shot(torch.where(mask, torch.tensor(0.9), normal(k)), mask, "plate", "hole", f"{k}")


SHOTS = [shot(k) for k in range(3)]


def request(seed, of=0):
    return Request(normal(of), None, "plate", "hole", "a plate with a hole", seed, seed)


@pytest.fixture(scope="module")
def fit(untrained, tmp_path_factory):
    def fitted(**changes):
        method = DualAnoDiff(DualAnoDiffConfig(**QUICK | changes), untrained)
        method.fit(SHOTS, [], prompts={}, seed=0, workdir=tmp_path_factory.mktemp("fit"))
        return method

    return fitted


@pytest.fixture(scope="module")
def fitted(fit):
    return fit()


def test_a_part_is_the_defect_on_mid_grey_and_turns_with_its_image():
    pictures = training_pictures(SHOTS, 0, backgrounds=True).shown
    assert {name: x.shape for name, x in pictures.items()} == dict.fromkeys(
        ("image", "part", "background"), (12, 3, 64, 64)
    )
    masks = torch.cat([torch.stack([s.mask for s in SHOTS]).flip(turn) for turn in TURNS])
    assert torch.equal(pictures["part"], pictures["image"] * masks)
    inside = pictures["background"][:, :, 20:44, 20:44]
    assert (inside == 0).all() and torch.equal(pictures["background"][..., :8], pictures["image"][..., :8])


def test_a_crop_is_the_same_for_image_and_part():
    pictures = training_pictures(SHOTS, 0, crops=3, flips=False).shown
    assert len(pictures["image"]) == 12 and torch.equal(pictures["image"][:3], torch.stack([s.image for s in SHOTS]))
    again, other = (training_pictures(SHOTS, seed, crops=3, flips=False).shown for seed in (0, 1))
    assert torch.equal(pictures["image"], again["image"]) and not torch.equal(pictures["image"], other["image"])
    for image, part in zip(pictures["image"][3:], pictures["part"][3:], strict=True):
        drawn = part.abs().amax(0) > 0
        assert drawn.sum() >= 0.5 * SHOTS[0].mask.sum() and torch.equal(part, image * drawn)


def test_a_crop_keeps_the_defect_or_is_the_whole_image():
    corners = torch.zeros(1, 64, 64, dtype=torch.bool)
    corners[0, :4, :4] = corners[0, -4:, -4:] = corners[0, :4, -4:] = corners[0, -4:, :4] = True
    for k in range(20):
        box = crop_box(corners, 0.3, np.random.default_rng(k))
        assert 2 * corners[:, *box].sum() >= corners.sum()
        few = crop_box(SHOTS[0].mask, 0.3, np.random.default_rng(k))
        assert 2 * SHOTS[0].mask[:, *few].sum() >= SHOTS[0].mask.sum() and few[0].stop - few[0].start >= 19
    large = torch.zeros(1, 64, 64, dtype=torch.bool)
    large[0, 6:58, 6:58] = True
    boxes = [crop_box(large, 0.7, np.random.default_rng(k)) for k in range(40)]
    assert not any(large[:, *box].all() for box in boxes), "a part without grey has no mask"
    assert any(box[0].stop - box[0].start < 64 for box in boxes)


def test_a_crops_background_is_that_of_the_whole_image():
    """Where a crop has no border of its own the finder would say that the surface fills the frame."""
    pictures = training_pictures(SHOTS, 0, crops=4, crop_side=0.5, flips=False, backgrounds=True).shown
    grey = (pictures["background"] == 0).all(1).float().mean((1, 2))
    assert (grey > 0.1).all() and (grey < 1).any()


def test_guidance_moves_each_branch_from_the_empty_prompt_to_its_own(untrained, fit):
    """The rows of one guided prediction against unguided calls, for two distinct pairs and backgrounds."""
    method = fit(compensation=True, learning_rate=1e-2, guidance_scale=3.0, num_inference_steps=1)
    pair, base = [request(1, 0), request(2, 1)], method.backbone
    dual, shape = method.dual("hole"), (12, 16, 16)
    seeds = [pairs.noise_seed(r.seed, what) for what in (pairs.IMAGE, pairs.PART) for r in pair]
    start, (image, part, nothing) = noise_like(seeds, shape), dual.text()
    base.scheduler.set_timesteps(1)
    t = base.scheduler.timesteps[0]
    noise = noise_like([pairs.noise_seed(0, pairs.BACKGROUND)], shape)
    behind = torch.cat([base.encode(background(r.normal)[None]) for r in pair])
    level = base.scheduler.add_noise(behind, noise.expand_as(behind), t[None].expand(2))
    with torch.no_grad():
        seen = dual.branches.background_features(level, t, base.embed(["", ""]))
        without = dual.branches(start, t, nothing.expand(4, -1, -1), seen)
        prompted = dual.branches(start, t, torch.stack([image, image, part, part]), seen)
    predicted = without + 3.0 * (prompted - without)
    expected = base.decode(base.scheduler.step(predicted, t, start).prev_sample)
    drawn = torch.cat(method.denoised(pair))
    assert (drawn - expected).abs().max() < 1e-3
    assert (prompted - without).abs().max() > 1e-3, "and the prompts tell"


def test_the_text_encoder_learns_too(fit, untrained):
    """A and B of four projections a layer, of the rank that was asked for, and every B has left zero."""
    learned = {name: v for name, v in fit(learning_rate=1e-2).states["hole"].items() if "text_encoder" in name}
    projections = 4 * untrained.text_encoder.config.num_hidden_layers
    down, up = ([v for name, v in learned.items() if f"lora_{half}" in name] for half in "AB")
    assert len(down) == len(up) == projections and len(learned) == 2 * projections
    assert all(len(v) == QUICK["rank"] for v in down) and all(v.abs().max() > 0 for v in up)


def test_the_papers_values():
    """Section 4.1 of the paper; with BCM batch 2, 50 steps and guidance 2.0; 500 images a type."""
    config, beside = DualAnoDiffConfig(), DualAnoDiffConfig.compensated()
    assert (config.steps, config.train_batch_size, config.learning_rate, config.rank) == (5000, 4, 2e-5, 32)
    assert (config.num_inference_steps, config.guidance_scale, config.schedule) == (100, 2.5, "constant")
    assert (beside.train_batch_size, beside.num_inference_steps, beside.guidance_scale) == (2, 50, 2.0)
    assert beside.compensation and not config.compensation and config.interaction and config.flips
    assert FitSettings(steps=1, batch_size=1, learning_rate=1).max_grad_norm == 1.0
    paper = profiles.load("paper")
    assert DualAnoDiffConfig(**paper.methods["dualanodiff"]).fit_values() == DualAnoDiffConfig(crops=3).fit_values()
    variant = paper.methods["dualanodiff"] | paper.variants["dualanodiff_compensated"].config
    assert DualAnoDiffConfig(**variant) == DualAnoDiffConfig.compensated(crops=3, batch_size=2)
    assert paper.sample.n_of["dualanodiff"] == 500


def test_the_loss_by_hand(untrained, monkeypatch):
    """One timestep a pair, noise of its own for each branch, the mean over both, image rows first."""
    method = DualAnoDiff(DualAnoDiffConfig(**QUICK), untrained)
    dual, seen = method.untrained(0), {}
    clean = {
        name: torch.randn(3, 12, 16, 16, generator=torch.Generator().manual_seed(k))
        for k, name in enumerate(("image", "part"))
    }

    def forward(noisy, timesteps, text, *_):
        seen.update(noisy=noisy, timesteps=timesteps, text=text)
        return torch.zeros_like(noisy)

    monkeypatch.setattr(dual.branches, "forward", forward)
    found = dual_loss(dual, untrained, clean, torch.Generator().manual_seed(7))
    again = torch.Generator().manual_seed(7)
    scheduler = untrained.scheduler
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (3,), generator=again)
    noise = torch.cat([torch.randn(3, 12, 16, 16, generator=again) for _ in range(2)])
    both = torch.cat([clean["image"], clean["part"]])
    assert torch.equal(seen["timesteps"], timesteps.repeat(2)) and len(set(timesteps.tolist())) > 1
    assert torch.allclose(seen["noisy"], scheduler.add_noise(both, noise, timesteps.repeat(2)))
    image, part, _ = dual.text()
    assert torch.equal(seen["text"], torch.stack([image] * 3 + [part] * 3)) and not torch.equal(image, part)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(both, noise, timesteps.repeat(2)) if velocity else noise
    assert found == pytest.approx(target.square().mean().item(), rel=1e-5)


def test_pictures_are_encoded_once(untrained, tmp_path, monkeypatch):
    """All flips of all shots in one call a branch, before the first step."""
    calls = []
    given = DualAnoDiff._encode
    monkeypatch.setattr(
        DualAnoDiff, "_encode", lambda self, x, name: calls.append((name, len(x))) or given(self, x, name)
    )
    DualAnoDiff(DualAnoDiffConfig(**QUICK | {"steps": 5}), untrained).fit(
        SHOTS, [], prompts={}, seed=0, workdir=tmp_path
    )
    assert calls == [("image", 4 * len(SHOTS)), ("part", 4 * len(SHOTS))]


def test_backgrounds_are_scaled_as_images_but_as_released_not(fit, untrained):
    image = background(normal())[None]
    ours, released = (fit(compensation=True, released=value)._encode(image, "background") for value in (False, True))
    assert torch.equal(ours, untrained.encode(image))
    assert torch.allclose(released * untrained.vae.config.scaling_factor, ours)


def test_without_guidance_or_with_another_a_picture_changes(fitted):
    usual = fitted.sample([request(1)])[0].image
    for changes in ({"guidance_scale": 1.0}, {"guidance_scale": 4.0}, {"num_inference_steps": 3}):
        other = DualAnoDiff(fitted.config.model_copy(update=changes), fitted.backbone)
        other.states, other.areas = fitted.states, fitted.areas
        assert not torch.equal(other.sample([request(1)])[0].image, usual)


def test_the_normal_is_looked_at_with_compensation_alone(fit, fitted):
    one, other = (fitted.sample([request(1, of)])[0].image for of in (0, 1))
    assert torch.equal(one, other)
    compensated = fit(compensation=True)
    both = [compensated.sample([request(1, of)])[0].image for of in (0, 1)]
    assert not torch.equal(*both)
    together = compensated.sample([request(1, 0), request(2, 1)])
    assert torch.equal(together[0].image, both[0]), "another background in the batch changes nothing"


@pytest.mark.parametrize("normals, passes", [((0, 0, 0), 1), ((0, 1, 0), 2)])
def test_a_background_is_passed_once_a_step_for_all_that_share_it(fit, monkeypatch, normals, passes):
    method = fit(compensation=True, num_inference_steps=2, batch_size=4)
    branches, calls = method.dual("hole").branches, []
    real = branches.background_features
    monkeypatch.setattr(branches, "background_features", lambda *a: (calls.append(a), real(*a))[1])
    method.denoised([request(i, of) for i, of in enumerate(normals)])
    assert len(calls) == 2 * passes


@pytest.mark.parametrize("compensation", [False, True])
def test_as_released_draws_otherwise(fit, compensation):
    ours, released = (fit(compensation=compensation, released=value) for value in (False, True))
    assert not torch.equal(ours.sample([request(1)])[0].image, released.sample([request(1)])[0].image)
    assert DualAnoDiffConfig.as_released(rank=8) == DualAnoDiffConfig(released=True, rank=8)


def test_what_is_learned_draws_a_mask_on_its_defect_and_interaction_is_what_puts_it_there(tmp_path):
    """Forty steps on the base that ships, with redraws: the mask lies on what departs from the ground in the image."""
    tiny, stains = backbone.load("tiny", device="cpu"), []
    for k in range(4):
        plate = 0.5 + 0.02 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(k))
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[0, 10 + 8 * k : 30 + 8 * k, 8 + 10 * (k % 3) : 32 + 10 * (k % 3)] = True
        image = torch.where(mask, torch.tensor([0.3, -0.7, -0.9])[:, None, None], plate).clamp(-1, 1)
        stains.append(Shot(image, mask, "plate", "stain", f"{k}"))
    asked = [Request(normal(), None, "plate", "stain", "a plate with a stain", k, k) for k in range(4)]
    quick = {
        "steps": 40,
        "train_batch_size": 2,
        "learning_rate": 1e-3,
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
    }
    on = {}
    for interaction in (True, False):
        method = DualAnoDiff(DualAnoDiffConfig(**quick, interaction=interaction), tiny)
        method.fit(stains, [], prompts={}, seed=0, workdir=tmp_path / str(interaction))
        drawn = method.sample(asked)
        visible = [(x.image - x.image.flatten(1).median(1).values[:, None, None]).abs().amax(0) > 0.4 for x in drawn]
        on[interaction] = np.mean([mask_iou(a[None], x.mask) or 0.0 for a, x in zip(visible, drawn, strict=True)])
    assert on[True] > 0.7 and on[True] > on[False] + 0.2


def test_the_masks_threshold_is_noted(fitted):
    sample = fitted.sample([request(1)])[0]
    assert sample.notes["threshold_by"] in ("otsu", "floor", "border")
    assert sample.notes["threshold"] >= fitted.config.floor and sample.notes["drawing"] <= fitted.config.attempts
    found = extract(sample.part, fitted.config.floor, tint=fitted.config.tint)
    assert torch.equal(found.mask, sample.mask), "and the part that it was cut from is kept"


def test_flawed_masks_are_drawn_again_up_to_a_bound(fitted, monkeypatch):
    """Empty, full, and larger than twice any shot's; a crop of the last one would be in range."""
    calls = []
    masks = {k: torch.zeros(1, 64, 64, dtype=torch.bool) for k in (1, 2, 3)}
    masks[2][:] = True
    masks[3][0, 8:40, 8:40] = True

    def denoised(requests, attempt=0, hooks=()):
        calls.append([(r.seed, attempt) for r in requests])
        parts = torch.stack([
            torch.where(masks[r.seed] if attempt < r.seed else SHOTS[0].mask, 0.9, 0.0).expand(3, -1, -1)
            for r in requests
        ])  # fmt: skip
        return parts, parts

    monkeypatch.setattr(fitted, "denoised", denoised)
    monkeypatch.setattr(fitted, "config", fitted.config.model_copy(update={"batch_size": 3}))
    samples = fitted.sample([request(1), request(2), request(3)])
    assert calls == [[(1, 0), (2, 0), (3, 0)], [(1, 1), (2, 1), (3, 1)], [(2, 2), (3, 2)], [(3, 3)]]
    assert [s.notes["drawing"] for s in samples] == [2, 3, 4]
    far = "area outside the real range"
    assert [s.notes["redrawn_for"] for s in samples] == ["empty", "full; full", "; ".join([far] * 3)]
    assert all(torch.equal(s.mask, SHOTS[0].mask) and sampling.teaches(s) for s in samples)
    monkeypatch.setattr(fitted, "config", fitted.config.model_copy(update={"attempts": 1}))
    calls.clear()
    samples = fitted.sample([request(1), request(2), request(3)])
    assert len(calls) == 1 and not samples[0].mask.any() and samples[1].mask.all(), "kept as they are, to be counted"
    assert [s.notes["flaw"] for s in samples] == ["empty", "full", far] and not any(map(sampling.teaches, samples))


def test_a_redrawing_starts_from_other_noise_than_any_other_drawing(fitted):
    """torch's CPU generator reads 32 bits of a seed: distinct integers are not enough."""
    drawn = [fitted.denoised([request(seed)], attempt)[0] for seed in (1, 2) for attempt in (0, 1, 2)]
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    keys = {pairs.noise_seed(s, what, a) for s in range(99) for what in range(3) for a in range(4)}
    assert len(keys) == 99 * 3 * 4


def test_a_fit_that_was_killed_keeps_the_defects_it_had_ended(untrained, tmp_path, monkeypatch):
    second = [Shot(s.image, s.mask, s.category, "dent", s.id) for s in SHOTS]
    trained = []
    real = pairs.fit

    def killed(*arguments, **named):
        trained.append(named["folder"].name.split("-")[0])
        if trained == ["hole", "dent"]:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(pairs, "fit", killed)
    method = DualAnoDiff(DualAnoDiffConfig(**QUICK), untrained)
    with pytest.raises(KeyboardInterrupt):
        method.fit([*SHOTS, *second], [], prompts={}, seed=0, workdir=tmp_path)
    method.fit([*SHOTS, *second], [], prompts={}, seed=0, workdir=tmp_path)
    assert trained == ["hole", "dent", "dent"] and set(method.states) == set(method.curves) == {"hole", "dent"}
    method.fit(SHOTS, [], prompts={}, seed=1, workdir=tmp_path)
    assert trained[3:] == ["hole"], "another seed is another fit"
    method.fit(SHOTS, [], prompts={}, seed=1, workdir=tmp_path)
    method.fit([*SHOTS[:2], shot(7)], [], prompts={}, seed=1, workdir=tmp_path)
    assert trained[4:] == ["hole"], "the same fit is kept until it is saved; other pixels are another fit"
    method.save(tmp_path)
    assert not (tmp_path / "ended").exists()


def test_a_shot_that_no_mask_can_be_read_off_is_left_out_and_counted(untrained, fitted, tmp_path):
    framed = torch.ones(1, 64, 64, dtype=torch.bool)
    framed[0, 8:56, 8:56] = False
    method = DualAnoDiff(DualAnoDiffConfig(**QUICK), untrained)
    unread = Shot(SHOTS[0].image, framed, "plate", "hole", "008")
    method.fit([unread, *SHOTS], [], prompts={}, seed=0, workdir=tmp_path)
    assert method.left_out == {"hole": 1} and fitted.left_out == {"hole": 0}
    assert all(torch.equal(method.states["hole"][n], v) for n, v in fitted.states["hole"].items()), "as without it"


def test_bad_input_is_one_sentence(untrained, fit, tmp_path):
    method = DualAnoDiff(DualAnoDiffConfig(**QUICK), untrained)
    full = Shot(SHOTS[0].image, torch.ones_like(SHOTS[0].mask), "plate", "hole", "007")
    with pytest.raises(ValueError, match="hole/007 covers the whole image"):
        method.fit([*SHOTS, full], [], prompts={}, seed=0, workdir=tmp_path)
    ring = torch.ones(1, 64, 64, dtype=torch.bool)
    ring[0, 8:56, 8:56] = False
    unread = Shot(SHOTS[0].image, ring, "plate", "hole", "008")
    grey = Shot(0.05 * SHOTS[0].image, SHOTS[0].mask, "plate", "hole", "009")
    for few, named in (([unread, unread], "008"), ([grey, unread], "009")):
        with pytest.raises(ValueError, match=f"no shot of hole can be learned from: .* as of hole/{named}, because"):
            method.fit(few, [], prompts={}, seed=0, workdir=tmp_path)
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    surface = Shot(noise, SHOTS[0].mask, "brick", "hole", "0")
    with pytest.raises(ValueError, match="in the shots of brick/hole the surface fills the frame"):
        DualAnoDiff(DualAnoDiffConfig(**QUICK, compensation=True), untrained).fit(
            [surface], [], prompts={}, seed=0, workdir=tmp_path
        )
    with pytest.raises(ValueError, match=r"1 of 2 normal images of plate show none"):
        DualAnoDiff(DualAnoDiffConfig(**QUICK, compensation=True), untrained).fit(
            SHOTS, [normal(), noise * 2 - 1], prompts={}, seed=0, workdir=tmp_path
        )
    with pytest.raises(ValueError, match="fitted on nothing, not on 'hole'"):
        method.sample([request(1)])
    with pytest.raises(ValueError, match="normal image of request 1 shows no background"):
        fit(compensation=True).sample([Request(noise * 2 - 1, None, "plate", "hole", "", 1, 1)])
    fit(rank=2).save(tmp_path)
    text = (tmp_path / "method.json").read_text()
    (tmp_path / "method.json").write_text(text.replace('"rank": 2', '"rank": 4'))
    with pytest.raises(ValueError, match=r"hole\.safetensors was fitted with rank 2 instead of 4: fit it anew"):
        DualAnoDiff.load(tmp_path, untrained)
    (tmp_path / "method.json").write_text(text.replace(untrained.digest, "0"))
    with pytest.raises(ValueError, match="another base model"):
        DualAnoDiff.load(tmp_path, untrained)
