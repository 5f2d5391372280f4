"""The records that pass between rooms. Value ranges and shapes are stated here, once, and checked on construction.

Images are float32 RGB in [-1, 1] of shape (3, H, W); masks are bool of shape (1, H, W), True is defect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def check_image(image: Tensor, what: str = "image") -> None:
    """Raise ValueError unless ``image`` is float32 (3, H, W) with finite values in [-1, 1]."""
    if image.dtype != torch.float32 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"{what} must be float32 (3, H, W), got {image.dtype} {tuple(image.shape)}")
    low, high = image.min().item(), image.max().item()
    if not (low >= -1.0001 and high <= 1.0001):
        raise ValueError(f"{what} must lie in [-1, 1], got [{low:.3g}, {high:.3g}]")


def check_mask(mask: Tensor, image: Tensor, what: str = "mask") -> None:
    """Raise ValueError unless ``mask`` is bool (1, H, W) of the image's size."""
    if mask.dtype != torch.bool or mask.ndim != 3 or mask.shape[0] != 1:
        raise ValueError(f"{what} must be bool (1, H, W), got {mask.dtype} {tuple(mask.shape)}")
    if mask.shape[1:] != image.shape[1:]:
        raise ValueError(f"{what} is {tuple(mask.shape[1:])} but its image is {tuple(image.shape[1:])}")


@dataclass(frozen=True, eq=False)
class Shot:
    """One real defect image of the few-shot training set."""

    image: Tensor
    mask: Tensor
    category: str
    defect: str
    id: str

    def __post_init__(self):
        check_image(self.image, f"image of shot {self.id}")
        check_mask(self.mask, self.image, f"mask of shot {self.id}")
        if not self.mask.any():
            raise ValueError(f"mask of shot {self.id} is empty: remove the pair or correct the mask")


@dataclass(frozen=True, eq=False)
class Request:
    """What to draw: a normal image, a mask (None where the method draws its own), a prompt and a seed.

    A sample depends on its request alone; where a method fuses across samples, on the requests of its ``group``.
    """

    normal: Tensor
    mask: Tensor | None
    category: str
    defect: str
    prompt: str
    seed: int
    group: int

    def __post_init__(self):
        check_image(self.normal, f"normal of request {self.seed}")
        if self.mask is not None:
            check_mask(self.mask, self.normal, f"mask of request {self.seed}")


@dataclass(frozen=True, eq=False)
class Sample:
    """What was drawn; ``mask`` is what downstream models train on.

    ``notes`` say how the mask came about where the method drew it, and are written with the mask; "flaw" is what is
    wrong with it. ``part`` is the picture that such a mask was read off, if there is one.
    """

    image: Tensor
    mask: Tensor
    category: str
    defect: str
    seed: int
    group: int
    notes: dict[str, float | str] = field(default_factory=dict)
    part: Tensor | None = None

    def __post_init__(self):
        check_image(self.image, f"sample {self.seed}")
        if self.part is not None:
            check_image(self.part, f"part of sample {self.seed}")
        check_mask(self.mask, self.image, f"mask of sample {self.seed}")
