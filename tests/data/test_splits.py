import functools
import itertools
import shutil

import numpy as np
import pandas as pd
import pytest

from defectlib import paths
from defectlib.data import layouts, splits, tiles


def rows(entries, category="c"):
    """An index without files: (defect, id, group, role) each."""
    made = [
        {"category": category, "defect": d, "id": i, "group": g or f"{d}/{i}", "role": r, "image": f"{d}/{i}.png"}
        for d, i, g, r in entries
    ]
    return pd.DataFrame(made).assign(dataset="folder", mask="", box="", derive="")


def sides(table, side):
    return set(table.loc[table["side"] == side, "id"])


def test_first_third_is_the_lowest_third_by_number():
    table = splits.assign(rows([("crack", f"{i}", "", "") for i in range(11)]), "first_third")
    assert sides(table, "shot") == {"0", "1", "2"}  # floor(11 / 3) = 3, and 10 is not among the lowest
    assert len(sides(table, "test")) == 8


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (2, 1), (3, 1), (5, 1), (6, 2), (8, 2), (30, 10)])
def test_a_third_is_floored_and_at_least_one(n, expected):
    table = splits.assign(rows([("crack", f"{i:03d}", "", "") for i in range(n)]), "first_third")
    assert (table["side"] == "shot").sum() == expected and (table["side"] == "test").sum() == n - expected


def test_groups_are_counted_and_kept_whole():
    table = splits.assign(rows([("crack", f"{i:02d}", f"g{i // 4}", "") for i in range(24)]), "first_third")
    assert sides(table, "shot") == {f"{i:02d}" for i in range(8)}  # 6 groups: the lowest 2, of 4 images each


def test_a_group_with_several_defects_has_one_side_and_counts_in_both():
    entries = [("a", f"{i}", f"g{i}", "") for i in range(6)]
    entries += [("b", "0", "g0", ""), ("b", "1", "g5", "")] + [("b", f"{i}", f"h{i}", "") for i in range(2, 6)]
    table = splits.assign(rows(entries), "first_third")
    own = table.set_index(["defect", "id"])["side"]
    assert own["b", "0"] == "shot" and own["b", "1"] == "test", "a's groups keep the side that a gave them"
    assert (own["b"] == "shot").sum() == 2, "g0 counts towards b's quota of floor(6 / 3)"
    assert (table.groupby("group")["side"].nunique() == 1).all()


def test_normals_follow_their_group_then_their_folder_then_two_thirds():
    entries = [("crack", f"{i}", f"g{i}", "") for i in range(3)]
    entries += [
        ("good", "s", "g0", "test"),
        ("good", "t", "g2", ""),
        ("good", "u", "", "train"),
        ("good", "v", "", "test"),
    ]
    entries += [("good", f"w{i}", "", "") for i in range(10)]
    table = splits.assign(rows(entries), "first_third")
    own = table[table["defect"] == "good"].set_index("id")["side"]
    assert (own["s"], own["t"], own["u"], own["v"]) == ("train", "test", "train", "test")
    assert [own[f"w{i}"] for i in range(10)] == ["train"] * 6 + ["test"] * 4


def test_random_thirds_are_seeded_and_differ():
    index = rows([("crack", f"{i:02d}", "", "") for i in range(30)])
    parts = [sides(splits.assign(index, "random_thirds", seed), "shot") for seed in (0, 1, 2)]
    assert [len(p) for p in parts] == [10, 10, 10]
    assert all(a != b for a, b in itertools.combinations(parts, 2))
    assert parts[0] == sides(splits.assign(index, "random_thirds", 0), "shot")
    more = pd.concat([index, rows([("stain", f"{i}", "", "") for i in range(9)])], ignore_index=True)
    kept = splits.assign(more, "random_thirds", 0)
    assert sides(kept[kept["defect"] == "crack"], "shot") == parts[0], "another defect does not move this one"


@pytest.mark.parametrize(("n", "expected"), [(1, 1), (3, 1), (8, 4), (19, 9), (20, 10), (60, 10)])
def test_ten_shots_are_the_lowest_ten_and_never_more_than_half(n, expected):
    table = splits.assign(rows([("crack", f"{i}", "", "") for i in range(n)]), "ten_shots")
    assert sides(table, "shot") == {f"{i}" for i in range(expected)}
    assert len(sides(table, "test")) == n - expected


def test_all_shots_takes_up_to_thirty_and_tests_none():
    index = rows([("crack", f"{i:02d}", "", "") for i in range(40)] + [("stain", f"{i}", "", "") for i in range(7)])
    table = splits.assign(index, "all_shots")
    assert table.groupby(["defect", "side"]).size().to_dict() == {
        ("crack", "shot"): 30, ("crack", "unused"): 10, ("stain", "shot"): 7,
    }  # fmt: skip


def test_mvtec_first_third_has_the_published_totals():
    table = splits.published_split("first_third")
    assert table.groupby(["category", "defect"]).ngroups == 73 and table["category"].nunique() == 15
    assert len(table) == 1258 and (table["side"] == "shot").sum() == 393
    least = table[table["side"] == "shot"].groupby(["category", "defect"]).size()
    assert least.min() == 2 and least.max() == 10 and least["toothbrush", "defective"] == 10


@pytest.mark.parametrize(
    ("rule", "seed"),
    [("first_third", 0), ("ten_shots", 0), ("all_shots", 0)] + [("random_thirds", s) for s in (0, 1, 2)],
)
def test_committed_manifests_are_what_the_rule_gives(rule, seed):
    stored = pd.read_csv(splits.manifest_file(rule, seed), dtype=str, keep_default_na=False)
    assert stored.equals(splits.published_split(rule, seed).astype(str))


@pytest.mark.parametrize("rule", ["first_third", "random_thirds", "ten_shots"])
def test_files_get_the_same_split_as_public_knowledge(rule, trees, tmp_path):
    root = trees.mvtec(tmp_path / "mvtec", "toothbrush", ("defective",), shots=30, train=1, test=1)
    table = splits.split(layouts.index("mvtec_ad", root), root, rule, 1)
    published = splits.published_split(rule, 1).query("category == 'toothbrush' and side == 'shot'")
    assert sides(table, "shot") == set(published["id"])


def test_split_marks_copies_and_empty_masks_unused(plate, write_image):
    shutil.copy(plate / "plate/test/crack/000.png", plate / "plate/test/crack/004.png")
    shutil.copy(plate / "plate/train/good/001.png", plate / "plate/test/good/002.png")
    write_image(plate / "plate/ground_truth/stain/000_mask.png", np.zeros((32, 40), np.uint8))
    (plate / "plate/ground_truth/stain/001_mask.png").unlink()
    table = splits.split(layouts.index("folder", plate), plate, "first_third")
    unused = table[table["side"] == "unused"]
    assert list(zip(unused["defect"], unused["id"])) == [
        ("crack", "004"), ("good", "train_001"), ("stain", "000"), ("stain", "001"),
    ]  # fmt: skip
    assert sides(table[table["defect"] == "stain"], "shot") == {"002"}  # four usable ones are left
    assert sides(table[table["defect"] == "crack"], "shot") == {"000"}
    splits.check(table)


def test_manifest_round_trip(plate, tmp_path):
    table = splits.split(layouts.index("folder", plate), plate, "first_third")
    assert table.loc[0, "sha256"] == paths.sha256(plate / table.loc[0, "image"])
    splits.write(table, tmp_path / "deep/split.csv")
    assert splits.read(tmp_path / "deep/split.csv").equals(table)
    table.drop(columns="side").to_csv(tmp_path / "broken.csv", index=False)
    with pytest.raises(ValueError, match=r"broken.csv is no manifest: it lacks the columns side"):
        splits.read(tmp_path / "broken.csv")
    with pytest.raises(FileNotFoundError, match="none.csv does not exist"):
        splits.read(tmp_path / "none.csv")
    with pytest.raises(ValueError, match="no split rule 'thirds'"):
        splits.split(table, plate, "thirds")


def test_check_finds_a_leak_by_group_and_by_bytes(plate):
    table = splits.split(layouts.index("folder", plate), plate, "first_third")
    splits.check(table)
    by_group = table.copy()
    by_group.loc[by_group["id"].isin(["000", "005"]), "group"] = "piece 7"
    with pytest.raises(ValueError, match="the group piece 7 is in training and in test"):
        splits.check(by_group)
    by_bytes = table.copy()
    shot, test = (by_bytes.index[by_bytes["side"] == side][0] for side in ("shot", "test"))
    by_bytes.loc[test, "sha256"] = by_bytes.loc[shot, "sha256"]
    with pytest.raises(ValueError, match="the bytes of plate/test/crack/000.png is in training and in test"):
        splits.check(by_bytes)
    by_bytes.loc[test, "side"] = "unused"
    splits.check(by_bytes)


def test_reading_a_split(plate):
    table = splits.split(layouts.index("folder", plate), plate, "first_third")
    shots = splits.shots(table, plate, "plate", size=24)
    assert [(s.defect, s.id) for s in shots] == [("crack", "000"), ("crack", "001"), ("stain", "000"), ("stain", "001")]
    assert shots[0].image.shape == (3, 24, 24) and shots[0].mask.shape == (1, 24, 24)
    assert [s.defect for s in splits.shots(table, plate, "plate", ["stain"], 24)] == ["stain", "stain"]
    assert len(splits.normals(table, plate, "plate", size=24)) == 6
    assert len(splits.normals(table, plate, "plate", "test", 24)) == 3
    assert len(splits.normals(table, plate, "plate", size=24, limit=4)) == 4
    held = splits.held_out(table, plate, "plate", ["crack"], 24)
    assert [(defect, id) for _, _, defect, id in held] == [("crack", f"00{i}") for i in (2, 3, 4, 5)] + [
        ("good", f"test_00{i}") for i in range(3)
    ]
    assert all(mask.any() == (defect != "good") for _, mask, defect, _ in held)
    with pytest.raises(ValueError, match="category 'bottle' has no shots; categories with shots: plate"):
        splits.shots(table, plate, "bottle")


@functools.cache
def real_index(name, root, side):
    index = layouts.index(name, root)
    return index if side is None else tiles.cut(index, root, side, seed=0)


@pytest.mark.parametrize("rule", splits.RULES)
@pytest.mark.parametrize(
    ("name", "folder", "side"),
    [("gdxray", "gdxray", None), ("gdxray", "gdxray", 320), ("magnetic_tile", "magnetic_tile", None),
     ("mvtec_3d", "mvtec_3d_tire", None)],
)  # fmt: skip
def test_real_data_does_not_leak(rule, name, folder, side, shared):
    root = shared / folder
    table = splits.split(real_index(name, root, side), root, rule)
    splits.check(table)
    assert (table["side"] == "shot").any()
    if rule != "all_shots":
        assert (table.loc[table["defect"] != "good", "side"] == "test").any()
    if name == "magnetic_tile":
        empty = {"exp3_num_45042", "exp4_num_124690", "exp4_num_352527", "exp4_num_45057"}
        assert empty == sides(table, "unused") if rule != "all_shots" else empty <= sides(table, "unused")
    if name == "gdxray" and side is None:
        assert sides(table, "unused") == {"W0001_0000"}, "a copy of W0001_0001 without a mask"
