"""fit, sample, quality, downstream: each makes what it lacks, does its work, and writes its stage file last.

A stage that is complete with the same parameters is read, not repeated, so a notebook runs alone, in a batch, or again,
and says the same.
"""

from __future__ import annotations

import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from defectlib import backbone, paths, runs, sampling
from defectlib import downstream as models
from defectlib.images import TURNS
from defectlib.masks.interpolation import NoMask, mask_iou
from defectlib.metrics import bootstrap, features, nearest, neighbours, regions
from defectlib.metrics import quality as quality_metrics
from defectlib.metrics.features import metric_name
from defectlib.params import TrainSettings
from defectlib.runs import RunFolder
from defectlib.study import SHOTS_ONLY, Study
from defectlib.training import Curve, State, once
from defectlib.types import Sample, Shot

SEEN, CLASS_SEEN = "mask_seen", "class_seen"
# Below it the reader misses even most real defects, and what it says of drawn ones means nothing.
SEEN_LEAST = 0.2
# IoU from which a drawn mask counts as a shot's.
COPIED_FROM = 0.95
WITHHELD = (
    *("accuracy", "f1_macro", "image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_f1_50"), *regions.INSTANCES,
)  # fmt: skip


def fit(s: Study, method: str, seed: int) -> dict[str, Any]:
    """Fit a method on the shots, or the method of a variant that changes nothing in it; the record of the stage."""
    method = s.fitted_as(method)
    config, kind = s.config(method), s.method_of(method)
    values = {"method": kind.name, "config": config.fit_values(), "seed": seed}
    if kind.needs_backbone:
        values |= {"prompts": s.prompts(), "backbone": {s.settings.backbone: backbone.digest(s.settings.backbone)}}
    folder, key = s.folder(method, seed), runs.stage_key(values, [s.data_key(seed)])
    if (record := folder.complete("fit", key)) is not None:
        return record
    with runs.stage(folder, "fit", key, s.identity(method, seed), values, {"split": s.data_key(seed)}) as metrics:
        fitted = kind(config, s.backbone(method))
        clock = time.perf_counter()
        fitted.fit(s.shots(seed), s.normals(seed), prompts=s.prompts(), seed=seed, workdir=folder.model)
        fitted.save(folder.model)
        metrics.append({"metric": "fit_s", "value": time.perf_counter() - clock})
    return folder.record("fit")


def sample(s: Study, method: str, seed: int) -> dict[str, Any]:
    """Draw ``n_per_defect`` samples of each defect, with a bar unless in a batch; the record of the stage.

    A variant that filters draws nothing: see :func:`keep`.
    """
    if s.keep(method):
        return keep(s, method, seed)
    upstream = fit(s, method, seed)
    asked = s.settings.sample.model_dump(exclude={"n_of", "mask_source_of"})
    asked |= {"mask_source": s.mask_source_name(method), "n_per_defect": s.n_per_defect(method)}
    values = {
        "sample": asked, "config": s.config(method).model_dump(), "prompts": s.prompts(), "order": s.all_defects,
    }  # fmt: skip
    folder, key = s.folder(method, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("sample", key)) is not None:
        return record
    with runs.stage(folder, "sample", key, s.identity(method, seed), values, {"fit": upstream["key"]}) as metrics:
        fitted, shots = s.load(method, seed), s.shots(seed)
        refused: Counter[str] = Counter()
        source = None if fitted.makes_masks else functools.partial(s.mask_source(method), refused=refused)
        requests = []
        for defect in s.defects:
            try:
                requests += sampling.plan(
                    [shot for shot in shots if shot.defect == defect], s.normals(seed),
                    s.n_per_defect(method), source, seed, s.prompts(), s.all_defects, s.settings.sample.group_size,
                    fitted.one_normal_a_group,
                )  # fmt: skip
            except NoMask as error:  # the other defects are drawn, this one's numbers are withheld
                refused.update(error.counts)
                why = {"n_generated": 0, "why_withheld": str(error)}
                metrics.append({"metric": "mask_area", "value": None, "defect": defect, "protocol": why})
        fresh = not (folder.path / "images").exists()
        clock = time.perf_counter()
        report = sampling.draw(fitted, requests, folder.path, progress="DEFECTLIB_BATCH" not in os.environ)
        seconds = time.perf_counter() - clock
        for defect, rows in report.groupby("defect", sort=False):
            share = {"defect": defect, "protocol": {"n_generated": len(rows)}}
            metrics.append({"metric": "mask_area", "value": float(rows["area"].mean()), **share})
            metrics.append({"metric": "bad_samples", "value": float(len(sampling.problems(rows))), **share})
            real = [shot.mask for shot in shots if shot.defect == defect]
            if source is not None:
                drawn = [request.mask for request in requests if request.defect == defect]
                metrics.append(
                    {"metric": "mask_iou", "value": float(np.mean([mask_iou(m, real) for m in drawn])), **share}
                )
            if "drawing" in rows:
                drawn = [sampling.read_pair(folder.path, own)[1] for own in rows["seed"]]
                metrics.append({"metric": "masks_copied", "value": float(sum(copied(m, real) for m in drawn)), **share})
                flaws = Counter(why for text in rows["redrawn_for"] for why in text.split("; ") if why)
                kept = Counter(why for why in rows["flaw"] if why)
                told = {"n_generated": len(rows), "reasons": dict(flaws), "kept_with": dict(kept)}
                metrics.append(
                    {"metric": "pairs_redrawn", "value": float(flaws.total()), "defect": defect, "protocol": told}
                )
        if source is not None:
            reasons = {"n_generated": len(report), "reasons": dict(refused)}
            metrics.append({"metric": "masks_refused", "value": float(refused.total()), "protocol": reasons})
        # After a restart part of the drawing was done by an earlier process: its speed is not known.
        protocol = {"n_generated": len(report), "image_size": s.size}
        fresh = fresh and len(report) > 0
        speed = {"pairs_per_second": len(report) / seconds, "seconds_per_image": seconds / max(1, len(report))}
        metrics.extend({"metric": m, "value": v if fresh else None, "protocol": protocol} for m, v in speed.items())
    return folder.record("sample")


def keep(s: Study, name: str, seed: int) -> dict[str, Any]:
    """Filter: copy the better samples of a variant's method, at least one a defect; the record of the stage.

    Samples that must not reach training (see :func:`sampling.problems`) are the worst, whatever their score.
    """
    asked, method = s.keep(name), s.settings.variants[name].of
    upstream = sample(s, method, seed)
    values = {"keep": asked.model_dump(), "reader": s.settings.downstream.localiser.model_dump()}
    folder, key = s.folder(name, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("filter", key)) is not None:
        return record
    with runs.stage(folder, "filter", key, s.identity(name, seed), values, {"sample": upstream["key"]}) as metrics:
        source = s.folder(method, seed).path
        report = pd.read_csv(source / "samples.csv", keep_default_na=False).astype({"defect": str})
        bad = set(sampling.problems(report)["seed"])
        chosen: list[int] = []
        for defect in s.defects:
            drawn = sampling.load(source, defect)
            worth = _worth(s, seed, drawn, asked.by) if drawn else np.empty(0)
            flawed = np.array([item.seed in bad for item in drawn], dtype=bool)
            best = np.lexsort([-worth, flawed])[: ceil(asked.share * len(drawn))]
            chosen += [drawn[i].seed for i in best]
            told = {"n_generated": len(drawn), "by": asked.by}
            if drawn:
                told |= {"mean_of_all": float(worth.mean()), "mean_of_kept": float(worth[best].mean())}
            metrics.append({"metric": "samples_kept", "value": float(len(best)), "defect": defect, "protocol": told})
        sampling.copy(source, folder.path, chosen)
    return folder.record("filter")


def _worth(s: Study, seed: int, drawn: list[Sample], by: str) -> np.ndarray:
    """What a filter ranks samples of one defect by, more is better: minus a distance, or an IoU; float64 (N,)."""
    if by == "mask_seen":
        return np.array(seen(s, seed, *sampling.stack(drawn)))
    shots = [shot for shot in s.shots(seed) if shot.defect == drawn[0].defect]
    found = nearest.nearest_shots(drawn, shots, features.load(s.settings.quality.extractor))
    return -found.sort_values("sample")["distance"].to_numpy()


def copied(mask: Tensor, real: Sequence[Tensor]) -> bool:
    """Whether a drawn mask, bool (1, H, W), is a shot's, as it is, mirrored or turned by half: an IoU above 0.95."""
    return any((regions.mask_iou(mask[0], shot.flip(turn)[0]) or 0) > COPIED_FROM for shot in real for turn in TURNS)


def quality(s: Study, method: str, seed: int) -> dict[str, Any]:
    """The measures of ``metrics.quality`` of a run's samples, per defect; the record of the stage.

    Real images are all those of the defect (shots and held-out), as in DefectSynth; IC-LPIPS clusters around the shots.
    ``shot-distance`` says how far samples keep from the shots, see :func:`nearest.shot_distance`, and ``mask_seen``
    whether the masks lie on the defects, see :func:`seen`; ``class_seen`` is the share of a defect's samples that
    :func:`sorter` takes for it.
    """
    upstream = sample(s, method, seed)
    values = {
        "quality": s.settings.quality.model_dump(), "reader": s.settings.downstream.localiser.model_dump(),
        "sorter": s.settings.downstream.classifier.model_dump(),
        # Runs from before intervals and neighbours were measured are measured again.
        "draws": bootstrap.DRAWS, "neighbour": neighbours.K,
    }  # fmt: skip
    folder, key = s.folder(method, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("quality", key)) is not None:
        return record
    with runs.stage(folder, "quality", key, s.identity(method, seed), values, {"sample": upstream["key"]}) as metrics:
        shots, held_out = s.shots(seed), s.held_out(seed)
        for defect in s.defects:
            real = [shot for shot in shots if shot.defect == defect]
            drawn = sampling.load(folder.path, defect)
            if not drawn:
                why = {"n_generated": 0, "why_withheld": "no mask could be drawn for this defect"}
                names = quality_metrics.names(s.settings.quality.extractor, s.settings.quality.perceptual)
                names += [metric_name(s.settings.quality.extractor, "shot-distance"), SEEN, CLASS_SEEN]
                metrics.extend({"metric": m, "value": None, "defect": defect, "protocol": why} for m in names)
                continue
            pictures, masks = sampling.stack(drawn)
            refs = [shot.image for shot in real]
            rows = quality_metrics.evaluate(list(pictures), s.real(defect, seed), refs, **s.quality_arguments())
            rows.append(_shot_distance(s, drawn, real))
            rows.append({"metric": SEEN, **_mask_seen(s, seed, defect, held_out, pictures, masks)})
            rows.append({"metric": CLASS_SEEN, **_class_seen(s, seed, defect, held_out, pictures)})
            metrics.extend({**row, "defect": defect} for row in rows)
    return folder.record("quality")


def _shot_distance(s: Study, drawn: list, real: list) -> dict[str, Any]:
    """The median distance of samples to their nearest shot, in that of the shots; withheld for a single shot."""
    name = s.settings.quality.extractor
    row = {"metric": metric_name(name, "shot-distance"), "value": None}
    told = {"extractor": name, "n_generated": len(drawn), "n_real": len(real), "window": "around the defect"}
    if len(real) < 2:
        return row | {"protocol": told | {"why_withheld": "one shot: it has no distance to another"}}
    apart, between = nearest.shot_distance(drawn, real, features.load(name))
    return row | {"value": apart.median().item(), "protocol": told | {"between_shots": between}}


def reader(s: Study, seed: int) -> tuple[nn.Module, Curve]:
    """The localiser trained on the shots alone, and its losses: the row ``shots_only``; trained once a run and kept."""
    settings = s.settings.downstream.localiser

    def train() -> tuple[nn.Module, list[float]]:
        pictures, masks = sampling.stack(s.shots(seed))
        return models.train_localiser(pictures, masks, torch.stack(s.normals(seed)), settings, seed)

    return _of_shots(s, seed, "reader", settings, train, models.build_localiser)


def sorter(s: Study, seed: int) -> tuple[nn.Module, Curve]:
    """The classifier trained on the shots alone, and its losses: ``shots_only`` again; trained once a run and kept."""
    settings, n = s.settings.downstream.classifier, len(s.defects)

    def train() -> tuple[nn.Module, list[float]]:
        shots = s.shots(seed)
        labels = torch.tensor([s.defects.index(shot.defect) for shot in shots])
        return models.train_classifier(torch.stack([shot.image for shot in shots]), labels, n, settings, seed)

    return _of_shots(s, seed, "sorter", settings, train, lambda blank: models.build_classifier(blank, n))


def _of_shots(
    s: Study,
    seed: int,
    name: str,
    settings: TrainSettings,
    train: Callable[[], tuple[nn.Module, list[float]]],
    build: Callable[[TrainSettings], nn.Module],
) -> tuple[nn.Module, Curve]:
    """A downstream model of the shots and its losses, from its file where it is there."""

    def learned() -> tuple[State, Curve]:
        model, losses = train()
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        return state, list(enumerate(losses, 1))

    file = s.folder(SHOTS_ONLY, seed).path / f"{name}.safetensors"
    state, curve = once(file, [settings.model_dump(), s.data_key(seed), seed], learned)
    model = build(settings.model_copy(update={"pretrained": False}))
    model.load_state_dict(state)
    return model.to(models.device()).eval(), curve


def seen(s: Study, seed: int, images: Tensor, masks: Tensor) -> list[float]:
    """How far masks lie on what is seen there: their IoU with what :func:`reader` finds above 0.5, an image each.

    The reader knows real defects alone. Where it finds nothing and the mask is empty they agree: 1.

    Args:
        s: Of the category.
        seed: Of the run.
        images: float32 (N, 3, H, W) in [-1, 1].
        masks: bool (N, 1, H, W).
    """
    found = models.predict_maps(reader(s, seed)[0], images) > 0.5
    values = [regions.mask_iou(a, b) for a, b in zip(found, masks[:, 0], strict=True)]
    return [1.0 if value is None else value for value in values]


def _mask_seen(s: Study, seed: int, defect: str, held_out: list, images: Tensor, masks: Tensor) -> dict[str, Any]:
    """Value and protocol of ``mask_seen``; withheld where the reader does not see real, held-out defects either."""
    real = [(image, mask) for image, mask, name, _ in held_out if name == defect]
    known = float(np.mean(seen(s, seed, *map(torch.stack, zip(*real))))) if real else None
    told = {
        "n_generated": len(images), "n_real": len(real), "reader": "the localiser of the shots, above 0.5",
        "on_real": known,
    }  # fmt: skip
    if known is not None and known < SEEN_LEAST:
        why = f"on real, held-out defects what the localiser finds overlaps the mask with an IoU of {known:.2f} only"
        return {"value": None, "protocol": told | {"why_withheld": why}}
    return {"value": float(np.mean(seen(s, seed, images, masks))), "protocol": told}


def _class_seen(s: Study, seed: int, defect: str, held_out: list, images: Tensor) -> dict[str, Any]:
    """Value and protocol of ``class_seen``; withheld where the sorter does not know real, held-out defects either.

    ``on_others`` is the share of other real defects that it takes for this one: where high, the value says little.
    """
    if len(s.defects) < 2:
        return {"value": None, "protocol": {"why_withheld": "one defect type: there is nothing to tell apart"}}
    model, label = sorter(s, seed)[0], s.defects.index(defect)
    real = [image for image, _, name, _ in held_out if name == defect]
    others = [image for image, _, name, _ in held_out if name not in (defect, "good")]
    known, wrong = (
        _taken_for(model, torch.stack(some)).eq(label).float().mean().item() if some else None
        for some in (real, others)
    )
    taken = _taken_for(model, images)
    told = {
        "n_generated": len(images), "n_real": len(real), "sorter": "the classifier of the shots", "on_real": known,
        "on_others": wrong,
        "seen_as": {name: int(taken.eq(i).sum()) for i, name in enumerate(s.defects)},
    }  # fmt: skip
    if known is not None and known <= 1 / len(s.defects):
        why = f"the classifier knows {known:.0%} of the real, held-out ones, which is no better than chance"
        return {"value": None, "protocol": told | {"why_withheld": why}}
    return {"value": taken.eq(label).float().mean().item(), "protocol": told}


def _taken_for(model: nn.Module, images: Tensor) -> Tensor:
    return models.predict_classes(model, images).argmax(1)


def downstream(s: Study, method: str, seed: int) -> dict[str, Any]:
    """Train the classifier and the localiser on a run's samples, test on held-out real images; the stage's record.

    The row ``shots_only`` (the papers' "w/o augmentation") trains both on the shots, for as many steps. A split that
    holds no defect out (``all_shots`` on a small set) has nothing to test on: its scores are withheld, with the reason.
    """
    settings = s.settings.downstream
    source = [s.data_key(seed)] if method == SHOTS_ONLY else [sample(s, method, seed)["key"]]
    values = {
        "downstream": settings.model_dump(), "defects": s.defects, "seed": seed,
        # Runs from before PRO, and scores by defect, were measured are measured again.
        "pro_limit": regions.PRO_LIMIT, "by_defect": True,
    }  # fmt: skip
    folder, key = s.folder(method, seed), runs.stage_key(values, source)
    if (record := folder.complete("downstream", key)) is not None:
        return record
    with runs.stage(folder, "downstream", key, s.identity(method, seed), values, {"source": source[0]}) as metrics:
        shots, held_out = s.shots(seed), s.held_out(seed)
        drawn = [] if method == SHOTS_ONLY else sampling.load(folder.path)
        reason = None
        if all(defect == "good" for *_, defect, _ in held_out):
            reason = f"the split '{s.settings.data.split}' holds no defect image of {s.category} out"
        elif method != SHOTS_ONLY and {item.defect for item in drawn} != set(s.defects):
            reason = "no mask could be drawn for some defects"
        elif method != SHOTS_ONLY and not any(sampling.teaches(item) for item in drawn):
            reason = "no drawn mask can be learned from: each is empty, full, or of a size that no real one has"
        if reason:
            metrics.extend({"metric": m, "value": None, "protocol": {"why_withheld": reason}} for m in WITHHELD)
        else:
            metrics.extend(_classification(s, folder, shots, drawn, held_out, seed))
            metrics.extend(_localisation(s, folder, drawn or shots, held_out, seed))
    return folder.record("downstream")


def confusion(s: Study, method: str) -> np.ndarray | None:
    """The confusion matrix of a method summed over seeds (rows true, columns predicted); None with one defect type."""
    rows = [row for seed in s.seeds for row in downstream(s, method, seed)["metrics"] if row["metric"] == "accuracy"]
    counts = [row["protocol"]["confusion"] for row in rows if row["value"] is not None]
    return np.sum(counts, axis=0) if counts else None


def _classification(s: Study, folder: RunFolder, shots: list, drawn: list, held_out: list, seed: int) -> list[dict]:
    """Defect classification: base set merged with the samples (DefectSynth, Section V-A.2)."""
    settings = s.settings.downstream.classifier
    train = [*shots, *drawn]
    test = [item for item in held_out if item[2] != "good"]
    protocol = {
        "task": "classification", **settings.model_dump(), "selection": models.SELECTION, "n_real": len(test),
        "n_train_real": len(shots), "n_generated": len(drawn), "classes": list(s.defects), "image_size": s.size,
    }  # fmt: skip
    if len(s.defects) < 2:
        reason = {"why_withheld": "one defect type: there is nothing to tell apart"}
        return [{"metric": m, "value": None, "protocol": protocol | reason} for m in ("accuracy", "f1_macro")]
    labels = torch.tensor([s.defects.index(item.defect) for item in train])
    if drawn:
        pictures = torch.stack([item.image for item in train])
        model, curve = models.train_classifier(pictures, labels, len(s.defects), settings, seed)
    else:
        model, points = sorter(s, seed)
        curve = [loss for _, loss in points]
    probability = models.predict_classes(model, torch.stack([image for image, *_ in test]))
    table = pd.DataFrame(probability.numpy(), columns=[f"p_{d}" for d in s.defects])
    table.insert(0, "id", [name for *_, name in test])
    table.insert(1, "true", [defect for *_, defect, _ in test])
    table.insert(2, "predicted", [s.defects[i] for i in probability.argmax(1).tolist()])
    paths.write_text(folder.path / "predictions" / "classification.csv", table.to_csv(index=False))
    scores = regions.classification_metrics(table["true"].tolist(), table["predicted"].tolist(), list(s.defects))
    protocol |= {"final_loss": curve[-1], "confusion": scores["confusion"]}
    rows = [{"metric": m, "value": scores[m], "protocol": protocol} for m in ("accuracy", "f1_macro")]
    for defect, own in regions.by_defect(scores["confusion"], list(s.defects)).items():
        told = {"task": "classification", "n_real": sum(name == defect for *_, name, _ in test)}
        rows += [
            {"metric": m + regions.BY_DEFECT, "value": v, "defect": defect, "protocol": told} for m, v in own.items()
        ]
    return rows


def _localisation(s: Study, folder: RunFolder, train: list, held_out: list, seed: int) -> list[dict]:
    """Defect localisation, scored per pixel and per image (DefectSynth, Section V-A.2)."""
    settings = s.settings.downstream.localiser
    real, offered = isinstance(train[0], Shot), len(train)
    # A drawn pair whose mask is empty, full or of no real one's size would teach a defect that is none.
    train = [item for item in train if real or sampling.teaches(item)]
    if real:
        model, points = reader(s, seed)
        curve = [loss for _, loss in points]
    else:
        pictures, masks = sampling.stack(train)
        model, curve = models.train_localiser(pictures, masks, torch.stack(s.normals(seed)), settings, seed)
    maps = models.predict_maps(model, torch.stack([image for image, *_ in held_out])).numpy()
    truth = torch.cat([mask for _, mask, *_ in held_out]).numpy()
    target = folder.path / "predictions" / "localisation.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    names = np.array([f"{defect}/{name}" for _, _, defect, name in held_out])
    with open(target.with_suffix(".part"), "wb") as file:
        np.savez_compressed(file, maps=maps.astype(np.float16), names=names)
    target.with_suffix(".part").replace(target)
    protocol = {
        "task": "localisation", **settings.model_dump(), "selection": models.SELECTION, "n_real": len(held_out),
        "n_train_real": len(train) if real else 0, "n_generated": 0 if real else len(train),
        "left_out": offered - len(train), "image_size": s.size, "final_loss": curve[-1],
        "pro_limit": regions.PRO_LIMIT, "n_instances": len(regions.instances(truth)),
    }  # fmt: skip
    rows = _region_scores(maps, truth, protocol)
    labels = np.array([defect for _, _, defect, _ in held_out])
    for defect in s.defects:  # against all normals
        own = (labels == defect) | (labels == "good")
        told = {"task": "localisation", "n_real": int(own.sum()), "n_instances": len(regions.instances(truth[own]))}
        rows += [
            row | {"metric": row["metric"] + regions.BY_DEFECT, "defect": defect}
            for row in _region_scores(maps[own], truth[own], told)
        ]
    return rows


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
