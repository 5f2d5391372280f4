"""What every method promises, and the one registry of methods."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from defectlib import paths
from defectlib.backbone import Backbone
from defectlib.profiles import Strict
from defectlib.types import Request, Sample, Shot


class MethodConfig(Strict):
    """Base of every method's frozen configuration: unknown fields are refused, ablations are fields.

    Class attributes:
        DRAWING: The fields that ``fit`` does not read, so that a change leaves a fit valid.
    """

    DRAWING: ClassVar[tuple[str, ...]] = ()

    def fit_values(self) -> dict[str, Any]:
        """What a fit depends on."""
        return self.model_dump(exclude=set(self.DRAWING))


@runtime_checkable
class Method(Protocol):
    """A few-shot defect image generator.

    Attributes:
        config: Its configuration; may be replaced after a fit by one that differs in ``Config.DRAWING``.

    Class attributes:
        Config: The method's :class:`MethodConfig`.
        scope: What one fit covers; a configuration may have a ``scope`` of its own, see :func:`covers_dataset`.
        makes_masks: True where the method draws its own mask and ignores ``Request.mask``.
        preserves_background: True where pixels outside the sample's mask equal the normal's exactly.
        needs_backbone: True where it draws with a base model.
        one_normal_a_group: True where the requests of a group share their normal image, which is then looked at once.
    """

    Config: ClassVar[type[MethodConfig]]
    scope: ClassVar[Literal["category", "defect", "dataset"]]
    makes_masks: ClassVar[bool]
    preserves_background: ClassVar[bool]
    needs_backbone: ClassVar[bool]
    one_normal_a_group: ClassVar[bool]
    config: MethodConfig

    def __init__(self, config: MethodConfig, backbone: Backbone | None = None) -> None:
        """Set up with a configuration and, where the method needs one, a base model."""

    def fit(
        self, shots: Sequence[Shot], normals: Sequence[Tensor], *, prompts: dict[str, str], seed: int, workdir: Path
    ) -> None:
        """Learn from real pairs, their prompts (defect -> text) and normals; a killed fit goes on from ``workdir``."""

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """Draw one sample a request, in order. A sample depends on its request (and its group) alone."""

    def save(self, folder: Path) -> None:
        """Write what was fitted: safetensors and JSON only."""

    @classmethod
    def load(cls, folder: Path, backbone: Backbone | None = None) -> Method:
        """Read what :meth:`save` wrote."""


PROMISED = (
    *("Config", "scope", "makes_masks", "preserves_background", "needs_backbone", "one_normal_a_group"),
    *("fit", "sample", "save", "load"),
)
_REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type], type]:
    """Class decorator that enters a method under an explicit name; a second class of that name is refused."""
    if not name.isidentifier() or not name.islower():
        raise ValueError(f"method name '{name}' must be a lower-case identifier: it becomes a folder and a parameter")

    def enter(cls: type) -> type:
        known = _REGISTRY.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"method '{name}' is registered twice: {known.__qualname__} and {cls.__qualname__}")
        missing = [part for part in PROMISED if not hasattr(cls, part)]
        if missing:
            raise ValueError(f"method '{name}' lacks {', '.join(missing)}: see methods/base.py")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return enter


def names() -> list[str]:
    """All registered methods; imports every file of this folder once."""
    package = importlib.import_module("defectlib.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"defectlib.methods.{module.name}")
    return sorted(_REGISTRY)


def get(name: str) -> type[Method]:
    """The class registered under ``name``."""
    if name not in names():
        raise ValueError(f"there is no method '{name}'; there are: {', '.join(names())}")
    return _REGISTRY[name]


def method_of(run: str) -> str | None:
    """The method that a run's name is of: its own, or the one that a variant's begins with; None: none that is here."""
    return max((name for name in names() if run == name or run.startswith(f"{name}_")), key=len, default=None)


def configure(name: str, values: dict[str, Any]) -> MethodConfig:
    """The validated configuration of a method from a profile's values (defaults are the paper's)."""
    try:
        return get(name).Config(**values)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"configuration of method '{name}': {wrong}") from error


def covers_dataset(method: type[Method], config: MethodConfig) -> bool:
    """Whether one fit with this configuration serves all categories of a data set."""
    return getattr(config, "scope", method.scope) == "dataset"


def require_base(backbone: Backbone | None, title: str) -> None:
    """ValueError where a method that draws with a base model was given none."""
    if backbone is None:
        raise ValueError(f"{title} needs a base model: give backbone.load('tiny') or 'sd15'")


def require_prompts(shots: Sequence[Shot], prompts: Mapping[str, str]) -> None:
    """ValueError where a defect that is to be learned has no prompt."""
    if lacking := sorted({shot.defect for shot in shots} - set(prompts)):
        raise ValueError(f"there is no prompt for the defect {lacking[0]}: name it in the category's parameter file")


def require_fitted_on(digest: str, backbone: Backbone, folder: Path) -> None:
    """ValueError where a fit, read from a folder, is of another base model."""
    if digest != backbone.digest:
        raise ValueError(f"{folder} was fitted on another base model than '{backbone.name}': fit it anew")


def save_shots(shots: Sequence[Shot], folder: Path) -> list[dict[str, str]]:
    """Write ``shots.safetensors``; returns their names, for the method's JSON."""
    tensors = {f"{i:04d}.{part}": getattr(s, part) for i, s in enumerate(shots) for part in ("image", "mask")}
    paths.write_bytes(folder / "shots.safetensors", safetensors.torch.save(tensors))
    return [{"category": s.category, "defect": s.defect, "id": s.id} for s in shots]


def load_shots(folder: Path, names: Sequence[dict[str, str]]) -> list[Shot]:
    """Read what :func:`save_shots` wrote, with the names that it returned."""
    tensors = safetensors.torch.load_file(folder / "shots.safetensors")
    return [Shot(tensors[f"{i:04d}.image"], tensors[f"{i:04d}.mask"], **name) for i, name in enumerate(names)]
