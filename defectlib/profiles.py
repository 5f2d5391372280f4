"""What a profile decides: the settings of one file of ``papermill_params/profiles``, and how they are read."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from defectlib import paths

# What 04_methods trains, whatever is asked for: a batch without one of them leaves that notebook out.
EXPLAINED = ("defectsynth", "dualanodiff", "adabldm")
# Of a profile: merged by name under `extends`.
GROUPS = ("methods", "data", "sample", "quality", "downstream")
SplitRule = Literal["first_third", "random_thirds", "ten_shots", "all_shots"]


def explains(methods: Iterable[str]) -> bool:
    """Whether a batch of these methods has 04_methods."""
    return set(EXPLAINED) <= set(methods)


class Strict(BaseModel):
    """Frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSettings(Strict):
    """How images are read: side of the square they are resized to, px a latent cell, how many normals are taken."""

    image_size: int = Field(ge=16)
    latent_cell: int = Field(ge=1)
    split: SplitRule
    max_normals: int = Field(ge=1)
    max_test_normals: int = Field(ge=1)


class AdaptSettings(Strict):
    """What the base model learns of a category's normal images before these methods learn from shots.

    For those that draw whole images, on a base model that does not know the objects: ``adaptation.to_objects``. One
    training serves all of a category's methods, variants and seeds; with ``flips`` images are also mirrored and turned.
    """

    methods: list[str] = Field(min_length=1)
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    flips: bool = True


MaskSourceName = Literal["affine", "affine_as_shots", "perlin", "hmi_image", "hmi_latent", "hmi"]


class SampleSettings(Strict):
    """How much is drawn; ``group_size`` is the unit of resume and of fusion across samples.

    ``mask_source`` names a function of ``masks.sources``, or of ``masks.latent`` (DefectSynth's interpolation in latent
    space, and its hybrid ``hmi``), which need a base model; methods that draw their own masks do not use it.
    ``n_of`` names methods of which another number is drawn, and ``mask_source_of`` those whose masks come from
    elsewhere, because their papers have it so.
    """

    n_per_defect: int = Field(ge=1, le=9999)
    n_of: dict[str, Annotated[int, Field(ge=1, le=9999)]] = {}
    group_size: int = Field(ge=1)
    mask_source: MaskSourceName
    mask_source_of: dict[str, MaskSourceName] = {}


class QualitySettings(Strict):
    """Extractors and protocol of KID, IS, LPIPS and IC-LPIPS.

    ``class_seen`` also asks which defect a classifier of the shots takes a sample for, where one model draws several.
    """

    extractor: Literal["tiny", "inception"]
    perceptual: Literal["tiny", "alex", "vgg"]
    ic_lpips: Literal["anomalydiffusion", "dfmgan", "seas"]
    kid_subset_cap: int = Field(ge=2)
    kid_subsets: int = Field(ge=1)
    seeds: list[int] = Field(min_length=1)
    class_seen: bool = False


class TrainSettings(Strict):
    """Training of one downstream model; exactly one of ``epochs`` and ``steps`` is given.

    ``pretrained`` starts from ImageNet weights, which :mod:`metrics.files` knows of the ResNet-34 alone.
    """

    architecture: Literal["resnet34", "smp-unet-resnet18", "smp-unet-vgg13_bn"]
    pretrained: bool
    epochs: Annotated[int, Field(ge=1)] | None
    steps: Annotated[int, Field(ge=1)] | None
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)

    @model_validator(mode="after")
    def _unambiguous(self) -> TrainSettings:
        """One length, and no weights that are not here."""
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of epochs and steps")
        if self.pretrained and self.architecture != "resnet34":
            raise ValueError(f"there are no weights for {self.architecture} here: set pretrained to false")
        return self


class CurveSettings(Strict):
    """Points of the learning curve besides all samples and all shots, a defect each, and the tasks that are drawn.

    A point is a whole training: ``seeds`` are those of which curves are drawn; None: all.
    """

    samples: list[Annotated[int, Field(ge=1)]] = []
    shots: list[Annotated[int, Field(ge=1)]] = []
    tasks: list[Literal["classification", "localisation"]] = []
    seeds: list[int] | None = None


class DownstreamSettings(Strict):
    """The classifier and the localiser of the downstream tables, and which model of a training is tested.

    Both train on the first ``n_samples`` of each defect, or on all that were drawn. ``selection``: ``last`` is the last
    step; ``val_generated`` the best of ``checkpoints`` evenly spaced ones on a
    tenth of the training items, held back; ``test_oracle`` the best on the test set itself, as released evaluations do.
    Under ``last`` what ``test_oracle`` would have shown stands beside it in the tables. ``variants`` says which ones'
    samples are learned from beside the methods': those that filter, or all.
    """

    classifier: TrainSettings
    localiser: TrainSettings
    n_samples: int | None = Field(default=None, ge=1)
    variants: Literal["filtered", "all"] = "filtered"
    selection: Literal["last", "val_generated", "test_oracle"] = "last"
    checkpoints: int = Field(default=5, ge=1)
    curve: CurveSettings = CurveSettings()

    @model_validator(mode="after")
    def _tasks(self) -> DownstreamSettings:
        """An architecture is of one task."""
        for task, known in (("classifier", "resnet34"), ("localiser", "smp-unet")):
            if not (given := getattr(self, task).architecture).startswith(known):
                raise ValueError(f"the {task} cannot be a {given}")
        return self


class Keep(Strict):
    """A filter: of each defect the best ``share`` of the samples is kept.

    The best ``by`` "nearest_shot" are drawn most like a shot, by "mask_seen" those whose masks lie on what a localiser
    of the shots finds. Neither looks at the test set.
    """

    share: float = Field(gt=0, lt=1)
    by: Literal["nearest_shot", "mask_seen"]


class ShotRule(Strict):
    """Which shots a variant learns from, and when.

    Attributes:
        most: The first so many shots of each defect; None: all.
        of: "first": ``most`` is of the first defect alone.
        others: The first so many shots of the others then; None: all.
        last_later: The last defect is learned after the others, with all that classes share frozen.
    """

    most: int | None = Field(None, ge=1)
    of: Literal["every", "first"] = "every"
    others: int | None = Field(None, ge=1)
    last_later: bool = False

    @model_validator(mode="after")
    def _changes_something(self) -> ShotRule:
        if self.others and self.of != "first":
            raise ValueError('others limits the defects beside the first: it asks for of: "first"')
        if not (self.most or self.others or self.last_later):
            raise ValueError("give most, others or last_later: these are its method's shots, all at once")
        return self


class Variant(Strict):
    """A row of an ablation: a method with some fields changed, or with another source of masks, or filtered.

    ``released`` starts from the values of the code that the paper's authors released. A variant has a fit of its own
    only where a field is changed that the fit reads. ``only = "objects"`` leaves it out where the surface fills the
    frame, as DualAnoDiff's background compensation asks. ``shots`` fits on fewer of them, on unequal numbers, or on the
    last defect after the others (left out where there is one defect). ``keep`` draws nothing: it keeps the better ones
    of the samples that the method itself drew.
    """

    of: str
    released: bool = False
    config: dict[str, Any] = {}
    mask_source: MaskSourceName | None = None
    only: Literal["objects"] | None = None
    shots: ShotRule | None = None
    keep: Keep | None = None

    @property
    def everywhere(self) -> bool:
        """Whether every category has it."""
        return self.only is None and not (self.shots and self.shots.last_later)

    @model_validator(mode="after")
    def _of_the_method_itself(self) -> Variant:
        if self.keep and (self.released or self.config or self.mask_source or self.shots):
            raise ValueError("keep filters what the method drew: a variant with it changes nothing else")
        return self


class Grid(Strict):
    """How much of a data set a profile covers: the first categories and defects in order; None is all."""

    categories: Annotated[int, Field(ge=1)] | None
    defects: Annotated[int, Field(ge=1)] | None


class Profile(Strict):
    """One of ``papermill_params/profiles``: values only, the code path is the same for all.

    ``run`` names the methods that are run where nobody asks for others; empty: all. The rest are there for who asks
    for them, and for ``04_methods`` run by itself. ``note`` is what a reader of its results must know; the report opens
    with it.
    """

    profile: str
    note: str = ""
    backbone: str
    threads: int = Field(ge=1)
    seeds: list[int] = Field(min_length=1)
    grid: Grid
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    variants: dict[str, Variant] = {}
    run: list[str] = []
    adapt: AdaptSettings | None = None
    data: DataSettings
    sample: SampleSettings
    quality: QualitySettings
    downstream: DownstreamSettings

    @field_validator("variants")
    @classmethod
    def _names(cls, variants: dict[str, Variant]) -> dict[str, Variant]:
        """A run folder and a table's row tell a variant from a method by its name."""
        for name, variant in variants.items():
            if not name.startswith(f"{variant.of}_"):
                raise ValueError(f"the variant '{name}' must be named {variant.of}_<what is changed>")
        return variants

    @model_validator(mode="after")
    def _numbers(self) -> Profile:
        """A misspelt method would silently be drawn as often as the others."""
        for field in ("n_of", "mask_source_of"):
            if unknown := sorted(set(getattr(self.sample, field)) - set(self.methods)):
                raise ValueError(f"sample.{field} names '{unknown[0]}', which is no method of the profile")
        if unknown := sorted(set(self.run) - set(self.methods)):
            raise ValueError(f"run names '{unknown[0]}', which is no method of the profile")
        if self.adapt and (unknown := sorted(set(self.adapt.methods) - set(self.methods))):
            raise ValueError(f"adapt.methods names '{unknown[0]}', which is no method of the profile")
        return self

    def asked(self, methods: list[str] | None) -> list[str]:
        """The methods to run: those asked for, else the profile's."""
        return methods or self.run or list(self.methods)

    def weights(self) -> list[str]:
        """The weights of ``metrics.files`` that it needs and the package does not bring."""
        known = {self.quality.extractor, self.quality.perceptual} - {"tiny"}
        return sorted(known | ({"resnet34"} if self.downstream.classifier.pretrained else set()))

    def variants_of(self, methods: Sequence[str]) -> list[str]:
        """The variants of these methods."""
        return [name for name, variant in self.variants.items() if variant.of in methods]


def explain(error: ValidationError, source: str, known: Sequence[str] = ()) -> ValueError:
    """One sentence for all wrong values, naming where each stands; ``known`` are the names that could be meant."""
    parts = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "values"
        said = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            outermost = known and len(item["loc"]) == 1
            said = f"unknown parameter (known: {', '.join(known)})" if outermost else "unknown key"
        parts.append(f"{where}: {said}")
    return ValueError(f"{source}: " + "; ".join(parts))


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML mapping, or raise ValueError naming the file."""
    try:
        values = copy.deepcopy(_parsed(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of names to values")
    return values


@lru_cache(maxsize=64)
def _parsed(text: str) -> Any:
    """The values in a text: a profile is asked for with every path, and parsing one takes 25 ms."""
    return yaml.safe_load(text)


def names() -> list[str]:
    """The profiles there are."""
    return sorted(path.stem for path in (paths.PARAMS / "profiles").glob("*.yaml"))


def load(name: str) -> Profile:
    """Read and validate ``papermill_params/profiles/<name>.yaml``.

    A profile that ``extends`` another one gives what differs: methods and the fields of ``data``, ``sample``,
    ``quality`` and ``downstream`` one by one, anything else as a whole.

    Raises:
        ValueError: There is no such profile, a value in it is wrong or unknown, or it extends itself.
    """
    return _load(name, ())


def _load(name: str, below: tuple[str, ...]) -> Profile:
    path = paths.PARAMS / "profiles" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"there is no profile '{name}' in {path.parent}; there are: {', '.join(names())}")
    if name in below:
        raise ValueError(f"{path} extends itself, by way of {', '.join(below)}: leave one `extends` out")
    values = load_yaml(path)
    if other := values.pop("extends", None):
        base = _load(other, (*below, name)).model_dump(exclude={"profile"})
        values = base | values | {group: base[group] | (values.get(group) or {}) for group in GROUPS}
    try:
        profile = Profile(**values)
    except ValidationError as error:
        raise explain(error, str(path)) from error
    if profile.profile != name:
        raise ValueError(f"{path} says `profile: {profile.profile}`: write {name}, by which its runs are found")
    return profile
