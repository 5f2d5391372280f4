"""The symmetry-aware system: off it is DualAnoDiff, on its classes differ, and each fault is one sentence."""

import pytest
import torch

from defectlib.branches.classes import scaled_layers
from defectlib.methods.dualanodiff import DualAnoDiff, DualAnoDiffConfig
from defectlib.methods.symmetry_aware import SymmetryAware, SymmetryAwareConfig
from defectlib.types import Request, Shot

QUICK = {"steps": 3, "train_batch_size": 2, "rank": 4, "num_inference_steps": 2, "batch_size": 2, "learning_rate": 1e-2}
OFF = {"adapters": "shared", "gates": None, "guidance": False}


def shot(defect, k):
    image = 0.3 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(k)).clamp(-2, 2)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 20 + 3 * k : 30 + 3 * k, 20:40] = True
    return Shot(torch.where(mask, 0.9 if defect == "hole" else -0.9, image), mask, "plate", defect, f"{k}")


SHOTS = [shot(defect, k) for defect in ("hole", "dent") for k in range(3)]


def fitted(kind, config, shots, untrained, folder):
    method = kind(config, untrained)
    method.fit(shots, [], prompts={}, seed=0, workdir=folder)
    return method


def request(defect, seed=1):
    return Request(torch.zeros(3, 64, 64), None, "plate", defect, "", seed, seed)


def test_all_off_and_one_class_is_dualanodiffs_training_to_the_bit(untrained, tmp_path):
    ours = fitted(SymmetryAware, SymmetryAwareConfig(**QUICK | OFF), SHOTS[:3], untrained, tmp_path / "ours")
    even = OFF | {"guidance": True, "mask_weight": 0.0, "band_weight": 0.0}
    without = fitted(SymmetryAware, SymmetryAwareConfig(**QUICK | even), SHOTS[:3], untrained, tmp_path / "even")
    theirs = fitted(DualAnoDiff, DualAnoDiffConfig(**QUICK), SHOTS[:3], untrained, tmp_path / "theirs")
    (other,) = theirs.states.values()
    for (one,) in (ours.states.values(), without.states.values()):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    drawn = [method.denoised([request("hole")])[0] for method in (ours, theirs)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("part", [{"adapters": "csb"}, {"gates": "prior"}, {"guidance": True}])
def test_each_part_changes_what_is_learned(untrained, tmp_path, part):
    off, on = (
        fitted(SymmetryAware, SymmetryAwareConfig(**QUICK | OFF | more), SHOTS, untrained, tmp_path / str(len(more)))
        for more in ({}, part)
    )
    assert not torch.equal(off.denoised([request("hole")])[0], on.denoised([request("hole")])[0])


ONE_STEP = QUICK | {"steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def after_one_step(untrained, tmp_path_factory):
    return fitted(SymmetryAware, SymmetryAwareConfig(**ONE_STEP), SHOTS, untrained, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(
    "field", [{"shrinkage": 1.0}, {"orthogonality": 1.0}, {"discrepancy": 1.0}, {"x0_space": True}, {"softness": 2.0}]
)
def test_each_weight_of_the_loss_is_learned_by(untrained, tmp_path, after_one_step, field):
    other = fitted(SymmetryAware, SymmetryAwareConfig(**ONE_STEP | field), SHOTS, untrained, tmp_path)
    (one,), (two,) = after_one_step.states.values(), other.states.values()
    assert any(not torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def whole(untrained, tmp_path_factory):
    config = SymmetryAwareConfig(**QUICK, orthogonality=1e-3, discrepancy=1e-3, coefficient_start=0.5)
    return fitted(SymmetryAware, config, SHOTS, untrained, tmp_path_factory.mktemp("fit"))


def test_coefficients_and_gates_move_and_classes_draw_otherwise(whole):
    dual = whole.untrained(0)
    before = {name: value.clone() for name, value in zip(dual.names, dual.trained, strict=True)}
    state = whole.states["all"]
    for part in ("departure", "gates.slope", "lora_B"):
        assert any(not torch.equal(state[name], before[name]) for name in state if part in name), part
    hole, dent = (whole.denoised([request(defect)])[0] for defect in ("hole", "dent"))
    assert not torch.equal(hole, dent), "the same noise, another class"
    assert len(scaled_layers(dual)) == 8 * len(dual.branches.processors)


def test_a_model_of_two_defects_trains_twice_as_long(whole):
    assert whole.curves["all"][-1][0] == 2 * QUICK["steps"]


def test_sizes_by_hand(whole, untrained, tmp_path):
    """Four coefficients a LoRA, two branches of four projections a layer; DualAnoDiff's are all of a class."""
    found, layers = whole.sizes(), len(whole.untrained(0).branches.processors)
    assert found["of a class"] == 4 * 8 * layers
    assert found["in all"] == found["shared"] + 2 * found["of a class"] + found["rest"]
    theirs = fitted(DualAnoDiff, DualAnoDiffConfig(**QUICK), SHOTS, untrained, tmp_path).sizes()
    assert theirs["shared"] == 0 and theirs["of a class"] == found["shared"], (
        "the same LoRA, one a class or one for all"
    )
    assert theirs["in all"] == 2 * theirs["of a class"] + theirs["rest"]
    gates = 6 * layers
    assert theirs["rest"] == 2 * (found["rest"] - gates)


def test_vera_fits_draws_and_is_read_back(untrained, tmp_path):
    config = SymmetryAwareConfig(**QUICK, adapters="vera")
    method = fitted(SymmetryAware, config, SHOTS, untrained, tmp_path / "fit")
    assert method.sizes()["shared"] == 0, "the bases are frozen"
    drawn = [method.denoised([request(defect)])[0] for defect in ("hole", "dent")]
    assert not torch.equal(*drawn), "classes differ by their vectors"
    method.save(tmp_path / "model")
    back = SymmetryAware.load(tmp_path / "model", untrained)
    assert torch.equal(back.denoised([request("hole")])[0], drawn[0]), "the same bases, though they are not in the file"


def test_a_lora_a_class_is_what_a_model_a_defect_has(untrained, tmp_path):
    """As many numbers as DualAnoDiff's adapters for each class, none shared; one SAIM and text encoder for all."""
    method = fitted(
        SymmetryAware, SymmetryAwareConfig(**QUICK, adapters="separate"), SHOTS, untrained, tmp_path / "one"
    )
    theirs = fitted(DualAnoDiff, DualAnoDiffConfig(**QUICK), SHOTS, untrained, tmp_path / "two").sizes()
    found, gates = method.sizes(), 6 * len(method.untrained(0).branches.processors)
    assert found["shared"] == 0 and found["of a class"] == theirs["of a class"]
    assert 2 * (found["rest"] - gates) == theirs["rest"]
    drawn = [method.denoised([request(defect)])[0] for defect in ("hole", "dent")]
    assert not torch.equal(*drawn)
    method.save(tmp_path / "model")
    back = SymmetryAware.load(tmp_path / "model", untrained)
    assert torch.equal(back.denoised([request("hole")])[0], drawn[0])
    with pytest.raises(ValueError, match="a LoRA for each class has no coefficients to learn a new one by"):
        back.learn([shot("burn", 0)], seed=0, workdir=tmp_path)


def test_defects_of_few_shots_come_again_in_turn(untrained):
    """Of two, five and one picture every class has five; of equally many all come once, in their order."""
    names = [*"aabbbbbc"]
    balanced, as_given = (SymmetryAware(SymmetryAwareConfig(balanced=on), untrained) for on in (True, False))
    assert balanced.turns(names) == [*range(8), 0, 1, 0, 7, 7, 7, 7]
    assert as_given.turns(names) == [*range(8)] and balanced.turns([*"abba"]) == [0, 1, 2, 3]


def test_a_class_is_trained_as_often_with_few_shots(untrained, tmp_path, monkeypatch):
    """Two shots of one defect beside four of another: either makes half of all rows over whole epochs."""
    from defectlib.methods import pairs

    shots, seen = [*SHOTS[:2], *SHOTS[3:], shot("dent", 3)], []
    given = pairs.dual_loss
    monkeypatch.setattr(pairs, "dual_loss", lambda *a, **k: seen.extend(k["classes"].tolist()) or given(*a, **k))
    rows = 2 * 4 * 4  # four shots of each of two defects, flipped three ways besides
    config = SymmetryAwareConfig(**QUICK | {"steps": rows // 4})
    fitted(SymmetryAware, config, shots, untrained, tmp_path)
    assert len(seen) == rows and seen.count(0) == seen.count(1)


def test_departures_rest_where_the_loss_does_not_pull(untrained, tmp_path):
    """In the first step B is zero, and with it their gradient; shrinkage then takes its share and no more."""
    for shrinkage in (0.0, 0.5):
        config = SymmetryAwareConfig(**ONE_STEP, shrinkage=shrinkage)
        method = fitted(SymmetryAware, config, SHOTS[:3], untrained, tmp_path / str(shrinkage))
        start = method.untrained(0).trained_state()
        own = [name for name in start if name.endswith(".departure")]
        left = 1 - ONE_STEP["learning_rate"] * shrinkage
        assert own and all(torch.allclose(method.states["all"][name], left * start[name], rtol=1e-6) for name in own)


def test_only_the_classes_of_a_batch_pull_at_their_departures(whole):
    dual = whole.untrained(0)
    dual.set_trained(whole.states["all"])
    base = whole.backbone
    noisy = torch.randn(4, *base.latent_shape(64), generator=torch.Generator().manual_seed(0))
    text = base.embed(["a vfx with sks"] * 2 + ["sks"] * 2)
    dual.branches(noisy, torch.tensor(500), text, classes=torch.tensor([1, 1])).square().mean().backward()
    pulls = torch.stack([layer.departure.grad.abs().sum(1) for layer in scaled_layers(dual)])
    assert (pulls[:, 0] == 0).all() and (pulls[:, 1] > 0).all()


def test_what_is_few_moves_by_its_own_rate(untrained, tmp_path):
    def travelled(own_rate):
        config = SymmetryAwareConfig(**QUICK | {"steps": 1, "learning_rate": 1e-4}, own_rate=own_rate)
        method = fitted(SymmetryAware, config, SHOTS, untrained, tmp_path / str(own_rate))
        first, last = method.untrained(0).trained_state(), method.states["all"]
        parts = {"own": (".departure", ".offset", ".slope"), "shared": (".image.weight", ".part.weight")}
        return {
            part: sum((last[n] - first[n]).abs().mean().item() for n in first if n.endswith(ends))
            for part, ends in parts.items()
        }

    slow, fast = travelled(0.1), travelled(1.0)
    assert fast["own"] == pytest.approx(10 * slow["own"], rel=0.3)
    assert fast["shared"] == pytest.approx(slow["shared"], rel=0.3), "the bases keep theirs"


def test_between_two_defects_lie_both_ends(whole):
    images, parts = whole.between(request("hole"), "dent", (0.0, 0.5, 1.0))
    assert images.shape == parts.shape and len(images) == 3
    ends = [whole.denoised([request(defect)])[0][0] for defect in ("hole", "dent")]
    assert torch.allclose(images[0], ends[0], atol=1e-4) and torch.allclose(images[2], ends[1], atol=1e-4)
    assert (images[1] - ends[0]).abs().max() > 1e-3 and (images[1] - ends[1]).abs().max() > 1e-3


@pytest.mark.parametrize("form", [{}, {"tie_blocks": 2}, {"adapters": "vera"}])
def test_a_new_class_is_learned_by_its_coefficients_alone(untrained, tmp_path, form):
    method = fitted(SymmetryAware, SymmetryAwareConfig(**QUICK, **form), SHOTS, untrained, tmp_path / "fit")
    drawn, before = method.denoised([request("hole")])[0], method.states["all"]
    more = [shot("burn", k) for k in range(2)]
    assert method.learn(more, seed=3, workdir=tmp_path / "more")[-1][0] == QUICK["steps"]
    state, own = method.states["all"], (".departure", ".vectors")
    assert all(torch.equal(state[name], before[name]) for name in state if not name.endswith(own))
    few = [name for name in state if name.endswith(own)]
    assert few and all(len(state[name]) == 3 and torch.equal(state[name][:2], before[name]) for name in few)
    start = method.untrained(3).trained_state()
    assert any(not torch.equal(state[name][2], start[name][2]) for name in few), "its own have moved"
    assert torch.equal(method.denoised([request("hole")])[0], drawn), "the others draw what they drew"
    new = method.denoised([request("burn")])[0]
    assert not torch.equal(new, drawn)
    method.save(tmp_path / "model")
    back = SymmetryAware.load(tmp_path / "model", untrained)
    assert list(back.areas) == ["hole", "dent", "burn"] and torch.equal(back.denoised([request("burn")])[0], new)


def test_a_new_class_that_was_learned_before_a_kill_is_taken(untrained, tmp_path, monkeypatch):
    """The fit is then read from its file, whose tensors have another order than a fresh one's."""
    where, more = {"seed": 3, "workdir": tmp_path / "fit"}, [shot("burn", 0)]
    first, second = (SymmetryAware(SymmetryAwareConfig(**QUICK), untrained) for _ in range(2))
    for method in (first, second):
        method.fit(SHOTS, [], prompts={}, **where)
        method.learn(more, **where)
        monkeypatch.setattr("defectlib.methods.pairs.fit", lambda *a, **k: pytest.fail("it is trained again"))
    assert list(first.states["all"]) != list(second.states["all"])
    assert all(torch.equal(value, second.states["all"][name]) for name, value in first.states["all"].items())


def test_a_new_class_is_learned_from_what_can_be_read(untrained, tmp_path):
    """A shot whose mask covers the border teaches neither coefficients nor how large a defect may be."""
    framed = torch.ones(1, 64, 64, dtype=torch.bool)
    framed[0, 8:56, 8:56] = False
    more = [shot("burn", k) for k in range(2)]
    unread = Shot(more[0].image, framed, "plate", "burn", "framed")
    learned = []
    for shots in (more, [unread, *more]):
        method = fitted(SymmetryAware, SymmetryAwareConfig(**QUICK), SHOTS, untrained, tmp_path / f"{len(shots)}")
        method.learn(shots, seed=3, workdir=tmp_path / f"more{len(shots)}")
        learned.append(method)
    first, second = learned
    assert second.left_out == {"hole": 0, "dent": 0, "burn": 1} and second.areas == first.areas
    assert all(torch.equal(value, second.states["all"][name]) for name, value in first.states["all"].items())


def test_bad_input_is_one_sentence(whole, untrained, tmp_path):
    with pytest.raises(ValueError, match="the symmetry-aware system was fitted on hole, dent, not on 'crack'"):
        whole.sample([request("crack")])
    with pytest.raises(ValueError, match="fitted on hole, dent, not on 'crack'"):
        whole.between(request("hole"), "crack", [0.5])
    shared = SymmetryAware(SymmetryAwareConfig(**QUICK | OFF), untrained)
    with pytest.raises(ValueError, match="holds nothing between two"):
        shared.between(request("hole"), "dent", [0.5])
    with pytest.raises(ValueError, match="is not fitted: call fit or load first"):
        SymmetryAware(SymmetryAwareConfig(**QUICK), untrained).between(request("hole"), "dent", [0.5])
    where = {"seed": 0, "workdir": tmp_path}
    with pytest.raises(ValueError, match="is not fitted: a new class needs the bases of others"):
        shared.learn([shot("burn", 0)], **where)
    shared.states = {"all": {}}
    with pytest.raises(ValueError, match="one LoRA for all classes has no coefficients to learn a new one by"):
        shared.learn([shot("burn", 0)], **where)
    with pytest.raises(ValueError, match="has learned 'hole' already; it knows hole, dent"):
        whole.learn([shot("hole", 0)], **where)
    with pytest.raises(ValueError, match="one new defect at a time: these shots are of burn, scratch"):
        whole.learn([shot("burn", 0), shot("scratch", 0)], **where)
    with pytest.raises(ValueError, match="needs at least one shot"):
        whole.learn([], **where)
    assert list(whole.areas) == ["hole", "dent"]
    with pytest.raises(ValueError, match="3 blocks do not divide rank 4"):
        SymmetryAwareConfig(**QUICK, tie_blocks=3)
    with pytest.raises(ValueError, match="tie_blocks are of the adapters 'csb', not of 'shared'"):
        SymmetryAwareConfig(**QUICK, tie_blocks=2, adapters="shared")
    whole.save(tmp_path)
    text = (tmp_path / "method.json").read_text()
    for other in ('"dent": [0.1, 0.2], "burn": [', '"burn": ['):  # one class more, and as many of another name
        (tmp_path / "method.json").write_text(text.replace('"dent": [', other))
        with pytest.raises(
            ValueError, match=r"all\.safetensors was fitted on hole, dent, not on hole, .*burn: fit it anew"
        ):
            SymmetryAware.load(tmp_path, untrained)
