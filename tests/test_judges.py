import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch

from defectlib import evaluation, judges, stages, study


def asking_for_classes(s):
    quality = s.settings.quality.model_copy(update={"class_seen": True})
    return dataclasses.replace(s, settings=s.settings.model_copy(update={"quality": quality}))


def test_masks_are_seen_by_a_localiser_of_the_shots_that_is_trained_once(tiny_parameters, monkeypatch):
    s = study.open_category(tiny_parameters)
    trained = []
    real = judges.models.train_localiser

    def counted(*arguments):
        trained.append(len(arguments[0]))
        return real(*arguments)

    monkeypatch.setattr(judges.models, "train_localiser", counted)
    monkeypatch.setattr(judges, "SEEN_LEAST", 0.0)  # a reader of two steps sees nothing
    rows = stages.quality(s, "crop_paste", 0)["metrics"]
    values = {row["defect"]: row["value"] for row in rows if row["metric"] == judges.MASK_SEEN}
    assert set(values) == set(s.defects) and all(0 <= value <= 1 for value in values.values())
    assert trained == [len(s.shots(0))], "once for both defects"
    model, maps = judges.reader(s, 0), judges.models.predict_maps
    assert not model.training and len(trained) == 1
    evaluation.downstream(s, study.SHOTS_ONLY, 0)
    told = np.load(s.folder(study.SHOTS_ONLY, 0).path / "predictions" / "localisation.npz")["maps"]
    found = maps(model, torch.stack([image for image, *_ in s.held_out(0)])).numpy()
    assert (told == found.astype(np.float16)).all(), "the row of the shots is the reader"
    images, masks = torch.zeros(2, 3, 64, 64), torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    monkeypatch.setattr(judges.models, "predict_maps", lambda *_: torch.eye(64).repeat(2, 1, 1))
    masks[1, 0, :32] = torch.eye(64, dtype=torch.bool)[:32]
    assert judges.seen(s, 0, images, masks) == [0.0, 0.5]


def test_what_a_blind_reader_says_is_withheld(tiny_parameters, monkeypatch):
    """Real and drawn images alike show it nothing; above the least overlap it is heard."""
    s = study.open_category(tiny_parameters)
    monkeypatch.setattr(judges.models, "predict_maps", lambda model, images: torch.zeros(len(images), s.size, s.size))
    rows = [m for m in stages.quality(s, "crop_paste", 0)["metrics"] if m["metric"] == judges.MASK_SEEN]
    assert len(rows) == len(s.defects) and all(m["value"] is None and m["protocol"]["on_real"] == 0 for m in rows)
    assert all("IoU of 0.00 only" in m["protocol"]["why_withheld"] for m in rows)


def test_classes_are_seen_by_a_classifier_of_the_shots_that_is_trained_once(tiny_parameters, monkeypatch):
    s = asking_for_classes(study.open_category(tiny_parameters))
    trained, real = [], judges.models.train_classifier

    def counted(*arguments):
        trained.append(len(arguments[0]))
        return real(*arguments)

    monkeypatch.setattr(judges.models, "train_classifier", counted)
    # Of every four images it takes three for the second defect: it knows that one, and not the first.
    says = torch.tensor([1, 0, 1, 1])
    monkeypatch.setattr(
        judges.models, "predict_classes", lambda model, x: torch.eye(2)[says.repeat(len(x) // 4 + 1)[: len(x)]]
    )
    rows = {m["defect"]: m for m in stages.quality(s, "crop_paste", 0)["metrics"] if m["metric"] == judges.CLASS_SEEN}
    first, second = (rows[d] for d in s.defects)
    assert second["value"] == 0.75 and second["protocol"]["seen_as"] == dict(zip(s.defects, (1, 3)))
    assert 0 < second["protocol"]["on_others"] < 1 and second["protocol"]["n_real"] > 0
    assert first["value"] is None and "no better than chance" in first["protocol"]["why_withheld"]
    assert trained == [len(s.shots(0))], "once for both defects"
    model = judges.sorter(s, 0)
    assert not model.training and len(trained) == 1
    monkeypatch.undo()
    evaluation.downstream(s, study.SHOTS_ONLY, 0)
    told = pd.read_csv(s.folder(study.SHOTS_ONLY, 0).path / "predictions" / "classification.csv")
    test = torch.stack([image for image, _, name, _ in s.held_out(0) if name != "good"])
    found = judges.models.predict_classes(model, test).numpy()
    assert told[[f"p_{d}" for d in s.defects]].to_numpy() == pytest.approx(found, abs=1e-6), "the row is the sorter"


def test_one_defect_has_no_class_to_be_taken_for(tiny_parameters):
    s = study.open_category(tiny_parameters)
    one = study.open_category(tiny_parameters.model_copy(update={"defects": list(s.defects[:1])}))
    s = asking_for_classes(one)
    (row,) = [m for m in stages.quality(s, "crop_paste", 0)["metrics"] if m["metric"] == judges.CLASS_SEEN]
    assert row["value"] is None and "one defect type" in row["protocol"]["why_withheld"]
