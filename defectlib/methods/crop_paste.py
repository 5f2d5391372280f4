"""Crop-Paste: a real defect cut out by its mask, moved, and pasted on a normal image.

The baseline of DefectSynth's Tables II, III, VIII and IX (its reference [40]). The paper gives no parameters; rotation
and scale are those of AdaBLDM's composite generator (rotation 0-360 degrees, scale 0.85-1.15, inside the foreground).
Feathering is off in the paper's form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from defectlib import paths
from defectlib.augmentation import composite
from defectlib.backbone import Backbone
from defectlib.masks.trimap import foreground
from defectlib.methods.base import MethodConfig, load_shots, register, save_shots
from defectlib.types import Request, Sample, Shot


class CropPasteConfig(MethodConfig):
    """Geometry of the pasted defect; ``feather`` is the width in px of a blend that stays inside the mask."""

    DRAWING: ClassVar[tuple[str, ...]] = (
        *("rotate", "scale_low", "scale_high", "flip", "inside_foreground", "feather", "attempts"),
    )

    rotate: float = Field(360.0, ge=0, le=360)
    scale_low: float = Field(0.85, gt=0)
    scale_high: float = Field(1.15, gt=0)
    flip: bool = True
    inside_foreground: bool = True
    feather: float = Field(0.0, ge=0)
    attempts: int = Field(8, ge=1)


@register("crop_paste")
class CropPaste:
    """See the module's docstring. Not trained: a fit keeps the shots."""

    Config = CropPasteConfig
    scope = "category"
    makes_masks = True
    preserves_background = True
    needs_backbone = False
    one_normal_a_group = False

    def __init__(self, config: CropPasteConfig, backbone: Backbone | None = None) -> None:
        self.config = config
        self.shots: list[Shot] = []

    def fit(
        self, shots: Sequence[Shot], normals: Sequence[Tensor], *, prompts: dict[str, str], seed: int, workdir: Path
    ) -> None:
        """Keep the shots; nothing is learned, so ``prompts`` and ``seed`` change nothing."""
        if not shots:
            raise ValueError("Crop-Paste needs at least one shot: it has nothing to cut out")
        self.shots = list(shots)

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """Cut, move and paste; every random choice comes from the request's seed."""
        return [self._draw(request) for request in requests]

    def _draw(self, request: Request) -> Sample:
        shots = [shot for shot in self.shots if shot.defect == request.defect]
        if not shots:
            raise ValueError(f"Crop-Paste was fitted without a shot of '{request.defect}': add one or drop the defect")
        config, rng = self.config, np.random.default_rng(request.seed)
        anywhere = torch.ones_like(request.normal[:1], dtype=torch.bool)
        image, placed = composite(
            shots, request.normal, foreground(request.normal) if config.inside_foreground else anywhere, rng,
            rotate=config.rotate, scale=(config.scale_low, config.scale_high), flip=config.flip,
            feather=config.feather, attempts=config.attempts,
        )  # fmt: skip
        return Sample(image, placed, request.category, request.defect, request.seed, request.group)

    def save(self, folder: Path) -> None:
        """Shots as ``shots.safetensors`` with their names beside them in JSON, and the configuration."""
        described = {"config": self.config.model_dump(), "shots": save_shots(self.shots, folder)}
        paths.write_text(folder / "method.json", json.dumps(described, indent=1))

    @classmethod
    def load(cls, folder: Path, backbone: Backbone | None = None) -> CropPaste:
        """Read what :meth:`save` wrote."""
        described = json.loads((folder / "method.json").read_text())
        method = cls(cls.Config(**described["config"]), backbone)
        method.shots = load_shots(folder, described["shots"])
        return method
