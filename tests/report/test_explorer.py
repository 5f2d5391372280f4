import dataclasses
import re

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection

from defectlib import images, judges, paths, sampling, stages, study
from defectlib.metrics import nearest
from defectlib.report import explorer, layout, scores
from defectlib.study import SHOTS_ONLY


def opened(parameters, category=None):
    return study.open_category(parameters.model_copy(update={"methods": ["crop_paste"], "category": category}))


@pytest.fixture
def s(tiny_parameters):
    found = opened(tiny_parameters)
    stages.sample(found, "crop_paste", 0)
    return found


@pytest.fixture
def explored(s, tiny_parameters, monkeypatch):
    """A method, a variant of it and another category are drawn; from here on nothing may be drawn or fitted."""
    stages.sample(s, "crop_paste_feather", 0)
    stages.sample(opened(tiny_parameters, "gear"), "crop_paste", 0)

    def refused(*_):
        raise AssertionError("an explorer draws and fits nothing")

    for name in ("fit", "sample", "quality"):
        monkeypatch.setattr(stages, name, refused)
    monkeypatch.setattr(judges, "reader", refused)
    return s


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def every(s):
    return pd.concat([scores.scores(s, "crop_paste", 0, defect) for defect in s.defects], ignore_index=True)


def test_scores_are_those_of_the_stages(s, monkeypatch):
    monkeypatch.setattr(judges, "SEEN_LEAST", 0.0)
    record = stages.quality(s, "crop_paste", 0)
    table = every(s)
    report = pd.read_csv(s.folder("crop_paste", 0).path / "samples.csv")
    assert {"seed", "defect", "shot", *scores.SCORES} == set(table.columns)
    pd.testing.assert_frame_equal(table[["seed", "defect", *scores.DRAWN]], report[["seed", "defect", *scores.DRAWN]])
    for name, score in (("tiny-lpips", "lpips"), (judges.MASK_SEEN, "mask_seen")):
        means = table.groupby("defect")[score].mean()
        stored = {m["defect"]: m["value"] for m in record["metrics"] if m["metric"] == name}
        assert means.to_dict() == pytest.approx(stored, rel=1e-5)
    ids = {(shot.defect, shot.id) for shot in s.shots(0)}
    assert set(zip(table["defect"], table["shot"])) <= ids


def test_the_nearest_shot_of_a_shot_is_itself(s):
    """Shots in the samples' places: their files are replaced by real ones, so distance and LPIPS are 0."""
    folder, defect = s.folder("crop_paste", 0).path, s.defects[0]
    shot = next(shot for shot in s.shots(0) if shot.defect == defect)
    images.write_image(sampling.image_file(folder, 0), shot.image)
    images.write_mask(sampling.mask_file(folder, 0), shot.mask)
    first, second = (scores.scores(s, "crop_paste", 0, defect).iloc[i] for i in (0, 1))
    assert first["shot"] == shot.id and first["distance"] == 0 and first["lpips"] == 0
    assert second["distance"] > 0 and second["lpips"] > 0


def test_without_its_localiser_a_mask_is_not_judged_and_none_is_trained(s):
    assert every(s)["mask_seen"].isna().all()
    assert not (s.folder(SHOTS_ONLY, 0).path / "reader.safetensors").exists()


def test_a_localiser_that_misses_real_defects_judges_nothing(s, monkeypatch):
    judges.reader(s, 0)
    monkeypatch.setattr(judges, "SEEN_LEAST", 1.1)
    assert every(s)["mask_seen"].isna().all()


def test_scores_are_computed_once_until_the_samples_or_the_localiser_change(s, monkeypatch):
    measured, calls = nearest.nearest_shots, []
    monkeypatch.setattr(nearest, "nearest_shots", lambda *a: calls.append(1) or measured(*a))
    for defect in s.defects:
        table = scores.scores(s, "crop_paste", 0, defect)
        table["distance"] = -1.0
    assert (every(opened(s.parameters))["distance"] >= 0).all(), "a copy was changed"
    assert len(calls) == len(s.defects)
    folder = s.folder("crop_paste", 0)
    folder.stage_file("sample").unlink()
    stages.sample(s, "crop_paste", 0)
    every(s)
    assert len(calls) == 2 * len(s.defects), "drawn again"
    judges.reader(s, 0)
    every(s)
    assert len(calls) == 3 * len(s.defects), "the localiser has been trained"
    quality = s.settings.quality.model_copy(update={"kid_subsets": 7})
    every(dataclasses.replace(s, settings=s.settings.model_copy(update={"quality": quality})))
    assert len(calls) == 4 * len(s.defects), "measured with other settings"


def test_ranking(s):
    defect = s.defects[0]
    for score in ("distance", "change_inside"):
        worst = scores.ranked(s, "crop_paste", 0, defect, score)[score]
        best = scores.ranked(s, "crop_paste", 0, defect, score, worst_first=False)[score]
        assert worst.nunique() > 1 and worst.tolist() == best.tolist()[::-1]
        assert (worst.iloc[0] > worst.iloc[-1]) == (scores.SCORES[score].worse == "high")
    with pytest.raises(ValueError, match="there is no score 'beauty'; there are: area, "):
        scores.ranked(s, "crop_paste", 0, defect, "beauty")
    with pytest.raises(ValueError, match=f"crop_paste/s0 has no sample of 'rust'; it has: {s.defects[0]}"):
        scores.ranked(s, "crop_paste", 0, "rust", "area")


def test_samples_that_are_not_drawn(tiny_parameters):
    s = opened(tiny_parameters)
    with pytest.raises(FileNotFoundError, match=r"sample\.json is missing: draw the samples first"):
        scores.scores(s, "crop_paste", 0, s.defects[0])
    with pytest.raises(FileNotFoundError, match="holds no samples to explore"):
        explorer.explore_samples(s)


def test_a_mask_is_laid_over_its_image():
    image, mask = torch.zeros(3, 2, 2), torch.tensor([[[True, False], [False, False]]])
    half, full = (explorer.tinted(image, mask, opacity) for opacity in (0.5, 1.0))
    colour = torch.tensor([0x00, 0xC8, 0xFF]) / 255 * 2 - 1
    assert torch.allclose(full[:, 0, 0], colour) and torch.allclose(half[:, 0, 0], colour / 2)
    assert (full[:, ~mask[0]] == 0).all() and torch.equal(explorer.tinted(image, mask, 0), image)
    with pytest.raises(ValueError, match=r"opacity must lie in \[0, 1\], got 50"):
        explorer.tinted(image, mask, 50)


def test_a_view_of_one_sample(s):
    defect = s.defects[1]
    figure = explorer.view(s, "crop_paste", 0, defect, 2, opacity=0)
    row = scores.scores(s, "crop_paste", 0, defect).iloc[2]
    _, tinted, plain, _ = (shown.get_array() for shown in figure.axes[0].images)
    assert np.array_equal(tinted, plain)
    told = "\n".join(texts(figure))
    assert f"{row['seed']:06d}.png, nearest shot {row['shot']}" in told and f"(tiny) {row['distance']:.2f}" in told
    assert "mask on defect" not in told, "not measured"
    with pytest.raises(ValueError, match="has 4 samples of .* there is no sample 4"):
        explorer.view(s, "crop_paste", 0, defect, 4)


def test_an_anomaly_part_stands_in_the_place_of_the_mask(s):
    assert "mask" in texts(explorer.view(s, "crop_paste", 0, s.defects[0]))
    part = torch.full((3, s.size, s.size), 0.5)
    images.write_image(sampling.part_file(s.folder("crop_paste", 0).path, 0), part)
    figure = explorer.view(s, "crop_paste", 0, s.defects[0])
    assert "part" in texts(figure) and "mask" not in texts(figure)
    assert np.ptp(figure.axes[0].images[3].get_array()) == 0


def test_a_sheet_of_the_worst(s):
    defect = s.defects[0]
    table = scores.ranked(s, "crop_paste", 0, defect, "distance")
    figure = explorer.contact_sheet(s, "crop_paste", 0, defect, "distance", n=3, outlines=True)
    captions = [f"{row['seed']:06d} · {row['distance']:.2f}" for _, row in table.head(3).iterrows()]
    assert [text for text in texts(figure) if " · " in text] == captions
    assert "high is worse): worst first, 3 of 4" in "\n".join(texts(figure))
    outlined = [item for item in figure.axes[0].collections if isinstance(item, LineCollection)]
    assert len(outlined) == 3 and len(figure.axes[0].images) == 3
    without = explorer.contact_sheet(s, "crop_paste", 0, defect, "mask_seen")
    assert not without.axes[0].collections and "not measured yet, or withheld" in "\n".join(texts(without))


def menus(box):
    return {item.description: item for row in box.children[:-1] for item in row.children}


def test_what_is_drawn_is_offered(explored):
    found = menus(explorer.explore_samples(explored))
    assert list(found) == ["category", "defect", "method", "seed", "sample", "mask"]
    assert [name for name, _ in found["category"].options] == sorted({c for c, *_ in explorer.drawn_runs(explored)})
    assert found["category"].value == explored.category
    assert [name for _, name in found["method"].options] == ["crop_paste", "crop_paste_feather"]
    assert found["method"].options[1][0] == layout.method_title("crop_paste_feather")
    assert [name for _, name in found["defect"].options] == list(explored.defects)
    assert len(found["sample"].options) == 4


def test_a_choice_narrows_the_menus_after_it_and_draws_once(explored, monkeypatch):
    drawn = []
    some = explorer.view(explored, "crop_paste", 0, explored.defects[0])
    monkeypatch.setattr(
        explorer, "view", lambda s, **chosen: drawn.append({"category": s.category, **chosen}) or some
    )  # fmt: skip
    found = menus(explorer.explore_samples(explored))
    found["method"].value = "crop_paste_feather"
    found["sample"].value = 3
    other = next(c for _, c in found["category"].options if c != explored.category)
    found["category"].value = other
    found["mask"].value = 0.8
    assert [name for _, name in found["method"].options] == ["crop_paste"]
    defects = [name for _, name in found["defect"].options]
    assert defects != list(explored.defects)
    assert [(d["category"], d["method"], d["number"], d["opacity"]) for d in drawn] == [
        (explored.category, "crop_paste", 0, 0.5), (explored.category, "crop_paste_feather", 0, 0.5),
        (explored.category, "crop_paste_feather", 3, 0.5), (other, "crop_paste", 3, 0.5), (other, "crop_paste", 3, 0.8),
    ]  # fmt: skip
    assert drawn[-1]["defect"] in defects


def test_every_offered_run_can_be_seen(explored):
    for (_, method, seed), run in explorer.drawn_runs(explored).items():
        for defect, n in run.pairs.items():
            assert len(explorer.view(run.study, method, seed, defect, n - 1).axes[0].images) == 4


def test_a_control_draws_anew_and_nothing_waits_for_its_client(explored):
    """An Output widget is answered by nbclient while its cell runs, which may then wait for ever (its issue 312)."""

    def draw(number):
        return explorer.view(explored, "crop_paste", 0, explored.defects[0], number)

    box = explorer.interactive(draw, number=ipywidgets.IntSlider(0, max=3))
    control, picture = box.children
    first = bytes(picture.value)
    control.value = 2
    assert first.startswith(b"\x89PNG") and bytes(picture.value) == draw(2)._repr_png_() != first
    for some in (box, explorer.explore_samples(explored), explorer.explore_sheet(explored)):
        assert isinstance(some.children[-1], ipywidgets.Image)
    for text in [*paths.NOTEBOOKS.glob("*.py"), *(paths.ROOT / "defectlib").rglob("*.py")]:
        assert not re.search(r"Output\(\)|ipywidgets\.interact", text.read_text()), text


def test_the_sheet_starts_as_the_function_does(explored, monkeypatch):
    drawn = []
    some = explorer.view(explored, "crop_paste", 0, explored.defects[0])
    monkeypatch.setattr(explorer, "contact_sheet", lambda s, **chosen: drawn.append(chosen) or some)
    found = menus(explorer.explore_sheet(explored))
    found["order"].value = False
    first = {"method": "crop_paste", "seed": 0, "defect": explored.defects[0]}
    first |= {"score": "lpips", "worst_first": True, "outlines": False}
    assert drawn == [first, first | {"worst_first": False}]
    assert set(found["score"].options.values()) == set(scores.SCORES)
    assert "LPIPS to nearest real (tiny)" in found["score"].options
    assert isinstance(found["outline the masks"], ipywidgets.Checkbox)
