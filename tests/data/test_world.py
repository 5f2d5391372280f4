"""The generated world: its words are true, its masks are where the change is, and it knows nothing of mini."""

import ast
import inspect

import numpy as np
import pytest
import torch

from defectlib.data import mini, world

POOL = world.pool(300, seed=3)


def test_a_picture_depends_on_seed_and_index_alone():
    again = world.pool(2, seed=3, start=7)
    assert all(torch.equal(a.image, b.image) and a.prompt == b.prompt for a, b in zip(again, POOL[7:9], strict=True))
    assert not torch.equal(world.pool(1, seed=4)[0].image, POOL[0].image)


def test_ranges_and_kinds():
    assert {p.kind for p in POOL} == set(world.KINDS)
    for p in POOL:
        assert p.image.shape == (3, 64, 64) and p.image.dtype == torch.float32 and p.image.abs().max() <= 1
        assert p.mask.shape == (1, 64, 64) and p.mask.dtype == torch.bool


def test_a_mark_is_named_exactly_where_there_is_one():
    for p in POOL:
        named = any(f" {mark}" in p.prompt for mark in world.MARKS)
        if p.kind in ("surface", "object"):
            assert named == bool(p.mask.any()), p.prompt


def test_silhouettes_are_black_and_white_and_parts_lie_on_grey():
    for p in POOL:
        if p.kind == "silhouette":
            assert set(p.image.unique().tolist()) <= {-1.0, 1.0} and torch.equal(p.image[:1] > 0, p.mask)
        if p.kind == "part":
            assert (p.image[:, ~p.mask[0]].abs() < 0.01).all()


@pytest.mark.parametrize("mark", world.MARKS)
def test_every_mark_changes_what_it_covers(mark):
    draw, how = world.MARKS[mark]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        cover = draw(rng, 64)
        plain = np.clip(0.5 + 0.05 * rng.standard_normal((64, 64, 3)), 0, 1)
        change = np.abs(world._paint(plain, cover, how, rng) - plain).mean(-1)
        if (cover > 0.5).any():
            assert change[cover > 0.5].max() > 0.08
        assert (change[cover == 0] == 0).all() or how == "relief"


def test_every_word_is_listed():
    assert {word for p in POOL for word in p.prompt.split()} <= set(world.words())


def test_the_world_holds_nothing_of_mini():
    subjects = {"brick", "bricks", "gear", "grass", "gravel", "nut"}
    assert not subjects & set(world.words())
    imported = [node for node in ast.walk(ast.parse(inspect.getsource(world))) if isinstance(node, ast.ImportFrom)]
    assert not any("mini" in (node.module or "") or any("mini" in n.name for n in node.names) for node in imported)
    prompts = {text for by_defect in mini.PROMPTS.values() for text in by_defect.values()}
    assert not prompts & {p.prompt for p in POOL}
