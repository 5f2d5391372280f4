from __future__ import annotations

import json
import re
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from defectlib import images
from defectlib.data import mini

TINY = {"categories": ["brick", "gear"], "shots": 2, "train": 2, "test": 1, "size": 32}
PAIRS = [(category, defect) for category, defects in mini.CATEGORIES.items() for defect in defects]


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_layout_counts_and_mask_values(tmp_path):
    root = mini.build(tmp_path / "mini", **TINY)
    names = set(files(root))
    assert len([name for name in names if name.startswith("gear/")]) == 2 + 1 + 3 * 2 * 2
    assert {"brick/train/good/001.png", "brick/test/good/000.png", "gear/test/missing_tooth/001.png"} <= names
    for category in TINY["categories"]:
        for defect in mini.CATEGORIES[category]:
            for index in range(2):
                mask = root / category / "ground_truth" / defect / f"{index:03d}_mask.png"
                assert set(np.unique(images.mask_values(mask))) == {0, 255}
                image = images.open_pil(root / category / "test" / defect / f"{index:03d}.png")
                assert image.mode == "RGB" and image.size == (32, 32)


def test_equal_seed_gives_equal_bytes_and_another_seed_does_not(tmp_path):
    first = files(mini.build(tmp_path / "a", seed=3, **TINY))
    assert first == files(mini.build(tmp_path / "b", seed=3, **TINY))
    other = files(mini.build(tmp_path / "c", seed=4, **TINY))
    assert all(first[name] != other[name] for name in first if "ground_truth" not in name)


def test_an_image_does_not_depend_on_the_others(tmp_path):
    few = files(mini.build(tmp_path / "few", **TINY))
    more = files(mini.build(tmp_path / "more", **(TINY | {"categories": None, "shots": 3, "train": 3})))
    assert few.items() <= more.items()
    image, mask = mini.draw("gear", "test/crack", 1, size=32)
    folder = tmp_path / "few" / "gear"
    assert torch.equal(image, images.read_image(folder / "test/crack/001.png"))
    assert torch.equal(mask, images.read_mask(folder / "ground_truth/crack/001_mask.png"))


def test_a_whole_build_is_kept_and_a_damaged_or_other_one_replaced(tmp_path):
    root = mini.build(tmp_path / "mini", **TINY)
    stamp = json.loads((root / mini.STAMP).read_text())
    assert (stamp["version"], stamp["seed"], stamp["shots"]) == (mini.VERSION, 0, 2)
    assert stamp["sha256"] == mini.digest(root)
    before, when = files(root), (root / mini.STAMP).stat().st_mtime_ns
    mini.build(root, **TINY)
    assert (root / mini.STAMP).stat().st_mtime_ns == when
    (root / "gear/train/good/000.png").unlink()
    mini.build(root, **TINY)
    assert files(root) == before
    mini.build(root, **(TINY | {"shots": 1}))
    assert json.loads((root / mini.STAMP).read_text())["shots"] == 1 and len(files(root)) < len(before)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".part", ".old")]


def test_a_build_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    root = mini.build(tmp_path / "mini", **TINY)
    before, real, calls = files(root), mini.images.write_image, []

    def full_disk(path, image):
        calls.append(path)
        if len(calls) > 3:
            raise OSError("no space left")
        real(path, image)

    monkeypatch.setattr(mini.images, "write_image", full_disk)
    with pytest.raises(OSError, match="no space"):
        mini.build(root, seed=1, **TINY)
    assert files(root) == before
    monkeypatch.undo()
    assert files(mini.build(root, seed=1, **TINY)) != before
    assert not (tmp_path / ".mini.part").exists()


def test_a_folder_with_something_else_in_it_is_not_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.txt"):
        mini.build(tmp_path / "mine", **TINY)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    "wrong", [{"categories": ["bottle"]}, {"categories": []}, {"shots": 0}, {"size": 8}, {"seed": -1}]
)
def test_impossible_arguments_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(ValueError, match="mini"):
        mini.build(tmp_path / "mini", **(TINY | wrong))
    assert not list(tmp_path.iterdir())


def test_unknown_kind_is_refused():
    for category, kind in [("gear", "test/hole"), ("gear", "good"), ("bolt", "train/good")]:
        with pytest.raises(ValueError, match="mini has no"):
            mini.draw(category, kind, 0, size=32)


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("mini opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    from defectlib.data import mini_subjects

    mini_subjects._picture.cache_clear()
    for name in ("brick", "grass", "gravel"):
        assert mini_subjects._picture(name).shape == (512, 512)


@pytest.mark.parametrize("category, defect", PAIRS)
def test_the_mask_is_where_the_defect_shows(category, defect):
    """Against the same piece without the defect: changed inside the mask, not away from it (a shadow is near)."""
    for index in range(2):
        image, mask = mini.draw(category, f"test/{defect}", index)
        clean, none = mini.draw(category, f"test/{defect}", index, clean=True)
        assert not none.any() and mask.any()
        change = (image - clean).abs().mean(0).numpy()
        inside = mask[0].numpy()
        near = binary_dilation(inside, iterations=6)
        assert (change[inside] > 0.05).mean() > 0.6
        assert (change[~near] > 0.05).mean() < 0.01


@pytest.mark.parametrize("category, defect", PAIRS)
def test_defects_stay_visible_at_64_px_and_lie_on_the_object(category, defect):
    image, mask = mini.draw(category, f"test/{defect}", 5)
    clean, _ = mini.draw(category, f"test/{defect}", 5, clean=True)
    change = (images.resize_image(image, 64) - images.resize_image(clean, 64)).abs().mean(0)
    small = images.resize_mask(mask, 64)[0]
    assert change[small].mean() > 0.1
    whole = mini.foreground(category, f"test/{defect}", 5)
    if defect in ("missing_tooth", "broken_corner"):
        assert (mask & ~whole).any()
    else:
        assert (mask & ~whole).sum() <= 0.1 * mask.sum()


def test_masks_and_shots_vary():
    for category, defect in PAIRS:
        masks = [mini.draw(category, f"test/{defect}", index, size=32)[1] for index in range(4)]
        assert all(not torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))


def test_foreground_is_the_object_and_all_of_a_texture():
    for category in ("brick", "grass", "gravel"):
        assert mini.foreground(category, "train/good", 0, size=64).all()
    for category, low, high in [("gear", 0.25, 0.55), ("nut", 0.2, 0.5)]:
        share = mini.foreground(category, "train/good", 0, size=64).float().mean().item()
        assert low < share < high
    assert not mini.foreground("nut", "train/good", 0)[0, 60:68, 60:68].any(), "the bore is background"


def test_every_defect_has_a_prompt_and_the_grid_of_demo_shows_both_kinds():
    assert {c: tuple(prompts) for c, prompts in mini.PROMPTS.items()} == mini.CATEGORIES
    assert list(mini.CATEGORIES) == sorted(mini.CATEGORIES)
    assert all(list(defects) == sorted(defects) and len(defects) >= 3 for defects in mini.CATEGORIES.values())
    for category in list(mini.CATEGORIES)[:2]:
        ratios = [np.mean(mini.areas(category, defect, 6, size=64)) for defect in mini.CATEGORIES[category][:2]]
        assert min(ratios) < 0.053 < max(ratios)


def test_the_card_says_what_is_drawn():
    card = (Path(mini.__file__).parent / "MINI_CARD.md").read_text()
    rows = re.findall(r"^\| \w+ \| \w+ \| 24 \| .*(?:small|large) \|$", card, re.MULTILINE)
    assert [tuple(row.split(" | ")[:2]) for row in rows] == [(f"| {c}", d) for c, d in PAIRS]
    for category, defect in [("brick", "pinhole"), ("gear", "corrosion")]:
        assert mini.card_row(category, defect) in rows


def test_command_line_builds(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(mini, "build", lambda root, seed: seen.append((root, seed)) or root)
    mini.main([str(tmp_path / "here"), "--seed", "5"])
    assert seen == [(tmp_path / "here", 5)] and str(tmp_path / "here") in capsys.readouterr().out


def test_a_tiny_build_takes_seconds(tmp_path):
    start = time.perf_counter()
    mini.build(tmp_path / "mini", categories=["gear", "nut"], shots=4, train=6, test=3, size=64)
    assert time.perf_counter() - start < 15
