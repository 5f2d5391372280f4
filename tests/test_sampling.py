from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from defectlib import sampling
from defectlib.masks.interpolation import NoMask
from defectlib.types import Sample, Shot

PROMPTS = {"crack": "a crack", "stain": "a stain"}


def shot(defect, k=0):
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 2 + k : 6, 3:7] = True
    return Shot(torch.full((3, 16, 16), 0.5), mask, "nut", defect, f"{k}")


SHOTS = [shot("crack"), shot("crack", 1), shot("stain")]
NORMALS = [torch.full((3, 16, 16), v) for v in (-0.5, 0.0, 0.2)]


class Painter:
    """Paints the request's mask white; counts its calls."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = 0, fail_at

    def sample(self, requests):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return [
            Sample(torch.where(r.mask, 1.0, r.normal), r.mask, r.category, r.defect, r.seed, r.group) for r in requests
        ]


def source(rng, shots, normal):
    return shots[rng.integers(len(shots))].mask


def plan(n=6, seed=0, **more):
    return sampling.plan(SHOTS, NORMALS, n, source, seed, PROMPTS, group_size=2, **more)


def test_seeds_are_distinct_and_stable():
    requests = plan()
    assert [r.seed for r in requests] == [*range(6), *range(10_000, 10_006)]
    assert plan(seed=3)[0].seed == 3_000_000
    longer = {r.seed: r for r in plan(n=9)}
    assert all(
        torch.equal(longer[r.seed].normal, r.normal) and torch.equal(longer[r.seed].mask, r.mask) for r in requests
    )


def test_a_defect_keeps_its_seeds_when_fewer_are_asked_for():
    few = sampling.plan(SHOTS[2:], NORMALS, 2, None, 0, PROMPTS, defects=["crack", "stain"])
    assert [r.seed for r in few] == [10_000, 10_001]


def test_a_request_without_a_mask_is_left_out_and_the_others_stay_as_they_are():
    drawn = iter(range(12))

    def fussy(rng, shots, normal):
        if next(drawn) % 6 == 3:
            raise NoMask("none of 32 masks could be used", Counter())
        return source(rng, shots, normal)

    without, whole = [], {r.seed: r for r in plan()}
    few = sampling.plan(SHOTS, NORMALS, 6, fussy, 0, PROMPTS, group_size=2, without=without)
    assert [r.seed for r in few] == [0, 1, 2, 4, 5, 10_000, 10_001, 10_002, 10_004, 10_005] and len(without) == 2
    assert all(torch.equal(whole[r.seed].mask, r.mask) and whole[r.seed].group == r.group for r in few)
    drawn = iter(range(12))
    with pytest.raises(NoMask):
        sampling.plan(SHOTS, NORMALS, 6, fussy, 0, PROMPTS)


def test_a_group_shares_its_normal_where_that_is_asked_for():
    shared = plan(n=6, one_normal_a_group=True)
    normals = {}
    for request in shared:
        normals.setdefault(request.group, []).append(request.normal)
    assert all(own is few[0] for few in normals.values() for own in few) and len(normals) == 6
    assert len({id(few[0]) for few in normals.values()}) > 1, "not one for all"
    apart = plan(n=6)
    assert [r.seed for r in shared] == [r.seed for r in apart]
    assert [id(r.normal) for r in shared] != [id(r.normal) for r in apart]


def test_groups_hold_consecutive_requests_of_one_defect():
    requests = plan(n=5)
    sizes = {}
    for r in requests:
        sizes.setdefault(r.group, []).append(r.defect)
    assert [len(v) for v in sizes.values()] == [2, 2, 1, 2, 2, 1]
    assert all(len(set(v)) == 1 for v in sizes.values())


def test_no_normals_is_one_sentence():
    with pytest.raises(ValueError, match="no normal image to draw on"):
        sampling.plan(SHOTS, [], 1, None, 0, PROMPTS)


def test_draw_writes_what_load_reads(tmp_path):
    requests = plan()
    report = sampling.draw(Painter(), requests, tmp_path)
    assert len(report) == 12 and (report["change_outside"] == 0).all() and (report["change_inside"] > 0).all()
    loaded = sampling.load(tmp_path)
    assert [s.seed for s in loaded] == sorted(r.seed for r in requests)
    assert torch.equal(loaded[0].mask, requests[0].mask)
    assert [s.defect for s in sampling.load(tmp_path, limit=1)] == ["crack", "stain"]


def test_on_a_grey_normal_the_image_is_grey_and_on_a_coloured_one_as_drawn(tmp_path):
    class Tinged(Painter):
        def sample(self, requests):
            red = torch.tensor([1.0, -0.2, -0.2])[:, None, None]
            return [replace(s, image=torch.where(s.mask, red, s.image)) for s in super().sample(requests)]

    (grey,) = sampling.plan(SHOTS[:1], NORMALS[:1], 1, source, 0, PROMPTS)
    pink = replace(grey, normal=grey.normal + torch.tensor([0.4, 0.0, 0.0])[:, None, None], seed=1, group=1)
    sampling.draw(Tinged(), [grey, pink], tmp_path)
    (first, inside), (second, same) = (sampling.read_pair(tmp_path, seed) for seed in (0, 1))
    assert (first - first[:1]).abs().max() == 0 and first[:, inside[0]].mean() == pytest.approx(0.2, abs=1 / 255)
    assert (first[:, ~inside[0]] - grey.normal[:, ~inside[0]]).abs().max() <= 1 / 255, "the ground is the normal's"
    assert second[:, same[0]][:, 0].tolist() == pytest.approx([1.0, -0.2, -0.2], abs=1 / 255)


def test_a_killed_drawing_continues_and_equals_an_undisturbed_one(tmp_path):
    requests = plan()
    with pytest.raises(KeyboardInterrupt):
        sampling.draw(Painter(fail_at=3), requests, tmp_path / "killed")
    again = Painter()
    sampling.draw(again, requests, tmp_path / "killed")
    assert again.calls == 4, "two of six groups were there"
    sampling.draw(Painter(), requests, tmp_path / "whole")
    for file in sorted((tmp_path / "whole").rglob("*.*")):
        other = tmp_path / "killed" / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes()


def test_a_method_that_returns_too_few_is_refused(tmp_path):
    class Lazy(Painter):
        def sample(self, requests):
            return super().sample(requests)[:1]

    with pytest.raises(ValueError, match="returned 1 samples for 2 requests"):
        sampling.draw(Lazy(), plan(), tmp_path)


def test_problems_are_found(tmp_path):
    requests = plan(n=2)

    class Broken(Painter):
        def sample(self, requests):
            done = super().sample(requests)
            if requests[0].defect == "crack":
                return [
                    Sample(done[0].image, done[0].mask & False, "nut", "crack", done[0].seed, 0),
                    Sample(requests[1].normal, done[1].mask, "nut", "crack", done[1].seed, 0),
                ]
            return done

    report = sampling.draw(Broken(), requests, tmp_path)
    assert sampling.problems(report)["seed"].tolist() == [0, 1]


def test_load_before_draw_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="draw the samples first"):
        sampling.load(tmp_path)


def test_mask_source_sees_the_defects_own_shots():
    seen = {}

    def spy(rng, shots, normal):
        seen.setdefault(shots[0].defect, set()).update(s.id for s in shots)
        assert isinstance(rng, np.random.Generator)
        return shots[0].mask

    sampling.plan(SHOTS, NORMALS, 1, spy, 0, PROMPTS)
    assert seen == {"crack": {"0", "1"}, "stain": {"0"}}
