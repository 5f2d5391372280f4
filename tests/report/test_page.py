from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

from defectlib.report import figures, page, tables

ROWS = [
    ("crop_paste", seed, stage, defect, metric, value)
    for seed in (0, 1)
    for stage, defect, metric, value in (
        ("quality", "crack", "tiny-kid", 0.1 + seed / 100),
        ("quality", "stain", "tiny-kid", None),
        ("downstream", "", "accuracy", 0.5),
    )
]


def results(**changes):
    frame = pd.DataFrame(ROWS, columns=["method", "seed", "stage", "defect", "metric", "value"]).assign(
        profile="demo", split="first_third", dataset="mini", category="nut", git_sha="abc" * 13 + "d", dirty=True,
        wall_s=1.25, device="cpu x86_64", n_real=24, n_generated=24, protocol="{}", extractor="", sd=None,
    )  # fmt: skip
    frame["path"] = [f"demo/mini/nut/crop_paste/s{s}/{stage}.json" for s, stage in zip(frame["seed"], frame["stage"])]
    return frame.assign(**changes)


def built(frame):
    return {name: tables.build(frame, name) for name in tables.NAMES}


def test_a_page_of_smoke_says_that_its_pairs_are_noise(tmp_path):
    texts = {}
    for profile in ("smoke", "demo", "gone"):  # a profile that was renamed since has runs, too
        frame = results(profile=profile)
        texts[profile] = page.write_page(tmp_path, built(frame), frame, {}).read_text()
    assert "what they draw is noise" in texts["smoke"]
    assert "noise" not in texts["demo"] + texts["gone"]


class Checker(HTMLParser):
    """Every element that is opened is closed in order; collects ids and what is referred to."""

    VOID = {"meta", "img", "br"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    checker = Checker()
    checker.feed(path.read_text())
    assert checker.open == []
    return checker


def test_page_is_whole_and_self_contained(tmp_path):
    figure = figures.sheet([[torch.zeros(3, 8, 8)]])
    shown = {"fig_3_generated_nut": "Real, mask, generated", "odd_one": "An <odd> picture"}
    for stem in (*shown, "fig_3_generated_gear"):
        figures.save(figure, tmp_path, stem)
    target = page.write_page(tmp_path, built(results()), results(), shown)
    assert target == tmp_path / "report.html"
    found = parsed(target)
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        assert link.startswith("data:image/png;base64,") or link.removeprefix("#") in found.ids
    assert "script" not in found.tags and "http" not in re.sub(r"base64,[^\"]*", "", target.read_text())
    assert found.tags.count("img") == 2 and "fig_3_generated_gear" not in found.ids, "named pictures only"
    text = " ".join(found.text)
    assert "An <odd> picture" in text and "Real, mask, generated" in text
    assert {f"table_{i}" for i in range(1, 11)} | {"headline", "pictures", "runs"} <= set(found.ids)
    before = target.read_bytes()
    assert page.write_page(tmp_path, built(results()), results(), shown).read_bytes() == before


def test_page_without_runs_or_pictures(tmp_path):
    nothing = results().iloc[:0]
    text = " ".join(parsed(page.write_page(tmp_path, built(nothing), nothing, {})).text)
    assert "every number below is a published one" in text and "127.16" in text and "No runs." in text


def test_user_text_is_escaped(tmp_path):
    frame = results(category="<b>&nut", device='"<script>')
    text = page.write_page(tmp_path, built(frame), frame, {}).read_text()
    assert "<script" not in text and "&lt;b&gt;&amp;nut" in text


def test_numbers_and_reasons_are_on_the_page(tmp_path):
    text = " ".join(parsed(page.write_page(tmp_path, built(results()), results(), {})).text)
    assert "105.0 ± 7.1 (2)" in text and "partly withheld" in text and "code had uncommitted changes" in text
    assert "abcabcabcabc + changes" in text


def test_long_tables_show_averages_first(tmp_path):
    frame = pd.concat([results(category=f"c{i}") for i in range(30)])
    text = page.write_page(tmp_path, built(frame), frame, {}).read_text()
    assert "average over categories" in text and "rows, by category</summary>" in text


def test_named_pictures_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.png does not exist: save the figure"):
        page.write_page(tmp_path, {}, results(), {"missing": "x"})


def test_versions_come_from_the_stage_files(tmp_path):
    for path in results()["path"].unique():
        file = tmp_path / "runs" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"python": "3.11.9", "versions": {"torch": "2.15.0"}}))
    text = " ".join(parsed(page.write_page(tmp_path, {}, results(), {}, tmp_path / "runs")).text)
    assert re.search(r"4 stages\s+ran with .*torch 2\.15\.0", text)


def test_summary():
    assert page.summary(results()) == (
        "2 runs of profile demo on mini: 1 category, 2 defects, 2 seeds; Crop-Paste. They gave 4 numbers; 2 more were "
        "withheld, each with its reason."
    )
    assert "Nothing has been run yet" in page.summary(results().iloc[:0])
