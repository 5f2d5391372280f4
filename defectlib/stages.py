"""fit, sample, quality, downstream: each makes what it lacks, does its work, and writes its stage file last.

A :class:`Study` binds the parameters of a notebook to the data of one category. A stage that is complete with the same
parameters is read, not repeated, so a notebook runs alone, in a batch, or again, and says the same.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor

from defectlib import backbone, diffusion, params, paths, prepare, runs, sampling
from defectlib import downstream as models
from defectlib.backbone import Backbone
from defectlib.data import splits
from defectlib.masks import latent, sources
from defectlib.masks.interpolation import mask_iou
from defectlib.masks.sources import MaskSource
from defectlib.methods import base
from defectlib.methods.base import Method, MethodConfig
from defectlib.metrics import files, regions
from defectlib.metrics import quality as quality_metrics
from defectlib.params import Parameters, Profile
from defectlib.runs import RunFolder
from defectlib.types import Shot

SHOTS_ONLY = "shots_only"
WITHHELD = ("accuracy", "f1_macro", "image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "pixel_f1_50")


@dataclass(frozen=True)
class Study:
    """One category of a data set under the parameters of a notebook."""

    parameters: Parameters
    settings: Profile
    root: Path
    category: str
    all_defects: tuple[str, ...]
    defects: tuple[str, ...]
    methods: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: tuple[int, ...]

    def manifest(self, seed: int = 0) -> pd.DataFrame:
        """The rows of this category in the split that the run of ``seed`` uses."""
        return _category_rows(self.parameters.model_dump_json(), self.category, seed)

    def shots(self, seed: int = 0) -> list[Shot]:
        """The few-shot training set."""
        return splits.shots(self.manifest(seed), self.root, self.category, self.defects, self.size)

    def normals(self, seed: int = 0) -> list[Tensor]:
        """Defect-free images to draw on and to train with."""
        limit = self.settings.data.max_normals
        return splits.normals(self.manifest(seed), self.root, self.category, "train", self.size, limit)

    def held_out(self, seed: int = 0) -> list[tuple[Tensor, Tensor, str, str]]:
        """Test images: every held-out defect of the asked types, and up to ``max_test_normals`` normals."""
        found = splits.held_out(self.manifest(seed), self.root, self.category, self.defects, self.size)
        good = [item for item in found if item[2] == "good"]
        return [item for item in found if item[2] != "good"] + good[: self.settings.data.max_test_normals]

    def real(self, defect: str, seed: int = 0) -> list[Tensor]:
        """All real images of a defect, shots first: the reference set of the quality measures, as in DefectSynth."""
        few = [shot.image for shot in self.shots(seed) if shot.defect == defect]
        return few + [image for image, _, name, _ in self.held_out(seed) if name == defect]

    def quality_arguments(self) -> dict[str, Any]:
        """The profile's extractors and protocol, as :func:`metrics.quality.evaluate` takes them."""
        q = self.settings.quality
        return {
            "extractor": q.extractor, "perceptual": q.perceptual, "protocol": q.ic_lpips, "seeds": q.seeds,
            "subset_cap": q.kid_subset_cap, "subsets": q.kid_subsets,
        }  # fmt: skip

    @property
    def size(self) -> int:
        """Side of the square images, in px."""
        return self.settings.data.image_size

    def folder(self, method: str, seed: int) -> RunFolder:
        """Where the run of a method and a seed lives."""
        return RunFolder(self.parameters.dataset_folder() / self.category / method / f"s{seed}")

    def method_of(self, name: str) -> type[Method]:
        """The class of a method or of a variant."""
        variant = self.settings.variants.get(name)
        return base.get(variant.of if variant else name)

    def config(self, name: str) -> MethodConfig:
        """The profile's configuration of a method or of a variant."""
        return _config(self.settings, name)

    def fitted_as(self, name: str) -> str:
        """The method whose fit a method or a variant draws with."""
        variant = self.settings.variants.get(name)
        return (
            variant.of if variant and self.config(name).fit_values() == self.config(variant.of).fit_values() else name
        )

    def load(self, name: str, seed: int) -> Method:
        """The fitted method of a run, or a variant of it, ready to draw; :func:`fit` must have been called.

        Raises:
            ValueError: A file of the fit is cut off or missing.
        """
        folder, base_model = self.folder(self.fitted_as(name), seed), self.backbone(name)
        try:
            fitted = self.method_of(name).load(folder.model, base_model)
        except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:  # whatever a truncated file raises
            raise ValueError(f"the model in {folder.model} cannot be read: delete {folder.path} to fit anew") from error
        fitted.config = self.config(name)
        return fitted

    def backbone(self, name: str) -> Backbone | None:
        """The profile's base model, for a method that draws with one."""
        return backbone.load(self.settings.backbone) if self.method_of(name).needs_backbone else None

    def mask_source_name(self, name: str) -> str:
        """Where a method or a variant gets its masks from."""
        variant = self.settings.variants.get(name)
        return (variant and variant.mask_source) or self.settings.sample.mask_source

    def mask_source(self, name: str) -> MaskSource:
        """The same, as a function; sources that interpolate in latent space do so on the profile's base model."""
        name = self.mask_source_name(name)
        if name in sources.SOURCES:
            return sources.SOURCES[name]
        return getattr(latent, name)(diffusion.latent_space(backbone.load(self.settings.backbone)))

    def prompts(self) -> dict[str, str]:
        """Defect -> text prompt."""
        return {d: params.prompt(self.parameters, self.category, d) for d in self.defects}

    def identity(self, method: str, seed: int) -> dict[str, Any]:
        """What names a run in a stage file."""
        return {
            "profile": self.settings.profile, "split": self.settings.data.split, "dataset": self.parameters.dataset,
            "category": self.category, "method": method, "seed": seed,
        }  # fmt: skip

    def data_key(self, seed: int) -> str:
        """sha256 over the split rows, the defects and how images are read."""
        text = self.manifest(seed).to_csv(index=False) + json.dumps([self.defects, self.settings.data.model_dump()])
        return hashlib.sha256(text.encode()).hexdigest()


def _config(settings: Profile, name: str) -> MethodConfig:
    variant = settings.variants.get(name)
    if variant is None:
        return base.configure(name, settings.methods.get(name, {}))
    values = settings.methods.get(variant.of, {}) | variant.config
    if variant.released:
        values = base.get(variant.of).Config.as_released(**values).model_dump()
    return base.configure(variant.of, values)


@functools.lru_cache(maxsize=16)
def _category_rows(parameters: str, category: str, seed: int) -> pd.DataFrame:
    table = prepare.manifest(Parameters.model_validate_json(parameters), seed)
    return table[table["category"] == category].reset_index(drop=True)


def study(parameters: Parameters) -> Study:
    """Open a category for work; a missing one is the first of the data set.

    Raises:
        ValueError: The category, a defect or a method does not exist (the sentence lists those that do), or the
            category holds too little: no normals, or one shot where masks are interpolated between two.
    """
    settings = parameters.settings()
    torch.set_num_threads(settings.threads)
    table = prepare.manifest(parameters)
    shots = table[table["side"] == "shot"]
    known = sorted(shots["category"].unique())
    category = parameters.category or known[0]
    if category not in known:
        raise ValueError(f"{parameters.dataset} has no category '{category}' with shots; it has: {', '.join(known)}")
    every = prepare.ordered(
        list(shots.loc[shots["category"] == category, "defect"].unique()), parameters.dataset, category
    )
    defects = parameters.defects or every[: settings.grid.defects]
    unknown = sorted(set(defects) - set(every))
    if unknown:
        raise ValueError(f"{category} has no defect {', '.join(unknown)} with shots; it has: {', '.join(every)}")
    methods = parameters.methods or list(settings.methods)
    variants = settings.variants_of(methods)
    for name in [*methods, *variants]:
        _config(settings, name)
    seeds = parameters.seeds or settings.seeds
    root = prepare.data_root(parameters)
    names = (tuple(every), tuple(defects), tuple(methods), tuple(variants))
    s = Study(parameters, settings, root, category, *names, tuple(seeds))
    _check(s, table[table["category"] == category])
    return s


def _check(s: Study, rows: pd.DataFrame) -> None:
    """Stop before any long work where a category, with these rows of the split, would stop a run in the middle."""
    shipped = params.load_category(s.parameters.dataset, s.category)
    known = set(rows["defect"]) | set(shipped.prompts if shipped else ())
    if unknown := sorted(set(s.parameters.prompts) - known):
        raise ValueError(f"prompts: {s.category} has no defect '{unknown[0]}'; it has: {', '.join(s.all_defects)}")
    if not ((rows["defect"] == "good") & (rows["side"] == "train")).any():
        raise ValueError(f"{s.category} has no normal image to draw on: put at least one into train/good")
    shots = rows.loc[rows["side"] == "shot", "defect"].value_counts()
    single = [defect for defect in s.defects if shots[defect] == 1]
    for name in [*s.methods, *s.variants] if single else []:
        source = s.mask_source_name(name)
        if source.startswith("hmi") and not s.method_of(name).makes_masks:
            raise ValueError(
                f"{s.category}/{single[0]} has one shot, and the mask source '{source}' of {name} interpolates between "
                "two: add a second image with its mask, ask for other `defects`, or leave the method out of `methods`"
            )


def require_weights(parameters: Parameters) -> None:
    """Stop before any long work where weights that the profile needs are not here.

    Raises:
        FileNotFoundError: They are missing; the sentence holds the command that gets them.
        ValueError: A file is damaged, or a method is unknown.
    """
    settings = parameters.settings()
    wanted = {settings.quality.extractor, settings.quality.perceptual} - {"tiny"}
    if settings.downstream.classifier.pretrained:
        wanted.add("resnet34")
    for name in sorted(wanted):
        files.locate(name)
    backbone.digest(settings.backbone)  # notebooks 02 to 04 look at it, whatever the methods


def figures_folder(parameters: Parameters) -> Path:
    """Where notebooks draw and the report writes: beside the runs, unless told otherwise.

    ``figures/``, which is in git, is filled by :func:`defectlib.report.build.report` alone.
    """
    return Path(parameters.figures_root or parameters.dataset_folder() / "figures")


def results(parameters: Parameters, categories: Sequence[str]) -> pd.DataFrame:
    """The results so far of these categories, for the methods and seeds asked for; ``shots_only`` is always among them.

    A notebook asks for its own category, so that what it shows does not depend on which others are already done.
    """
    settings, folder = parameters.settings(), parameters.dataset_folder()
    found = runs.collect(folder.parents[1], parameters.profile_name, parameters.dataset)
    methods = parameters.methods or list(settings.methods)
    asked = (
        (found["split"] == settings.data.split)
        & found["category"].isin(categories)
        & found["method"].isin([SHOTS_ONLY, *methods, *settings.variants_of(methods)])
        & found["seed"].isin(parameters.seeds or settings.seeds)
    )
    return found[asked].reset_index(drop=True)


def stamp(s: Study) -> str:
    """The last line of a notebook: what was run, on which code and machine."""
    about = runs.provenance()
    named = ("torch", "diffusers", "torch-fidelity", "lpips")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in named)
    code = about["git_sha"][:12] + (" with uncommitted changes" if about["dirty"] else "")
    return (
        f"profile {s.settings.profile}, {s.parameters.dataset}/{s.category} ({', '.join(s.defects)}), "
        f"split {s.settings.data.split}, methods {', '.join(s.methods)}, seeds {', '.join(map(str, s.seeds))}\n"
        f"code {code}, python {about['python']}, {versions}, {about['device']}"
    )


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
    """Draw ``n_per_defect`` samples of each defect, with a bar unless in a batch; the record of the stage."""
    upstream = fit(s, method, seed)
    asked = s.settings.sample.model_dump() | {"mask_source": s.mask_source_name(method)}
    values = {
        "sample": asked, "config": s.config(method).model_dump(), "prompts": s.prompts(), "order": s.all_defects,
    }  # fmt: skip
    folder, key = s.folder(method, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("sample", key)) is not None:
        return record
    with runs.stage(folder, "sample", key, s.identity(method, seed), values, {"fit": upstream["key"]}) as metrics:
        fitted, shots = s.load(method, seed), s.shots(seed)
        source = None if fitted.makes_masks else s.mask_source(method)
        requests = sampling.plan(
            shots, s.normals(seed), s.settings.sample.n_per_defect, source, seed, s.prompts(),
            s.all_defects, s.settings.sample.group_size,
        )  # fmt: skip
        fresh = not (folder.path / "images").exists()
        clock = time.perf_counter()
        report = sampling.draw(fitted, requests, folder.path, progress="DEFECTLIB_BATCH" not in os.environ)
        seconds = time.perf_counter() - clock
        for defect, rows in report.groupby("defect", sort=False):
            share = {"defect": defect, "protocol": {"n_generated": len(rows)}}
            metrics.append({"metric": "mask_area", "value": float(rows["area"].mean()), **share})
            metrics.append({"metric": "bad_samples", "value": float(len(sampling.problems(rows))), **share})
            if source is not None:
                real = [shot.mask for shot in shots if shot.defect == defect]
                drawn = [request.mask for request in requests if request.defect == defect]
                metrics.append(
                    {"metric": "mask_iou", "value": float(np.mean([mask_iou(m, real) for m in drawn])), **share}
                )
        # After a restart part of the drawing was done by an earlier process: its speed is not known.
        protocol = {"n_generated": len(report), "image_size": s.size}
        speed = {"pairs_per_second": len(report) / seconds, "seconds_per_image": seconds / len(report)}
        metrics.extend({"metric": m, "value": v if fresh else None, "protocol": protocol} for m, v in speed.items())
    return folder.record("sample")


def quality(s: Study, method: str, seed: int) -> dict[str, Any]:
    """KID, IS, LPIPS and IC-LPIPS of a run's samples, per defect; the record of the stage.

    Real images are all those of the defect (shots and held-out), as in DefectSynth; IC-LPIPS clusters around the shots.
    """
    upstream = sample(s, method, seed)
    values = {"quality": s.settings.quality.model_dump()}
    folder, key = s.folder(method, seed), runs.stage_key(values, [upstream["key"]])
    if (record := folder.complete("quality", key)) is not None:
        return record
    with runs.stage(folder, "quality", key, s.identity(method, seed), values, {"sample": upstream["key"]}) as metrics:
        shots = s.shots(seed)
        for defect in s.defects:
            refs = [shot.image for shot in shots if shot.defect == defect]
            drawn = [item.image for item in sampling.load(folder.path, defect)]
            rows = quality_metrics.evaluate(drawn, s.real(defect, seed), refs, **s.quality_arguments())
            metrics.extend({**row, "defect": defect} for row in rows)
    return folder.record("quality")


def downstream(s: Study, method: str, seed: int) -> dict[str, Any]:
    """Train the classifier and the localiser on a run's samples, test on held-out real images; the stage's record.

    The row ``shots_only`` (the papers' "w/o augmentation") trains both on the shots, for as many steps. A split that
    holds no defect out (``all_shots`` on a small set) has nothing to test on: its scores are withheld, with the reason.
    """
    settings = s.settings.downstream
    source = [s.data_key(seed)] if method == SHOTS_ONLY else [sample(s, method, seed)["key"]]
    values = {"downstream": settings.model_dump(), "defects": s.defects, "seed": seed}
    folder, key = s.folder(method, seed), runs.stage_key(values, source)
    if (record := folder.complete("downstream", key)) is not None:
        return record
    with runs.stage(folder, "downstream", key, s.identity(method, seed), values, {"source": source[0]}) as metrics:
        shots, held_out = s.shots(seed), s.held_out(seed)
        if all(defect == "good" for *_, defect, _ in held_out):
            reason = f"the split '{s.settings.data.split}' holds no defect image of {s.category} out"
            metrics.extend({"metric": m, "value": None, "protocol": {"why_withheld": reason}} for m in WITHHELD)
        else:
            drawn = [] if method == SHOTS_ONLY else sampling.load(folder.path)
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
    model, curve = models.train_classifier(
        torch.stack([i.image for i in train]), labels, len(s.defects), settings, seed
    )
    probability = models.predict_classes(model, torch.stack([image for image, *_ in test]))
    table = pd.DataFrame(probability.numpy(), columns=[f"p_{d}" for d in s.defects])
    table.insert(0, "id", [name for *_, name in test])
    table.insert(1, "true", [defect for *_, defect, _ in test])
    table.insert(2, "predicted", [s.defects[i] for i in probability.argmax(1).tolist()])
    paths.write_text(folder.path / "predictions" / "classification.csv", table.to_csv(index=False))
    scores = regions.classification_metrics(table["true"].tolist(), table["predicted"].tolist(), list(s.defects))
    protocol |= {"final_loss": curve[-1], "confusion": scores["confusion"]}
    return [{"metric": m, "value": scores[m], "protocol": protocol} for m in ("accuracy", "f1_macro")]


def _localisation(s: Study, folder: RunFolder, train: list, held_out: list, seed: int) -> list[dict]:
    """Defect localisation, scored per pixel and per image (DefectSynth, Section V-A.2)."""
    settings = s.settings.downstream.localiser
    real = isinstance(train[0], Shot)
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
        "image_size": s.size, "final_loss": curve[-1],
    }  # fmt: skip
    scores = regions.pixel_metrics(maps, truth) | regions.image_metrics(
        regions.image_scores(maps), truth.any(axis=(1, 2))
    )
    if undefined := regions.why_undefined(truth):
        protocol["why_withheld"] = undefined
    return [{"metric": name, "value": value, "protocol": protocol} for name, value in scores.items()]
