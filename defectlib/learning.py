"""learning_curve: what one sample more, or one shot more, is worth on held-out real images.

Pixel AP and accuracy are measured over the number of samples of each defect, with 0 for the shots alone, and over the
number of shots for ``shots_only`` and for methods without a base model that draw their masks, as Crop-Paste, which are
fitted anew. Subsets are nested: the first ``n`` of each defect in the order of their seeds, or of the split. All points
of a run are trained for as many optimiser steps as its downstream models, whose scores are the last points: otherwise a
curve would show the length of the training.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from defectlib import downstream as models
from defectlib import evaluation, paths, runs, sampling
from defectlib.profiles import TrainSettings
from defectlib.study import SHOTS_ONLY, Study, first
from defectlib.types import Sample, Shot

METRICS = {"localisation": "pixel_ap", "classification": "accuracy"}


def seeds(s: Study) -> tuple[int, ...]:
    """The study's seeds of which the profile asks for curves."""
    asked = s.settings.downstream.curve.seeds
    return s.seeds if asked is None else tuple(seed for seed in s.seeds if seed in asked)


@runs.alone
def curve(s: Study, method: str, seed: int) -> dict[str, Any]:
    """A run's points, the record of the stage ``learning_curve``; each is kept when it is made, as a sample is.

    Rows are named ``<metric>_by_samples`` and ``<metric>_by_shots``; ``n`` in their protocol counts a defect's items.
    """
    whole, asked = evaluation.downstream(s, method, seed), s.settings.downstream.curve
    values = {"curve": asked.model_dump(exclude={"seeds"})}
    folder, key = s.folder(method, seed), runs.stage_key(values, [whole["key"]])
    if (record := folder.complete("learning_curve", key)) is not None:
        return record
    source = {"downstream": whole["key"]}
    with runs.stage(folder, "learning_curve", key, s.identity(method, seed), values, source) as metrics:
        for task in asked.tasks:
            own = _score(whole, task)
            for axis, counts, most in _points(s, method, seed):
                if own["value"] is not None:
                    metrics.extend(_point(s, method, seed, task, axis, n, _steps(s, own)) for n in counts)
                metrics.append(_row(task, axis, most, own["value"], own["protocol"]))
    return folder.record("learning_curve")


def _score(record: dict[str, Any], task: str) -> dict[str, Any]:
    return next(row for row in record["metrics"] if row["metric"] == METRICS[task])


def _row(task: str, axis: str, n: int, value: float | None, protocol: dict[str, Any]) -> dict[str, Any]:
    kept = ("selection", "optimiser_steps", "n_train_real", "n_generated", "left_out", "n_real", "why_withheld")
    told = {"task": task, "n": n} | {name: protocol[name] for name in kept if name in protocol}
    return {"metric": f"{METRICS[task]}_by_{axis}", "value": value, "protocol": told}


def _steps(s: Study, score: dict[str, Any]) -> int:
    """Optimiser steps behind a score of the downstream stage."""
    told = score["protocol"]
    return models.n_steps(_settings(s, told["task"]), told["n_train_real"] + told["n_generated"])


def _settings(s: Study, task: str) -> TrainSettings:
    return s.settings.downstream.localiser if task == "localisation" else s.settings.downstream.classifier


def _points(s: Study, method: str, seed: int) -> list[tuple[str, list[int], int]]:
    """The axes of a run's curve: its name, the points to train, and the number at which the downstream stage stands."""
    asked, axes = s.settings.downstream.curve, []
    if method != SHOTS_ONLY:
        drawn, used = s.n_per_defect(method), s.n_used(method)
        axes.append(("samples", [0, *sorted({n for n in asked.samples if n <= drawn} - {used})], used))
    if method == SHOTS_ONLY or (s.method_of(method).makes_masks and not s.method_of(method).needs_backbone):
        most = max(Counter(shot.defect for shot in s.learned(method, seed)).values())
        axes.append(("shots", sorted({n for n in asked.shots if n < most}), most))
    return axes


def _point(s: Study, method: str, seed: int, task: str, axis: str, n: int, steps: int) -> dict[str, Any]:
    """One point of a curve: as kept, as the downstream stage of the shots has it, or trained now."""
    if (axis, n) == ("samples", 0) and s.shot_rule(method) is None:
        alone = _score(evaluation.downstream(s, SHOTS_ONLY, seed), task)
        if alone["value"] is None or _steps(s, alone) == steps:
            return _row(task, axis, n, alone["value"], alone["protocol"])
    file = s.folder(method, seed).path / "curve" / f"{task}_{axis}_{n}.json"
    if not file.is_file():
        paths.write_text(file, json.dumps(_trained_point(s, method, seed, task, axis, n, steps), indent=1))
    return json.loads(file.read_text())


def _trained_point(s: Study, method: str, seed: int, task: str, axis: str, n: int, steps: int) -> dict[str, Any]:
    """Train for a point and test it; without a value, and with the reason, where its items cannot be learned from."""
    shots, held_out, drawn = s.learned(method, seed), s.held_out(seed), []
    if axis == "shots":
        shots = first(shots, dict.fromkeys(s.defects, n))
        drawn = [] if method == SHOTS_ONLY else _drawn_from(s, method, shots, seed)
    elif n:
        drawn = sampling.load(s.folder(method, seed).path, limit=n)
    if reason := evaluation.why_withheld(s, drawn or shots, held_out, s.settings.downstream.selection):
        return _row(task, axis, n, None, {"why_withheld": reason})
    settings = _settings(s, task).model_copy(update={"epochs": None, "steps": steps})
    if task == "localisation":
        maps_of = evaluation.predictions(models.predict_maps, held_out)
        model, told = evaluation.train_localiser(s, drawn or shots, held_out, settings, seed)
        return _row(task, axis, n, evaluation.pixel_ap(maps_of(model), held_out), told | {"n_real": len(held_out)})
    test = [item for item in held_out if item[2] != "good"]
    told_of = evaluation.predictions(models.predict_classes, test)
    model, told = evaluation.train_classifier(s, shots, drawn, test, settings, seed)
    return _row(task, axis, n, evaluation.accuracy(s, told_of(model), test), told | {"n_real": len(test)})


def _drawn_from(s: Study, method: str, shots: Sequence[Shot], seed: int) -> list[Sample]:
    """Samples of a method fitted on fewer shots; as in a run they pass through files, which are then removed."""
    fitted, normals, prompts = s.method_of(method)(s.config(method)), s.normals(seed), s.prompts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fitted.fit(shots, normals, prompts=prompts, seed=seed, workdir=folder)
        requests = sampling.plan(
            shots, normals, s.n_per_defect(method), None, seed, prompts, s.all_defects, s.settings.sample.group_size,
            fitted.one_normal_a_group,
        )  # fmt: skip
        sampling.draw(fitted, requests, folder)
        return sampling.load(folder, limit=s.n_used(method))
