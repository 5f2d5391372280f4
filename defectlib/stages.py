"""fit, sample, quality: each makes what it lacks, does its work, and writes its stage file last.

What the samples are good for is asked in :mod:`evaluation`, by stages of the same kind. A stage that is complete with
the same parameters is read, not repeated, so a notebook runs alone, in a batch, or again, and says the same.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from torch import Tensor

from defectlib import adaptation, backbone, downstream, judges, runs, sampling
from defectlib.images import TURNS
from defectlib.masks.interpolation import NoMask, mask_iou
from defectlib.metrics import bootstrap, features, nearest, neighbours, regions
from defectlib.metrics import quality as quality_metrics
from defectlib.metrics.features import metric_name
from defectlib.metrics.perceptual import PROTOCOLS
from defectlib.study import Study
from defectlib.types import Sample, Shot

# IoU from which a drawn mask counts as a shot's.
COPIED_FROM = 0.95
# Share of its requests that a defect needs masks for; below it, its numbers are withheld.
LEAST = 0.5
GAVE_UP = "no mask in all draws: request left out"


@runs.alone
def fit(s: Study, method: str, seed: int) -> dict[str, Any]:
    """Fit a method on the shots, or the method of a variant that changes nothing in it; the record of the stage.

    Where one fit serves all categories, it lies in the first one's folder, and the others' records name it.
    """
    if (fitted_as := s.fitted_as(method)) != method:
        return fit(s, fitted_as, seed)
    covered = s.fitted_with(method)
    if s.category != covered[0].category:
        return _fitted_elsewhere(s, covered[0], method, seed)
    s = covered[0]
    config, kind = s.config(method), s.method_of(method)
    values = {"method": kind.name, "config": config.fit_values(), "seed": seed}
    if asked := s.adapts(method):
        values["adapt"] = adaptation.recipe(asked)
    if rule := s.shot_rule(method):
        values["shots"] = rule.model_dump(exclude_defaults=True)
    if kind.needs_backbone:
        values |= {"prompts": s.prompts(), "backbone": {s.settings.backbone: backbone.digest(s.settings.backbone)}}
    folder, key = s.folder(method, seed), runs.stage_key(values, [one.data_key(seed) for one in covered])
    if (record := folder.complete("fit", key)) is not None:
        return record
    with runs.stage(folder, "fit", key, s.identity(method, seed), values, {"split": s.data_key(seed)}) as metrics:
        fitted = kind(config, s.backbone(method, seed))
        clock, passed = runs.stopwatch()
        shots, normals = (
            [item for one in covered for item in read(one)]
            for read in (lambda one: one.learned(method, seed), lambda one: one.normals(seed))
        )
        shots, later = s.in_turn(method, shots)
        if later:
            fitted.readable(later, normals)  # before the others are learned from
        fitted.fit(shots, normals, prompts=s.prompts(), seed=seed, workdir=folder.model)
        if later:
            fitted.learn(later, seed=seed, workdir=folder.model)
        fitted.save(folder.model)
        metrics.append({"metric": "fit_s", "value": passed(), "protocol": {"clock": clock}})
        for defect, n in getattr(fitted, "left_out", {}).items():  # of methods that cannot learn from every shot
            metrics.append({"metric": "shots_left_out", "value": float(n), "defect": defect})
    return folder.record("fit")


def _fitted_elsewhere(s: Study, first: Study, method: str, seed: int) -> dict[str, Any]:
    """The record of a fit that another category's run holds; made there where it is not yet."""
    upstream = fit(first, method, seed)
    values = {"method": s.method_of(method).name, "fitted_with": first.category, "seed": seed}
    folder, key = s.folder(method, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("fit", key)) is not None:
        return record
    with runs.stage(folder, "fit", key, s.identity(method, seed), values, {"fit": upstream["key"]}):
        pass
    return folder.record("fit")


@runs.alone
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
        fitted, shots, learned = s.load(method, seed), s.shots(seed), s.learned(method, seed)
        refused: Counter[str] = Counter()
        source = None if fitted.makes_masks else functools.partial(s.mask_source(method), refused=refused)
        requests = []
        for defect in s.defects:
            without: list[NoMask] = []
            planned = sampling.plan(
                [shot for shot in learned if shot.defect == defect], s.normals(seed),
                s.n_per_defect(method), source, seed, s.prompts(), s.all_defects, s.settings.sample.group_size,
                fitted.one_normal_a_group, without,
            )  # fmt: skip
            for error in without:
                refused.update(error.counts + Counter({GAVE_UP: 1}))
            if len(planned) >= LEAST * s.n_per_defect(method):
                requests += planned
            else:  # the other defects are drawn, this one's numbers are withheld
                told = f"{len(planned)} of {s.n_per_defect(method)} requests got a mask: {without[0]}"
                why = {"n_generated": 0, "why_withheld": told}
                metrics.append({"metric": "mask_area", "value": None, "defect": defect, "protocol": why})
        fresh = not (folder.path / "images").exists()
        clock, passed = runs.stopwatch()
        report = sampling.draw(fitted, requests, folder.path, progress="DEFECTLIB_BATCH" not in os.environ)
        seconds = passed()
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
                known = [shot.mask for shot in learned if shot.defect == defect]
                n_copied = float(sum(copied(m, known) for m in drawn))
                metrics.append({"metric": "masks_copied", "value": n_copied, **share})
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
        protocol = {"n_generated": len(report), "image_size": s.size, "clock": clock}
        protocol |= fitted.config.model_dump(include={"num_inference_steps"})
        if not (fresh := fresh and len(report) > 0):
            protocol["why_withheld"] = "drawn in more than one go" if len(report) else "nothing was drawn"
        speed = {"pairs_per_second": len(report) / seconds, "seconds_per_image": seconds / max(1, len(report))}
        metrics.extend({"metric": m, "value": v if fresh else None, "protocol": protocol} for m, v in speed.items())
    return folder.record("sample")


def keep(s: Study, name: str, seed: int) -> dict[str, Any]:
    """Filter: the sample stage of a variant that keeps the better samples of its method, at least one a defect.

    Samples that must not reach training (see :func:`sampling.problems`) are the worst, whatever their score.
    """
    asked, method = s.keep(name), s.settings.variants[name].of
    upstream, settings = sample(s, method, seed), s.settings
    uses = settings.quality.extractor if asked.by == "nearest_shot" else downstream.asked(settings.downstream.localiser)
    values = {"keep": asked.model_dump(), "uses": uses, "prompts": s.prompts(), "order": s.all_defects}
    folder, key = s.folder(name, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("sample", key)) is not None:
        return record
    with runs.stage(folder, "sample", key, s.identity(name, seed), values, {"sample": upstream["key"]}) as metrics:
        source = s.folder(method, seed).path
        report = sampling.read_report(source)
        bad = set(sampling.problems(report)["seed"])
        chosen: list[int] = []
        for defect in s.defects:
            if not (drawn := sampling.load(source, defect)):
                continue
            shots = [shot for shot in s.shots(seed) if shot.defect == defect]
            worth = _worth(s, seed, drawn, asked.by)
            flawed = np.array([item.seed in bad for item in drawn], dtype=bool)
            best = np.lexsort([-worth, flawed])[: ceil(asked.share * len(drawn))]
            kept = {drawn[i].seed for i in best}
            chosen += kept
            told = {
                "n_generated": len(drawn), "by": asked.by, "mean_of_all": float(worth.mean()),
                "mean_of_kept": float(worth[best].mean()),
            }  # fmt: skip
            if asked.by == "mask_seen":  # a localiser that does not even see what it learned from ranks by chance
                told["mean_of_shots"] = float(_worth(s, seed, shots, asked.by).mean())
            area = float(report.loc[report["seed"].isin(kept), "area"].mean())
            share = {"defect": defect, "protocol": {"n_generated": len(kept)}}
            metrics.append({"metric": "mask_area", "value": area, **share})
            metrics.append({"metric": "samples_kept", "value": float(len(kept)), "defect": defect, "protocol": told})
        sampling.copy(source, folder.path, chosen)
    return folder.record("sample")


def _worth(s: Study, seed: int, drawn: Sequence[Sample | Shot], by: str) -> np.ndarray:
    """What a filter ranks pairs of one defect by, more is better: minus a distance, or an IoU; float64 (N,)."""
    if by == "mask_seen":
        return np.array(judges.seen(s, seed, *sampling.stack(drawn)))
    shots = [shot for shot in s.shots(seed) if shot.defect == drawn[0].defect]
    found = nearest.nearest_shots(drawn, shots, features.load(s.settings.quality.extractor))
    return -found.sort_values("sample")["distance"].to_numpy()


def copied(mask: Tensor, real: Sequence[Tensor]) -> bool:
    """Whether a drawn mask, bool (1, H, W), is a shot's, as it is, mirrored or turned by half: an IoU above 0.95."""
    return any((regions.mask_iou(mask[0], shot.flip(turn)[0]) or 0) > COPIED_FROM for shot in real for turn in TURNS)


@runs.alone
def quality(s: Study, method: str, seed: int) -> dict[str, Any]:
    """The measures of ``metrics.quality`` of a run's samples, per defect; the record of the stage.

    Real images are all those of the defect (shots and held-out), as in DefectSynth; IC-LPIPS clusters around those that
    its protocol names.
    ``shot-distance`` says how far samples keep from the shots, see :func:`nearest.shot_distance`, and ``mask_seen``
    whether the masks lie on the defects, see :func:`judges.seen`; ``class_seen``, where the profile asks for
    it, is the share of a defect's samples that :func:`judges.sorter` takes for it.
    """
    upstream = sample(s, method, seed)
    values = {
        "quality": s.settings.quality.model_dump(exclude={"class_seen"}),
        "reader": downstream.asked(s.settings.downstream.localiser),
        # Runs from before intervals and neighbours were measured, when empty masks were seen, or when IC-LPIPS took all
        # shots for the first third, are measured again.
        "draws": bootstrap.DRAWS, "neighbour": neighbours.K, "empty_masks_seen": 0, "judges": "with intervals",
        "references": PROTOCOLS[s.settings.quality.ic_lpips].references,
    }  # fmt: skip
    asks_class = s.settings.quality.class_seen
    if asks_class:
        values["sorter"] = downstream.asked(s.settings.downstream.classifier)
    folder, key = s.folder(method, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("quality", key)) is not None:
        return record
    with runs.stage(folder, "quality", key, s.identity(method, seed), values, {"sample": upstream["key"]}) as metrics:
        learned, held_out = s.learned(method, seed), s.held_out(seed)
        for defect in s.defects:
            drawn = sampling.load(folder.path, defect)
            if not drawn:
                why = {"n_generated": 0, "why_withheld": "too few masks could be drawn for this defect"}
                names = quality_metrics.names(s.settings.quality.extractor, s.settings.quality.perceptual)
                names += [metric_name(s.settings.quality.extractor, "shot-distance")]
                names += [judges.MASK_SEEN, *[judges.CLASS_SEEN] * asks_class]
                metrics.extend({"metric": m, "value": None, "defect": defect, "protocol": why} for m in names)
                continue
            pictures, masks = sampling.stack(drawn)
            refs = s.references(defect, seed)
            rows = quality_metrics.evaluate(list(pictures), s.real(defect, seed), refs, **s.quality_arguments())
            rows.append(_shot_distance(s, drawn, [shot for shot in learned if shot.defect == defect]))
            rows.append({"metric": judges.MASK_SEEN, **judges.mask_seen(s, seed, defect, held_out, pictures, masks)})
            if asks_class:
                rows.append({"metric": judges.CLASS_SEEN, **judges.class_seen(s, seed, defect, held_out, pictures)})
            metrics.extend({**row, "defect": defect} for row in rows)
    return folder.record("quality")


def _shot_distance(s: Study, drawn: list, real: list) -> dict[str, Any]:
    """The median distance of samples to their nearest shot, in that of the shots; withheld for a single shot."""
    name = s.settings.quality.extractor
    row = {"metric": metric_name(name, "shot-distance"), "value": None}
    told = {"extractor": name, "n_generated": len(drawn), "n_real": len(real), "window": "around the defect"}
    if len(real) < 2:
        return row | {"protocol": told | {"why_withheld": "one shot: it has no distance to another"}}
    try:
        apart, between = nearest.shot_distance(drawn, real, features.load(name))
    except ValueError as error:  # shots that look the same
        return row | {"protocol": told | {"why_withheld": str(error)}}
    value, n = float(np.median(apart.numpy())), len(apart)
    drawn_anew = bootstrap.median(apart, bootstrap.counts(n, 0))
    told |= {"between_shots": between} | bootstrap.told(n, lambda: bootstrap.interval(value, drawn_anew))
    return row | {"value": value, "protocol": told}
