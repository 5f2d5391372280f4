"""One category under the parameters of a notebook: its data, methods, configurations and run folders."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor

from defectlib import adaptation, backbone, diffusion, params, paths, prepare, runs
from defectlib.backbone import Backbone
from defectlib.data import layouts, splits
from defectlib.images import open_pil, read_mask
from defectlib.masks import latent, sources, trimap
from defectlib.masks.sources import MaskSource
from defectlib.methods import base
from defectlib.methods.base import Method, MethodConfig
from defectlib.metrics import files
from defectlib.metrics.perceptual import PROTOCOLS
from defectlib.params import Parameters
from defectlib.profiles import AdaptSettings, Keep, Profile, ShotRule
from defectlib.runs import RunFolder
from defectlib.types import Shot

SHOTS_ONLY, BASELINE = "shots_only", "crop_paste"
ADAPTED = "adapted_base"


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
        found = splits.shots(self.manifest(seed), self.root, self.category, self.defects, self.size)
        rows = splits.rows(self.manifest(seed), self.category, "shot", self.defects)
        self._know(rows, [shot.image for shot in found])
        return found

    def shot_rule(self, name: str) -> ShotRule | None:
        """A variant's own rule for shots, or None."""
        variant = self.settings.variants.get(name)
        return variant.shots if variant else None

    def learned(self, name: str, seed: int = 0) -> list[Shot]:
        """The shots that a method or a variant learns from."""
        shots, rule = self.shots(seed), self.shot_rule(name)
        if rule is None:
            return shots
        most = dict.fromkeys(self.defects, rule.most if rule.of == "every" else rule.others)
        most |= {self.defects[0]: rule.most}
        return first(shots, {defect: n for defect, n in most.items() if n})

    def in_turn(self, name: str, shots: Sequence[Shot]) -> tuple[list[Shot], list[Shot]]:
        """The shots that a fit learns from at once, and those of the defect that it learns after them."""
        late = self.defects[-1:] if self.learns_later(name) else ()
        return [x for x in shots if x.defect not in late], [x for x in shots if x.defect in late]

    def learns_later(self, name: str) -> bool:
        """Whether a variant learns the last defect after the others."""
        rule = self.shot_rule(name)
        return bool(rule and rule.last_later)

    def normals(self, seed: int = 0) -> list[Tensor]:
        """Defect-free images to draw on and to train with."""
        limit = self.settings.data.max_normals
        found = splits.normals(self.manifest(seed), self.root, self.category, "train", self.size, limit)
        self._know(splits.normal_rows(self.manifest(seed), self.category, "train", limit), found)
        return found

    def _know(self, rows: pd.DataFrame, pictures: Sequence[Tensor]) -> None:
        """Tell ``masks.trimap`` what is object where the user has said so."""
        if self.parameters.foregrounds is None:
            for picture in pictures:  # another study of this process may have said otherwise
                trimap.forget(picture)
            return
        for row, picture in zip(rows.itertuples(), pictures, strict=True):
            file = self.foreground_file(row.image)
            given = read_mask(file, layouts.parse_box(row.box), self.size)
            if not given.any():
                raise ValueError(f"foregrounds: {file} shows no object in the tile {row.box}: set tiles to none")
            trimap.know(picture, given)

    def learned_from(self, seed: int) -> list[str]:
        """The image files of the shots and of the training normals that are read."""
        shots = splits.rows(self.manifest(seed), self.category, "shot", self.defects)
        normals = splits.normal_rows(self.manifest(seed), self.category, limit=self.settings.data.max_normals)
        return list(dict.fromkeys([*shots["image"], *normals["image"]]))

    def foreground_file(self, image: str) -> Path:
        """Where the user's own mask of the object in an image of the data set lies."""
        return Path(self.parameters.foregrounds) / Path(image).with_suffix(".png")

    def held_out(self, seed: int = 0) -> list[tuple[Tensor, Tensor, str, str]]:
        """Test images: every held-out defect of the asked types, and up to ``max_test_normals`` normals."""
        found = splits.held_out(self.manifest(seed), self.root, self.category, self.defects, self.size)
        good = [item for item in found if item[2] == "good"]
        return [item for item in found if item[2] != "good"] + good[: self.settings.data.max_test_normals]

    def real(self, defect: str, seed: int = 0) -> list[Tensor]:
        """All real images of a defect, shots first: the reference set of the quality measures, as in DefectSynth."""
        few = [shot.image for shot in self.shots(seed) if shot.defect == defect]
        return few + [image for image, _, name, _ in self.held_out(seed) if name == defect]

    def references(self, defect: str, seed: int = 0) -> list[Tensor]:
        """The real images of a defect that IC-LPIPS clusters around where these are not all.

        The shots; or for AnomalyDiffusion's protocol the first third of the images by id, which are the shots of the
        split ``first_third`` and no other's.
        """
        table = self.manifest(seed)
        if PROTOCOLS[self.settings.quality.ic_lpips].references == "first third":
            table = splits.assign(table, "first_third", usable=table["side"] != "unused")
        return [shot.image for shot in splits.shots(table, self.root, self.category, [defect], self.size)]

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
        if variant is None or variant.shots or self.config(name).fit_values() != self.config(variant.of).fit_values():
            return name
        return variant.of

    def n_per_defect(self, name: str) -> int:
        """How many pairs of each defect are drawn by a method or a variant, or kept by a filter."""
        asked, keep = self.settings.sample, self.keep(name)
        n = asked.n_of.get(self.method_of(name).name, asked.n_per_defect)
        return ceil(keep.share * n) if keep else n

    def n_used(self, name: str) -> int:
        """How many of them the downstream models train on: the first of each defect."""
        drawn = self.n_per_defect(name)
        return min(drawn, self.settings.downstream.n_samples or drawn)

    def compared(self) -> list[str]:
        """The rows of every downstream table: the shots alone, Crop-Paste where the profile has it, the methods."""
        return list(dict.fromkeys([SHOTS_ONLY, *_baseline(self.settings), *self.methods]))

    def learned_with(self) -> list[str]:
        """What downstream models train on: the rows of every table, and the variants that the profile says."""
        every = self.settings.downstream.variants == "all"
        return [*self.compared(), *(name for name in self.variants if every or self.keep(name))]

    def keep(self, name: str) -> Keep | None:
        """The filter of a variant that has one."""
        variant = self.settings.variants.get(name)
        return variant.keep if variant else None

    def fitted_with(self, name: str) -> list[Study]:
        """The categories whose shots the fit of a method or a variant learns from; the first holds the fit.

        Itself alone, or all that the profile's grid covers where one fit serves the data set. Of a category or of
        defects outside the grid the fit is its own, and learns from the grid's besides.
        """
        if not base.covers_dataset(self.method_of(name), self.config(name)):
            return [self]
        alike = {"defects": None, "methods": [self.method_of(name).name], "variants": [], "prompts": {}}
        alike |= {"seeds": list(self.seeds)}
        shared = self.parameters.model_copy(update=alike | {"category": None})
        others = [shared.model_copy(update={"category": name}) for name in prepare.categories(shared)]
        grid = [dataclasses.replace(open_category(p), settings=self.settings) for p in others]
        if (self.category, self.defects) in [(one.category, one.defects) for one in grid]:
            return grid
        return [self, *(one for one in grid if one.category != self.category)]

    def load(self, name: str, seed: int) -> Method:
        """The fitted method of a run, or a variant of it, ready to draw; :func:`fit` must have been called.

        Raises:
            ValueError: A file of the fit is cut off or missing.
        """
        folder = self.fitted_with(name)[0].folder(self.fitted_as(name), seed)
        base_model = self.backbone(name, seed)
        try:
            fitted = self.method_of(name).load(folder.model, base_model)
        except (OSError, json.JSONDecodeError, KeyError, SafetensorError) as error:  # whatever a truncated file raises
            raise ValueError(f"the model in {folder.model} cannot be read: delete {folder.path} to fit anew") from error
        fitted.config = self.config(name)
        return fitted

    def adapts(self, name: str) -> AdaptSettings | None:
        """How the base model of a method or a variant is adapted to the category first, or None."""
        asked, kind = self.settings.adapt, self.method_of(name)
        return asked if asked and kind.needs_backbone and kind.name in asked.methods else None

    def backbone(self, name: str, seed: int) -> Backbone | None:
        """The base model that a method or a variant learns and draws with, where it does with one.

        It is the profile's, or that one adapted to the normal images of all categories that the fit learns from:
        trained where it is not there yet.
        """
        if not self.method_of(name).needs_backbone:
            return None
        base_model, asked = backbone.load(self.settings.backbone), self.adapts(name)
        if asked is None:
            return base_model
        covered = self.fitted_with(name)
        images = torch.stack([image for one in covered for image in one.normals(seed)])
        folder = covered[0].parameters.dataset_folder() / covered[0].category / ADAPTED
        return adaptation.to_objects(base_model, images, asked, folder)

    def mask_source_name(self, name: str) -> str:
        """Where a method or a variant gets its masks from."""
        variant, asked = self.settings.variants.get(name), self.settings.sample
        own = asked.mask_source_of.get(self.method_of(name).name, asked.mask_source)
        return (variant and variant.mask_source) or own

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
        """sha256 over the split rows, the defects, how images are read, and the user's own foregrounds."""
        text = self.manifest(seed).to_csv(index=False) + json.dumps([self.defects, self.settings.data.model_dump()])
        if self.parameters.foregrounds is not None:
            text += "".join(paths.sha256(self.foreground_file(image)) for image in self.learned_from(seed))
        return hashlib.sha256(text.encode()).hexdigest()

    def stamp(self) -> str:
        """The last line of a notebook: what was run, on which code and machine."""
        about = runs.provenance()
        named = ("torch", "diffusers", "torch-fidelity", "lpips")
        versions = ", ".join(f"{name} {about['versions'][name]}" for name in named)
        code = about["git_sha"][:12] + (" with uncommitted changes" if about["dirty"] else "")
        return (
            f"profile {self.settings.profile}, {self.parameters.dataset}/{self.category} ({', '.join(self.defects)}), "
            f"split {self.settings.data.split}, methods {', '.join(self.methods)}, "
            f"seeds {', '.join(map(str, self.seeds))}\n"
            f"code {code}, python {about['python']}, {versions}, {about['device']}"
        )


def first(shots: Sequence[Shot], most: Mapping[str, int]) -> list[Shot]:
    """The first shots of each defect in the order given, as many as asked for; all of a defect that is not named."""
    seen: Counter[str] = Counter()
    few = []
    for shot in shots:
        seen[shot.defect] += 1
        if seen[shot.defect] <= most.get(shot.defect, len(shots)):
            few.append(shot)
    return few


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


def open_category(parameters: Parameters) -> Study:
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
    methods = settings.asked(parameters.methods)
    variants = settings.variants_of(methods)
    for name in [*methods, *variants]:
        _config(settings, name)
    seeds = parameters.seeds or settings.seeds
    root = prepare.data_root(parameters)
    names = (tuple(every), tuple(defects), tuple(methods), tuple(variants))
    s = Study(parameters, settings, root, category, *names, tuple(seeds))
    if parameters.foregrounds is not None:
        _check_foregrounds(s)
    if len(defects) < 2:
        s = dataclasses.replace(s, variants=tuple(name for name in variants if not s.learns_later(name)))
    of_objects = {name for name in s.variants if settings.variants[name].only}
    if of_objects and not _shows_objects(s):
        s = dataclasses.replace(s, variants=tuple(name for name in s.variants if name not in of_objects))
    _check(s, table[table["category"] == category])
    return s


def _shows_objects(s: Study) -> bool:
    """Whether all normals, and a shot of every defect, show a background beside their object, under every seed's split.

    It is asked once a process.
    """
    for seed in s.seeds:
        if (key := (s.root, s.data_key(seed))) not in _objects:
            alone = {shot.defect for shot in s.shots(seed) if not trimap.foreground(shot.image).all()}
            filled = any(bool(trimap.foreground(image).all()) for image in s.normals(seed))
            _objects[key] = alone == set(s.defects) and not filled
    return all(_objects[s.root, s.data_key(seed)] for seed in s.seeds)


_objects: dict[tuple, bool] = {}


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
    of_pairs = [m for m in s.methods if s.method_of(m).makes_masks and s.method_of(m).needs_backbone]
    if of_pairs and (full := [x for seed in s.seeds for x in s.shots(seed) if x.mask.all()]):
        raise ValueError(
            f"the mask of {s.category}/{full[0].defect}/{full[0].id} covers the whole image, and {of_pairs[0]} could "
            "read none off its part: remove the pair, correct the mask, or leave the method out of `methods`"
        )
    for name in [*s.methods, *s.variants]:
        source, rule, config = s.mask_source_name(name), s.shot_rule(name), s.config(name)
        if source == "perlin" and (full := [x for seed in s.seeds for x in s.shots(seed) if x.mask.all()]):
            raise ValueError(
                f"the mask of {s.category}/{full[0].defect}/{full[0].id} covers the whole image, and {name} draws "
                "noise of the shots' areas: remove the pair, correct the mask, or leave the variant out (`variants`)"
            )
        by_class = getattr(config, "adapters", "") in ("csb", "vera") and not base.covers_dataset(
            s.method_of(name), config
        )
        if s.learns_later(name) and not by_class:
            raise ValueError(
                f"{name} learns a defect later, for which a method needs coefficients of a category's classes: leave "
                "last_later out"
            )
        if not source.startswith("hmi") or s.method_of(name).makes_masks:
            continue
        if rule and 1 in (rule.most, rule.others):
            raise ValueError(f"{name} learns from one shot, and its mask source '{source}' interpolates between two")
        if single:
            raise ValueError(
                f"{s.category}/{single[0]} has one shot, and the mask source '{source}' of {name} interpolates between "
                "two: add a second image with its mask, ask for other `defects`, or leave the method out of `methods`"
            )


def _check_foregrounds(s: Study) -> None:
    """One of the user's foregrounds for every image that is learned from, of its size and not empty."""
    for image in dict.fromkeys(image for seed in s.seeds for image in s.learned_from(seed)):
        file = s.foreground_file(image)
        if not file.is_file():
            raise ValueError(
                f"foregrounds: {file} is missing; the folder must hold a mask of the object, white on black, for every "
                "shot and training normal, named as the image with .png"
            )
        given, wanted = open_pil(file).size, open_pil(s.root / image).size
        if given != wanted:
            raise ValueError(f"foregrounds: {file} is {given[0]} x {given[1]} px, its image {wanted[0]} x {wanted[1]}")
        if not read_mask(file).any():
            raise ValueError(f"foregrounds: {file} is all black: paint the object white, or leave the image out")


def require_weights(parameters: Parameters) -> None:
    """Stop before any long work where weights that the profile needs are not here.

    Raises:
        FileNotFoundError: They are missing; a sentence for each of them holds the command that gets it.
        ValueError: A file is damaged, or a method is unknown.
    """
    settings = parameters.settings()
    missing = []
    # Notebooks 02, 03 and 07 look at the base model, whatever the methods.
    for find, name in [(backbone.digest, settings.backbone), *((files.locate, name) for name in settings.weights())]:
        try:
            find(name)
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("\n".join(missing))


def results(parameters: Parameters, categories: Sequence[str]) -> pd.DataFrame:
    """The results so far of these categories, of the methods and seeds asked for, the shots alone and the baseline.

    A notebook asks for its own category, so that what it shows does not depend on which others are already done.
    """
    settings, folder = parameters.settings(), parameters.dataset_folder()
    found = runs.collect(folder.parents[1], parameters.profile_name, parameters.dataset)
    methods = settings.asked(parameters.methods)
    asked = (
        (found["split"] == settings.data.split)
        & found["category"].isin(categories)
        & found["method"].isin([SHOTS_ONLY, *_baseline(settings), *methods, *settings.variants_of(methods)])
        & found["seed"].isin(parameters.seeds or settings.seeds)
    )
    return found[asked].reset_index(drop=True)


def _baseline(settings: Profile) -> list[str]:
    """Crop-Paste, without which no downstream score means much: it costs a training, and nothing to fit."""
    return [BASELINE] if BASELINE in settings.methods else []
