import dataclasses
import functools

import numpy as np
import pytest
import torch

from defectlib import evaluation, profiles, sampling, study
from defectlib.metrics import regions


def test_downstream_has_the_shots_only_row(tiny_parameters):
    s = study.open_category(tiny_parameters)
    for method in (study.SHOTS_ONLY, "crop_paste"):
        record = evaluation.downstream(s, method, 0)
        values = {m["metric"]: m["value"] for m in record["metrics"]}
        assert 0 <= values["accuracy"] <= 1 and 0 <= values["pixel_auroc"] <= 1
    assert not s.folder(study.SHOTS_ONLY, 0).stage_file("sample").exists()
    found = study.results(tiny_parameters, [s.category])
    assert set(found["method"]) == {study.SHOTS_ONLY, "crop_paste"} and set(found["stage"]) == {
        "fit",
        "sample",
        "downstream",
    }
    trained = found[found["metric"] == "pixel_ap"].set_index("method")["protocol"]
    assert '"n_generated": 0' in trained[study.SHOTS_ONLY] and '"n_train_real": 0' in trained["crop_paste"]


def test_downstream_scores_every_defect_by_itself_under_names_of_their_own(tiny_parameters):
    s = study.open_category(tiny_parameters)
    rows = evaluation.downstream(s, study.SHOTS_ONLY, 0)["metrics"]
    single = [row for row in rows if row["metric"].endswith(regions.BY_DEFECT)]
    assert {row["defect"] for row in single} == set(s.defects) and not any(
        "defect" in r for r in rows if r not in single
    )
    value = {(row["metric"], row.get("defect")): row["value"] for row in rows}
    f1 = [value["f1_macro" + regions.BY_DEFECT, d] for d in s.defects]
    assert np.mean(f1) == pytest.approx(value["f1_macro", None]), "the macro F1 is their mean"
    shown = {row["protocol"]["n_real"] for row in single if row["metric"] == "pixel_ap" + regions.BY_DEFECT}
    whole = next(row for row in rows if row["metric"] == "pixel_ap")["protocol"]["n_real"]
    assert max(shown) < whole, "one defect and all normals, not all defects"
    kept = np.load(s.folder(study.SHOTS_ONLY, 0).path / "predictions" / "localisation.npz")
    d, held = s.defects[0], s.held_out(0)
    own = [i for i, (*_, name, _) in enumerate(held) if name in (d, "good")]
    truth = torch.cat([held[i][1] for i in own]).numpy()
    by_hand = regions.pixel_metrics(kept["maps"][own].astype(np.float32), truth)["pixel_ap"]
    assert value["pixel_ap" + regions.BY_DEFECT, d] == pytest.approx(by_hand, abs=2e-3), (
        "maps are kept in half precision"
    )


def test_a_split_that_holds_nothing_out_withholds_its_scores(tiny_parameters):
    s = study.open_category(tiny_parameters.model_copy(update={"split": "all_shots"}))
    metrics = evaluation.downstream(s, study.SHOTS_ONLY, 0)["metrics"]
    assert {m["metric"] for m in metrics} == set(evaluation.WITHHELD) and all(m["value"] is None for m in metrics)
    assert all("'all_shots' holds no defect image of brick out" in m["protocol"]["why_withheld"] for m in metrics)
    assert evaluation.confusion(s, study.SHOTS_ONLY) is None


def ruled(parameters, **changes):
    """The tiny category under a profile whose downstream settings are changed."""
    s = study.open_category(parameters)
    downstream = s.settings.downstream.model_copy(update=changes)
    return dataclasses.replace(s, settings=s.settings.model_copy(update={"downstream": downstream}))


def score(record, metric):
    return next(m for m in record["metrics"] if m["metric"] == metric)


@pytest.mark.parametrize("method", [study.SHOTS_ONLY, "crop_paste"])
def test_what_the_oracle_would_have_shown_stands_beside_the_last_step_of_the_same_training(tiny_parameters, method):
    last = evaluation.downstream(ruled(tiny_parameters, checkpoints=2), method, 0)
    chosen = evaluation.downstream(ruled(tiny_parameters, selection="test_oracle", checkpoints=2), method, 0)
    assert chosen["key"] != last["key"] and not any(m["metric"].endswith(regions.ORACLE) for m in chosen["metrics"])
    beside = [m for m in last["metrics"] if m["metric"].endswith(regions.ORACLE)]
    whole = {m["metric"] for m in chosen["metrics"] if not m["metric"].endswith(regions.BY_DEFECT)}
    assert {m["metric"].removesuffix(regions.ORACLE) for m in beside} == whole
    for row in beside:
        alone = score(chosen, row["metric"].removesuffix(regions.ORACLE))
        assert row["value"] == alone["value"] and row["protocol"]["selection"] == alone["protocol"]["selection"]
        assert row["protocol"]["scores_by_step"] == alone["protocol"]["scores_by_step"]
    for metric in ("accuracy", "pixel_ap"):
        fair = score(last, metric)
        assert fair["protocol"]["selection"] == "last: batch-norm statistics recomputed"
        assert fair["value"] <= score(last, metric + regions.ORACLE)["value"]


def test_the_oracle_takes_the_best_test_score_and_says_so(tiny_parameters):
    s = ruled(tiny_parameters, selection="test_oracle", checkpoints=2)
    record = evaluation.downstream(s, "crop_paste", 0)
    for metric in ("accuracy", "pixel_ap"):
        row = score(record, metric)
        steps, values = zip(*row["protocol"]["scores_by_step"])
        assert steps == (1, 2) and row["value"] == pytest.approx(max(values), abs=1e-6)
        assert row["protocol"]["selection"].startswith("test_oracle: best of the checkpoints on the test set itself")
        assert row["protocol"]["held_back"] == 0
    single = [m for m in record["metrics"] if m["metric"].endswith(regions.BY_DEFECT)]
    assert all(m["protocol"]["selection"].startswith("test_oracle") for m in single)


@pytest.mark.parametrize("method", [study.SHOTS_ONLY, "crop_paste"])
def test_what_is_held_back_is_not_trained_on(tiny_parameters, monkeypatch, method):
    s = ruled(tiny_parameters, selection="val_generated", checkpoints=2)
    given = {"classifier": [], "localiser": []}
    for name, kept in given.items():
        real = getattr(evaluation.models, f"train_{name}")
        counted = functools.partial(lambda kept, real, *a: (kept.append(a[0]), real(*a))[1], kept, real)
        monkeypatch.setattr(evaluation.models, f"train_{name}", counted)
    record = evaluation.downstream(s, method, 0)
    shots, n = len(s.shots(0)), len(s.shots(0))
    if method == "crop_paste":
        n = len(sampling.load(s.folder(method, 0).path))
    assert [len(x) for x in given["localiser"]] == [n - len(s.defects)], "one of each defect is held back"
    assert [len(x) for x in given["classifier"]] == [n - len(s.defects) + (shots if method == "crop_paste" else 0)]
    told = score(record, "pixel_ap")["protocol"]
    assert told["held_back"] == len(s.defects) and told["n_train_real"] + told["n_generated"] == n - len(s.defects)


def test_one_shot_cannot_be_held_back(tiny_parameters, monkeypatch):
    s = ruled(tiny_parameters, selection="val_generated")
    few = [next(shot for shot in s.shots(0) if shot.defect == d) for d in s.defects]
    monkeypatch.setattr(study.Study, "shots", lambda self, seed=0: few)
    metrics = evaluation.downstream(s, study.SHOTS_ONLY, 0)["metrics"]
    assert {m["metric"] for m in metrics} == set(evaluation.WITHHELD) and all(m["value"] is None for m in metrics)
    assert f"holds an item of '{s.defects[0]}' back, and nothing" in metrics[0]["protocol"]["why_withheld"]


def test_the_three_rules_are_shown_on_one_training_that_is_kept(tiny_parameters, monkeypatch):
    s = ruled(tiny_parameters, checkpoints=2)
    record = evaluation.checkpoints(s, "crop_paste", 0)
    rows = [(m["protocol"]["step"], m["protocol"]["on"]) for m in record["metrics"]]
    assert rows == [(k, on) for k in (1, 2) for on in ("held-back items", "test set")]
    assert all(0 <= m["value"] <= 1 and m["metric"] == evaluation.BY_STEP for m in record["metrics"])
    monkeypatch.setattr(evaluation.models, "train_localiser", None)
    assert evaluation.checkpoints(s, "crop_paste", 0) == record, "read, not repeated"
    found = study.results(s.parameters, [s.category])
    assert "pixel_ap" not in set(found["metric"]), "no table takes them for a score"


def test_a_method_that_drew_nothing_is_not_replaced_by_the_shots(tiny_parameters):
    s = study.open_category(tiny_parameters)
    assert "some defects" in evaluation.why_withheld(s, [], s.held_out(0), "last")


def test_of_many_samples_the_first_of_each_defect_are_learned_from(tiny_parameters, monkeypatch):
    given, real = [], evaluation.models.train_localiser
    monkeypatch.setattr(evaluation.models, "train_localiser", lambda *a: (given.append(a[0]), real(*a))[1])
    s = ruled(tiny_parameters, n_samples=3)
    assert (s.n_per_defect("crop_paste"), s.n_used("crop_paste")) == (4, 3)
    assert ruled(tiny_parameters, n_samples=9).n_used("crop_paste") == 4, "more than are drawn there are not"
    record = evaluation.downstream(s, "crop_paste", 0)
    drawn = sampling.load(s.folder("crop_paste", 0).path)
    first = [item.image for d in s.defects for item in [x for x in drawn if x.defect == d][:3]]
    assert len(given[0]) == len(first) and all(any(torch.equal(a, b) for b in first) for a in given[0])
    for metric in ("pixel_ap", "accuracy", "pixel_ap" + regions.BY_DEFECT, "accuracy" + regions.BY_DEFECT):
        rows = [m for m in record["metrics"] if m["metric"] == metric]
        assert all(m["protocol"]["n_generated"] == len(first) for m in rows), metric
    assert record["key"] != evaluation.downstream(ruled(tiny_parameters), "crop_paste", 0)["key"]


def test_a_variant_on_fewer_shots_is_tested_as_its_method(tiny_parameters):
    s = study.open_category(tiny_parameters)
    lone = {"crop_paste_one": profiles.Variant(of="crop_paste", shots=profiles.ShotRule(most=1))}
    s = dataclasses.replace(s, settings=s.settings.model_copy(update={"variants": lone}))
    told = score(evaluation.downstream(s, "crop_paste_one", 0), "accuracy")["protocol"]
    whole = score(evaluation.downstream(s, "crop_paste", 0), "accuracy")["protocol"]
    assert told["n_train_real"] == len(s.defects) < whole["n_train_real"] == len(s.shots(0)), (
        "merged with its own shots"
    )
    assert (told["n_generated"], told["n_real"]) == (whole["n_generated"], whole["n_real"])


def test_no_model_is_asked_twice_for_the_same(tiny_parameters, monkeypatch):
    asked = {"predict_classes": [], "predict_maps": []}
    for name, kept in asked.items():
        real = getattr(evaluation.models, name)
        counted = functools.partial(
            lambda kept, real, model, x: (kept.append(id(model)), real(model, x))[1], kept, real
        )
        monkeypatch.setattr(evaluation.models, name, counted)
    settled, real = [], evaluation.models._settled
    monkeypatch.setattr(evaluation.models, "_settled", lambda *a: (settled.append(a), real(*a))[1])
    record = evaluation.downstream(ruled(tiny_parameters, checkpoints=2), study.SHOTS_ONLY, 0)
    assert len(settled) == 4, "two checkpoints a model; the last one is the model"
    for metric, name in (("accuracy", "predict_classes"), ("pixel_ap", "predict_maps")):
        (_, first), (_, last) = score(record, metric + regions.ORACLE)["protocol"]["scores_by_step"]
        assert len(asked[name]) == 2 + (first >= last), "each checkpoint once, the best again where it was not the last"
