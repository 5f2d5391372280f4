"""downstream, checkpoints: what samples are good for, as stages beside those of :mod:`stages`.

Both train the models of :mod:`downstream` and test them on held-out real images.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from defectlib import downstream as models
from defectlib import paths, runs, sampling
from defectlib.metrics import regions
from defectlib.profiles import TrainSettings
from defectlib.runs import RunFolder
from defectlib.stages import sample
from defectlib.study import SHOTS_ONLY, Study
from defectlib.types import Sample, Shot

WITHHELD = (
    *("accuracy", "f1_macro", "image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_f1_50"), *regions.INSTANCES,
)  # fmt: skip
BY_STEP = "pixel_ap_by_step"
Item = Shot | Sample
Test = list[tuple[Tensor, Tensor, str]]  # image, mask, defect


@runs.alone
def downstream(s: Study, method: str, seed: int) -> dict[str, Any]:
    """Train the classifier and the localiser on a run's samples, test on held-out real images; the stage's record.

    The row ``shots_only`` (the papers' "w/o augmentation") trains both on the shots, by the same settings: as many
    steps, or as many epochs of fewer images. Where the rule of selection is ``last``, the scores that ``test_oracle``
    would have had of the same training stand beside it, under names that end in ``regions.ORACLE``. A split that holds
    no defect out (``all_shots`` on a small set) has nothing to test on: its scores are withheld, with the reason.
    """
    source = [_source(s, method, seed)]
    values = {
        "downstream": _asked(s), "defects": s.defects, "seed": seed,
        # Runs from before PRO, and scores by defect, were measured are measured again.
        "pro_limit": regions.PRO_LIMIT, "by_defect": True,
    }  # fmt: skip
    folder, key = s.folder(method, seed), runs.stage_key(values, source)
    if (record := folder.complete("downstream", key)) is not None:
        return record
    with runs.stage(folder, "downstream", key, s.identity(method, seed), values, {"source": source[0]}) as metrics:
        shots, held_out = s.learned(method, seed), s.held_out(seed)
        drawn = [] if method == SHOTS_ONLY else sampling.load(folder.path, limit=s.n_used(method))
        items = shots if method == SHOTS_ONLY else drawn
        if reason := why_withheld(s, items, held_out, s.settings.downstream.selection):
            metrics.extend({"metric": m, "value": None, "protocol": {"why_withheld": reason}} for m in WITHHELD)
        else:
            metrics.extend(_classification(s, folder, shots, drawn, held_out, seed))
            metrics.extend(_localisation(s, folder, items, held_out, seed))
    return folder.record("downstream")


def _source(s: Study, method: str, seed: int) -> str:
    """The key of what is learned from: of the drawn samples, or of the shots."""
    return s.data_key(seed) if method == SHOTS_ONLY else sample(s, method, seed)["key"]


def _asked(s: Study) -> dict[str, Any]:
    """The settings that a score depends on."""
    asked = s.settings.downstream
    trained = {task: models.asked(getattr(asked, task)) for task in ("classifier", "localiser")}
    return asked.model_dump(exclude={"curve", "variants"}) | trained


def why_withheld(s: Study, items: Sequence[Item], held_out: list, rule: str) -> str | None:
    """Why nothing can be learned from these items under a rule of selection, or tested; None where all is well."""
    if all(item[2] == "good" for item in held_out):
        return f"the split '{s.settings.data.split}' holds no defect image of {s.category} out"
    if {item.defect for item in items} != set(s.defects):
        return "too few masks could be drawn for some defects"
    if not (usable := _usable(items)):
        return "no drawn mask can be learned from: each is empty, full, or of a size that no real one has"
    counts = Counter(item.defect for item in usable)
    if rule == "val_generated" and (single := [defect for defect in s.defects if counts[defect] == 1]):
        return f"val_generated holds an item of '{single[0]}' back, and nothing would be left to learn from"
    return None


def _usable(items: Sequence[Item]) -> list[Item]:
    """What a localiser may learn from.

    A drawn pair whose mask is empty, full or of no real one's size would teach a defect that is none.
    """
    return [item for item in items if isinstance(item, Shot) or sampling.teaches(item)]


def confusion(s: Study, method: str) -> np.ndarray | None:
    """The confusion matrix of a method summed over seeds (rows true, columns predicted); None with one defect type."""
    rows = [row for seed in s.seeds for row in downstream(s, method, seed)["metrics"] if row["metric"] == "accuracy"]
    counts = [row["protocol"]["confusion"] for row in rows if row["value"] is not None]
    return np.sum(counts, axis=0) if counts else None


def _split(items: Sequence[Item], test: Test, rule: str, seed: int) -> tuple[list[Item], Test]:
    """What is trained on under a rule of selection, and what its checkpoints are scored on."""
    if rule != "val_generated":
        return list(items), test
    back = models.held_back([item.defect for item in items], seed)
    judge = [(item.image, item.mask, item.defect) for item, out in zip(items, back, strict=True) if out]
    return [item for item, out in zip(items, back, strict=True) if not out], judge


def train_classifier(
    s: Study,
    shots: Sequence[Item],
    drawn: Sequence[Item],
    test: Test,
    settings: TrainSettings,
    seed: int,
    looked: models.Checkpoints | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier under the profile's rule of selection, and its protocol.

    What is held back is drawn, if any is. ``looked`` scores checkpoints of a training that ``last`` ends.
    """
    rule, n = s.settings.downstream.selection, s.settings.downstream.checkpoints
    left, judge = _split(drawn or shots, test, rule, seed)
    train = [*shots, *left] if drawn else left
    labels = torch.tensor([s.defects.index(item.defect) for item in train])
    told_of = predictions(models.predict_classes, judge)
    choice = None if rule == "last" else models.Checkpoints(n, lambda model: accuracy(s, told_of(model), judge))
    pictures = torch.stack([item.image for item in train])
    model, losses = models.train_classifier(pictures, labels, len(s.defects), settings, seed, choice or looked)
    told = {"n_train_real": len(train) - len(left) if drawn else len(left), "n_generated": len(left) if drawn else 0}
    told |= _told("classification", rule, choice, losses, len(drawn or shots) - len(left))
    return choice.best if choice else model, told


def train_localiser(
    s: Study,
    items: Sequence[Item],
    test: Test,
    settings: TrainSettings,
    seed: int,
    looked: models.Checkpoints | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A localiser under the profile's rule of selection, and its protocol; ``looked``: see the classifier's."""
    rule, n = s.settings.downstream.selection, s.settings.downstream.checkpoints
    real, usable = isinstance(items[0], Shot), _usable(items)
    train, judge = _split(usable, test, rule, seed)
    maps_of = predictions(models.predict_maps, judge)
    choice = None if rule == "last" else models.Checkpoints(n, lambda model: pixel_ap(maps_of(model), judge))
    normals = torch.stack(s.normals(seed))
    model, losses = models.train_localiser(*sampling.stack(train), normals, settings, seed, choice or looked)
    told = {
        "n_train_real": len(train) if real else 0, "n_generated": 0 if real else len(train),
        "left_out": len(items) - len(usable),
    }  # fmt: skip
    told |= _told("localisation", rule, choice, losses, len(usable) - len(train))
    return choice.best if choice else model, told


TRAINING = {
    "classification": {"loss": "cross-entropy", "augmentation": "flips", "schedule": "Adam, cosine to zero"},
    "localisation": {"loss": "focal + Dice", "augmentation": "flips", "schedule": "Adam, cosine to zero"},
}
"""What stands in a protocol because the papers' own training differs: MultiStep decay, focal loss alone, 256 px."""


def _told(
    task: str, rule: str, choice: models.Checkpoints | None, losses: list[float], held_back: int
) -> dict[str, Any]:
    """How a model was trained and chosen, for the protocol of its scores."""
    told = {
        "task": task, **TRAINING[task], "selection": f"{rule}: {models.SELECTIONS[rule]}", "final_loss": losses[-1],
        "optimiser_steps": len(losses),
    }  # fmt: skip
    return told if choice is None else told | {"held_back": held_back, "scores_by_step": choice.scores}


def predictions(predict: Callable[[nn.Module, Tensor], Tensor], items: Test) -> Callable[[nn.Module], np.ndarray]:
    """A model's predictions on these items; those of the last model are kept, as it is asked for them again."""
    return functools.lru_cache(maxsize=1)(lambda model: predict(model, torch.stack([i[0] for i in items])).numpy())


def accuracy(s: Study, probability: np.ndarray, items: Test) -> float:
    """The share of defect images that are named rightly."""
    named = probability.argmax(1).tolist()
    return float(np.mean([s.defects[i] == item[2] for i, item in zip(named, items, strict=True)]))


def pixel_ap(maps: np.ndarray, items: Test) -> float:
    """Average precision over all pixels; 0 where no pixel is defect, for all models alike."""
    return regions.pixel_metrics(maps, torch.cat([item[1] for item in items]).numpy())["pixel_ap"] or 0.0


def _classification(s: Study, folder: RunFolder, shots: list, drawn: list, held_out: list, seed: int) -> list[dict]:
    """Defect classification: base set merged with the samples (DefectSynth, Section V-A.2)."""
    settings = s.settings.downstream.classifier
    test = [item for item in held_out if item[2] != "good"]
    protocol = {
        "task": "classification", **settings.model_dump(), "n_real": len(test), "n_train_real": len(shots),
        "n_generated": len(drawn), "classes": list(s.defects), "image_size": s.size,
    }  # fmt: skip
    if len(s.defects) < 2:
        reason = {"why_withheld": "one defect type: there is nothing to tell apart"}
        return [{"metric": m, "value": None, "protocol": protocol | reason} for m in ("accuracy", "f1_macro")]
    told_of = predictions(models.predict_classes, test)
    looked = _watched(s, lambda model: accuracy(s, told_of(model), test))
    model, told = train_classifier(s, shots, drawn, test, settings, seed, looked)
    probability = told_of(model)
    table = pd.DataFrame(probability, columns=[f"p_{d}" for d in s.defects])
    table.insert(0, "id", [name for *_, name in test])
    table.insert(1, "true", [defect for *_, defect, _ in test])
    table.insert(2, "predicted", [s.defects[i] for i in probability.argmax(1).tolist()])
    paths.write_text(folder.path / "predictions" / "classification.csv", table.to_csv(index=False))
    scores = regions.classification_metrics(table["true"].tolist(), table["predicted"].tolist(), list(s.defects))
    protocol |= {**told, "confusion": scores["confusion"]}
    rows = [{"metric": m, "value": scores[m], "protocol": protocol} for m in ("accuracy", "f1_macro")]
    for defect, own in regions.by_defect(scores["confusion"], list(s.defects)).items():
        n = sum(name == defect for *_, name, _ in test)
        single = {name: told[name] for name in ("task", "selection", "n_generated")} | {"n_real": n}
        rows += [
            {"metric": m + regions.BY_DEFECT, "value": v, "defect": defect, "protocol": single} for m, v in own.items()
        ]
    if looked:
        best = told_of(looked.best).argmax(1).tolist()
        scores = regions.classification_metrics(table["true"].tolist(), [s.defects[i] for i in best], list(s.defects))
        told = _by_oracle(protocol | {"confusion": scores["confusion"]}, looked)
        rows += [{"metric": m + regions.ORACLE, "value": scores[m], "protocol": told} for m in ("accuracy", "f1_macro")]
    return rows


def _localisation(s: Study, folder: RunFolder, items: list, held_out: list, seed: int) -> list[dict]:
    """Defect localisation, scored per pixel and per image (DefectSynth, Section V-A.2)."""
    settings = s.settings.downstream.localiser
    maps_of = predictions(models.predict_maps, held_out)
    looked = _watched(s, lambda model: pixel_ap(maps_of(model), held_out))
    model, told = train_localiser(s, items, held_out, settings, seed, looked)
    maps = maps_of(model)
    truth = torch.cat([mask for _, mask, *_ in held_out]).numpy()
    target = folder.path / "predictions" / "localisation.npz"
    names = np.array([f"{defect}/{name}" for _, _, defect, name in held_out])
    np.savez_compressed(packed := io.BytesIO(), maps=maps.astype(np.float16), names=names)
    paths.write_bytes(target, packed.getvalue())
    protocol = {
        **settings.model_dump(), **told, "n_real": len(held_out), "image_size": s.size,
        "pro_limit": regions.PRO_LIMIT, "n_instances": len(regions.instances(truth)),
    }  # fmt: skip
    rows = _region_scores(maps, truth, protocol)
    labels = np.array([defect for _, _, defect, _ in held_out])
    for defect in s.defects:  # against all normals
        own = (labels == defect) | (labels == "good")
        single = {name: told[name] for name in ("task", "selection", "n_generated", "left_out")}
        single |= {"n_real": int(own.sum()), "n_instances": len(regions.instances(truth[own]))}
        rows += [
            row | {"metric": row["metric"] + regions.BY_DEFECT, "defect": defect}
            for row in _region_scores(maps[own], truth[own], single)
        ]
    if looked:
        scores = _region_scores(maps_of(looked.best), truth, _by_oracle(protocol, looked))
        rows += [row | {"metric": row["metric"] + regions.ORACLE} for row in scores]
    return rows


def _watched(s: Study, score: Callable[[nn.Module], float]) -> models.Checkpoints | None:
    """Checkpoints that are scored on the test set along a training that ``last`` ends; None under another rule."""
    asked = s.settings.downstream
    return models.Checkpoints(asked.checkpoints, score) if asked.selection == "last" else None


def _by_oracle(protocol: dict[str, Any], looked: models.Checkpoints) -> dict[str, Any]:
    """The protocol of what was scored under ``last``, for the checkpoint that ``test_oracle`` takes."""
    rule = f"test_oracle: {models.SELECTIONS['test_oracle']}"
    return protocol | {"selection": rule, "scores_by_step": looked.scores}


def _region_scores(maps: np.ndarray, truth: np.ndarray, protocol: dict) -> list[dict]:
    """Per pixel, per image and per instance; maps (N, H, W) in [0, 1], truth bool."""
    scores = (
        regions.pixel_metrics(maps, truth)
        | regions.image_metrics(regions.image_scores(maps), truth.any(axis=(1, 2)))
        | regions.instance_metrics(maps, truth)
    )
    if undefined := regions.why_undefined(truth):
        protocol = protocol | {"why_withheld": undefined}
    return [{"metric": name, "value": value, "protocol": protocol} for name, value in scores.items()]


@runs.alone
def checkpoints(s: Study, method: str, seed: int) -> dict[str, Any]:
    """What each rule of selection would have taken: ONE localiser, scored at every checkpoint; the stage's record.

    A tenth of the items of each defect is held back, as ``val_generated`` has it, whatever the profile's rule, so that
    one training serves all three. Scores stand under ``BY_STEP``, their protocol says of which step and on what.
    """
    source, asked = _source(s, method, seed), s.settings.downstream
    values = {
        "localiser": models.asked(asked.localiser), "n_samples": asked.n_samples, "checkpoints": asked.checkpoints,
        "defects": s.defects, "seed": seed,
    }  # fmt: skip
    folder, key = s.folder(method, seed), runs.stage_key(values, [source])
    if (record := folder.complete("checkpoints", key)) is not None:
        return record
    with runs.stage(folder, "checkpoints", key, s.identity(method, seed), values, {"source": source}) as metrics:
        items = s.shots(seed) if method == SHOTS_ONLY else sampling.load(folder.path, limit=s.n_used(method))
        held_out = s.held_out(seed)
        if reason := why_withheld(s, items, held_out, "val_generated"):
            metrics.append({"metric": BY_STEP, "value": None, "protocol": {"why_withheld": reason}})
        else:
            metrics.extend(_by_step(s, _usable(items), held_out, seed))
    return folder.record("checkpoints")


def _by_step(s: Study, items: Sequence[Item], held_out: list, seed: int) -> list[dict]:
    """Pixel AP of every checkpoint of a localiser, on what is held back and on the test set."""
    asked = s.settings.downstream
    train, judge = _split(items, held_out, "val_generated", seed)
    on_held_back, of_judge, of_test = [], *(predictions(models.predict_maps, items) for items in (judge, held_out))

    def score(model: nn.Module) -> float:
        on_held_back.append(pixel_ap(of_judge(model), judge))
        return pixel_ap(of_test(model), held_out)

    looked = models.Checkpoints(asked.checkpoints, score)
    models.train_localiser(*sampling.stack(train), torch.stack(s.normals(seed)), asked.localiser, seed, looked)
    rows = []
    for (step, tested), known in zip(looked.scores, on_held_back, strict=True):
        for on, value, n in (("held-back items", known, len(judge)), ("test set", tested, len(held_out))):
            protocol = {"task": "localisation", "step": step, "on": on, "n_images": n, "n_train": len(train)}
            rows.append({"metric": BY_STEP, "value": value, "protocol": protocol})
    return rows
