"""The papers' claims as data, and what is said of them."""

import json

import numpy as np
import pandas as pd
import pytest

from defectlib import judges, published
from defectlib.metrics import quality, regions
from defectlib.published.claims import load, printed
from defectlib.report import claims, layout, page, tables

CELLS = [("brick", "crack"), ("brick", "stain"), ("gear", "crack"), ("gear", "corrosion")]


ABLATION = ("defectsynth", "defectsynth_no_hmi")


def results(metric="tiny-kid", gain=-0.01, noise=0.001, seeds=3, cells=CELLS, methods=ABLATION):
    """The second method's numbers, and the first one's that are ``gain`` away from them."""
    rng = np.random.default_rng(0)
    rows = []
    for category, defect in cells:
        for seed in range(seeds):
            base = rng.normal(0.1, 0.05)
            for method in methods:
                value = base + (gain + rng.normal(0, noise) if method == methods[0] else 0.0)
                rows.append((category, method, seed, defect, metric, value))
    frame = pd.DataFrame(rows, columns=["category", "method", "seed", "defect", "metric", "value"])
    return frame.assign(dataset="mini", profile="demo", split="first_third", n_generated=16, protocol="{}")


def told(table, name):
    return table[table["id"] == name].iloc[0]


def test_claims_are_well_formed():
    every = load()
    assert len({claim.id for claim in every}) == len(every) >= 20
    assert {claim.paper for claim in every} == set(published.PAPERS.values())
    known = set(published.METHODS.values()) | {"dualanodiff_no_interaction", "dualanodiff_compensated"}
    for claim in every:
        assert {claim.method, *claim.against} <= known, claim.id
        assert claim.metric in layout.METRIC_TITLES, claim.id


def test_the_printed_numbers_bear_the_claims_out():
    compared = 0
    for claim in load():
        for against in claim.against:
            ours, theirs = printed(claim, claim.method), printed(claim, against)
            if ours is not None and theirs is not None:
                compared += 1
                assert ours < theirs if claim.better == "lower" else ours > theirs, (claim.id, against, ours, theirs)
    assert compared >= 30


def test_no_verdict_on_a_model_that_was_chosen_by_its_score():
    chosen = results(gain=-0.01).assign(protocol='{"selection": "test_oracle: best of the checkpoints"}')
    row = told(claims.judge(chosen), "ds-hmi-kid")
    assert row["verdict"] == claims.OPEN and "chosen by its score" in row["why"]


@pytest.mark.parametrize("gain, verdict", [(-0.01, claims.HELD), (0.01, claims.NOT_HELD), (0.0, claims.OPEN)])
def test_verdicts_follow_the_difference(gain, verdict):
    row = told(claims.judge(results(gain=gain)), "ds-hmi-kid")
    assert row["verdict"] == verdict and (row["cells"], row["of"], row["seeds"]) == (4, "pairs", 3)
    assert row["difference"] == pytest.approx(1000 * gain, abs=1.5) and row["low"] <= row["difference"] <= row["high"]
    assert (row["why"] == "the interval touches zero") == (verdict == claims.OPEN)


@pytest.mark.parametrize("few", [{"seeds": 2}, {"cells": CELLS[:3]}])
def test_no_verdict_from_too_little(few):
    row = told(claims.judge(results(**few)), "ds-hmi-kid")
    assert row["verdict"] == claims.OPEN and row["why"] == "4 pairs with 3 seeds each are needed"


def test_pairs_without_all_seeds_count_for_nothing():
    """Three of four pairs have one seed: what looks like four by three is six numbers."""
    frame = results()
    frame = frame[(frame["seed"] == 0) | ((frame["category"] == "brick") & (frame["defect"] == "crack"))]
    row = told(claims.judge(frame), "ds-hmi-kid")
    assert row["verdict"] == claims.OPEN and row["seeds"] == 1
    five = pd.concat([results(cells=[*CELLS, ("nut", "scratch")])])
    five = five[(five["category"] != "nut") | (five["seed"] == 0)]
    row = told(claims.judge(five), "ds-hmi-kid")
    assert (row["cells"], row["seeds"], row["verdict"]) == (4, 3, claims.HELD), "the fifth is left out"


def test_only_like_is_subtracted_from_like():
    frame = results()
    other = frame["method"] == "defectsynth"
    mixed = frame.assign(metric=frame["metric"].where(~other, "inception-kid"))
    row = told(claims.judge(mixed), "ds-hmi-kid")
    assert row["verdict"] == claims.OPEN and "different extractors" in row["why"]
    with pytest.raises(ValueError, match="mix values of 'profile'"):
        claims.judge(frame.assign(profile=frame["method"]))
    with pytest.raises(ValueError, match="mix values of 'split'"):
        claims.judge(frame.assign(split=frame["method"]))
    with pytest.raises(ValueError, match="several extractors"):
        claims.judge(pd.concat([frame, frame.assign(metric="inception-kid")]))
    scored = results("tiny-is", 0.1).assign(n_generated=lambda f: np.where(f["method"] == "defectsynth", 500, 1000))
    row = told(claims.judge(scored), "ds-hmi-is")
    assert row["verdict"] == claims.OPEN and "number of images" in row["why"]
    assert told(claims.judge(results("tiny-is", 0.1)), "ds-hmi-is")["verdict"] == claims.HELD


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1), (-1, 0), (np.nan, np.nan)])
def test_an_interval_on_zero_decides_nothing(low, high):
    assert claims.verdict(low, high, "higher")["verdict"] == claims.OPEN


def test_what_was_not_run_says_so():
    table = claims.judge(results())
    assert table["cells"].gt(0).is_monotonic_decreasing, "what was tested comes first"
    assert "adabldm" in told(table, "ada-iap")["why"] and told(table, "ada-iap")["verdict"] == claims.OPEN
    empty = claims.judge(results().iloc[:0])
    assert set(empty["verdict"]) == {claims.OPEN} and not empty["cells"].any()
    withheld = claims.judge(results().assign(value=np.nan))
    assert told(withheld, "ds-hmi-kid")["why"].startswith("withheld")


def test_pairs_are_within_seed_and_category():
    """A spread between categories a hundred times the gain hides nothing."""
    frame = results(noise=0.0)
    frame["value"] += frame["category"].map({"brick": 0.0, "gear": 1.0}) + frame["seed"]
    row = told(claims.judge(frame), "ds-hmi-kid")
    assert row["low"] == pytest.approx(-10) and row["high"] == pytest.approx(-10)


@pytest.mark.parametrize("n, verdict", [(2, claims.OPEN), (4, claims.HELD)])
def test_a_downstream_score_is_one_number_a_category(n, verdict):
    cells = [(category, "") for category in ("brick", "gear", "nut", "grass")[:n]]
    frame = results("pixel_ap", 0.05, cells=cells, methods=("defectsynth", "shots_only"))
    row = told(claims.judge(frame), "ds-pixel-ap")
    assert (row["cells"], row["of"], row["seeds"], row["verdict"]) == (n, "categories", 3, verdict)
    assert row["difference"] == pytest.approx(5, abs=0.2), "percent"


def test_a_downstream_score_of_each_defect_stands_before_that_of_the_category():
    whole = results("pixel_ap", -0.3, cells=[("brick", ""), ("gear", "")], methods=("defectsynth", "shots_only"))
    single = results("pixel_ap" + regions.BY_DEFECT, 0.05, methods=("defectsynth", "shots_only"))
    row = told(claims.judge(pd.concat([whole, single])), "ds-pixel-ap")
    assert (row["cells"], row["of"], row["verdict"], row["measured"]) == (4, "pairs", claims.HELD, "pixel_ap")
    assert row["difference"] == pytest.approx(5, abs=0.2)


def test_the_interval_of_one_seed_is_the_plain_bootstrap():
    values = np.random.default_rng(1).normal(size=(40, 1))
    low, high = claims.interval(values)
    half = 1.96 * values.std() / 40**0.5
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    gappy = np.where(np.arange(40)[:, None] % 4 == 0, np.nan, values)
    assert np.isfinite(claims.interval(gappy)).all()


@pytest.mark.parametrize("of", ["cells", "seeds", "each", "cells and each", "all three"])
def test_the_interval_of_four_by_three_covers_what_it_says(of):
    """Differences of a true mean of zero that vary between cells, between seeds, or from number to number."""
    rng = np.random.default_rng(5)
    cells, seeds, each = (rng.normal(size=(400, *shape)) for shape in ((4, 1), (1, 3), (4, 3)))
    drawn = {
        "cells": cells + 0 * each,
        "seeds": seeds + 0 * each,
        "each": each,
        "cells and each": cells + each,
        "all three": cells + seeds + each,
    }[of]
    bounds = [claims.interval(values, draws=1000) for values in drawn]
    assert np.mean([low <= 0 <= high for low, high in bounds]) >= 0.93


def test_plain_percentiles_of_four_cells_hold_less_than_they_say():
    """Why intervals are widened: about 80 % of them cover a true mean of zero, not 95."""
    rng, held = np.random.default_rng(6), []
    for _ in range(400):
        values = rng.normal(size=4)
        means = rng.multinomial(4, np.full(4, 0.25), 1000) @ values / 4
        low, high = np.quantile(means, [0.025, 0.975])
        held.append(low <= 0 <= high)
    assert 0.74 < np.mean(held) < 0.86


def test_the_table_reads_in_every_form(tmp_path):
    table = claims.judge(results())
    csv, markdown, latex = (file.read_text() for file in tables.write(table, tmp_path, claims.NAME))
    assert csv.count("\n") == len(table) + 1 and "held" in markdown.split("Not tested here")[0]
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") >= 2
    text = page.write_page(tmp_path, {}, results().iloc[:0], {}, claims=table).read_text()
    assert '<h3 id="claims">' in text and 'href="#claims"' in text and "1 comparison tested here" in text


def test_every_measure_that_a_claim_names_is_made():
    made = {published.kind(name) for name in quality.names("tiny", "tiny")}
    made |= {
        judges.MASK_SEEN,
        judges.CLASS_SEEN,
        "mask_iou",
        "seconds_per_image",
        "accuracy",
        "f1_macro",
        *regions.INSTANCES,
    }
    made |= {f"pixel_{name}" for name in regions.SCORES}
    made |= set(regions.image_metrics(np.array([0.1, 0.9]), np.array([False, True])))
    assert {claim.metric for claim in load()} <= made


def test_small_bounds_keep_their_sign():
    row = next(claims.judge(results(gain=-1e-5, noise=1e-7)).iloc[:1].itertuples())
    assert row.verdict == claims.HELD and "-0.0]" not in layout._interval_text(row)


@pytest.mark.parametrize(
    "against, other, decided", [("crop_paste", 16, 1), ("crop_paste", 32, 0), ("shots_only", 0, 1)]
)
def test_no_verdict_on_downstream_models_that_learned_from_unlike_numbers(against, other, decided):
    """Three of each could not be learned from; the shots alone are no number of samples."""
    frame = results("pixel_ap", 0.05, methods=("adabldm", against))
    given = {"adabldm": 13, against: max(0, other - 3)}
    told_of = [json.dumps({"task": "localisation", "n_generated": given[m], "left_out": 3}) for m in frame["method"]]
    table = claims.judge(frame.assign(protocol=told_of))
    row = table[(table["metric"] == "pixel_ap") & (table["against"] == against) & (table["method"] == "adabldm")].iloc[
        0
    ]
    assert row["verdict"] == (claims.HELD if decided else claims.OPEN)
    assert ("different numbers of samples" in row["why"]) != decided


@pytest.mark.parametrize(
    "gain, precision, why",
    [
        (0.05, (0.0, 0.4), "but precision is 0.00 of DualAnoDiff against 0.40"),
        (0.05, (0.5, 0.4), ""),
        (-0.05, (0.5, 0.4), "but precision is 0.40 of Crop-Paste against 0.50"),
        (-0.05, (0.3, 0.4), ""),
    ],
)
def test_variety_without_realism_is_named(gain, precision, why):
    """Garbled pictures raise IS, LPIPS and IC-LPIPS, of whichever system."""
    frame = results("tiny-ic-lpips", gain, methods=("dualanodiff", "crop_paste"))
    seen = frame["method"].map(dict(zip(("dualanodiff", "crop_paste"), precision)))
    # Of pairs that the verdict does not rest on precision says nothing.
    other = frame.assign(metric="tiny-precision", category="wood", value=frame["method"].eq("crop_paste") * 1.0)
    frames = [frame, frame.assign(metric="tiny-precision", value=seen), other]
    row = told(claims.judge(pd.concat(frames)), "dual-diversity")
    assert row["verdict"] == (claims.HELD if gain > 0 else claims.NOT_HELD)
    assert why in row["why"] and bool(why) == bool(row["why"])
