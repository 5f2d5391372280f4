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
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from defectlib import paths
from defectlib.backbone import Backbone
from defectlib.masks.random import affine_crop, at, centred, place, windows
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


def paste(normal: Tensor, patch: Tensor, mask: Tensor, y: int, x: int, feather: float) -> tuple[Tensor, Tensor]:
    """Paste ``patch`` (3, h, w) where ``mask`` (1, h, w) with its corner at (y, x); parts outside the image are cut.

    Returns:
        The image (3, H, W) and its mask (1, H, W). Outside the mask the normal is untouched, whatever the feather: the
        blend runs from the mask's edge inwards.
    """
    frame = tuple(normal.shape[1:])
    placed = at(mask, (y, x), frame)
    outside, inside = windows(tuple(mask.shape[1:]), (y, x), frame)
    drawn = normal.clone()
    drawn[outside] = torch.where(mask[inside], patch[inside], normal[outside])
    if feather > 0:
        depth = distance_transform_edt(placed[0].numpy())
        alpha = torch.from_numpy(np.minimum(1.0, depth / (feather + 1))).float()[None]
        drawn = torch.where(placed, normal + alpha * (drawn - normal), normal)
    return drawn, placed


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
        rng = np.random.default_rng(request.seed)
        allowed = (
            foreground(request.normal) if self.config.inside_foreground else torch.ones_like(request.normal[:1]) > 0
        )
        for _ in range(self.config.attempts):
            patch, mask = self._cut(shots[rng.integers(len(shots))], rng)
            corner = place(mask, allowed, rng)
            if corner is not None:
                break
        else:
            corner = centred(mask, allowed)  # the last defect fits nowhere whole: what hangs over is cut off
        image, placed = paste(request.normal, patch, mask, *corner, self.config.feather)
        if self.config.inside_foreground and not (placed <= allowed).all():
            placed &= allowed
            image = torch.where(placed, image, request.normal)
        return Sample(image, placed, request.category, request.defect, request.seed, request.group)

    def _cut(self, shot: Shot, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        config = self.config
        scale = (config.scale_low, config.scale_high)
        return affine_crop(shot.image, shot.mask, rng, rotate=config.rotate, scale=scale, flip=config.flip)[:2]

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
