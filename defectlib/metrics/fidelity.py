"""The small extractor inside torch-fidelity, so that its own pipeline and command line can use it by name.

torch-fidelity refuses a name that is already registered (every second run of a notebook cell), hence the guard.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from defectlib import images
from defectlib.metrics import tiny

NAME = "defectlib-tiny"


class TinyFeatures(FeatureExtractorBase):
    """Layers ``features`` (N, 192), for KID, and ``logits`` (N, 32), for IS, of uint8 images (N, 3, H, W)."""

    def __init__(self, name: str, features_list: list[str], **kwargs):
        super().__init__(name, features_list)
        self.net = copy.deepcopy(tiny.load())

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """The layers there are."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Class logits for the Inception score, spatial means for all else."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """The resize goes through PIL."""
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        """A batch of the right shape; not used, as the extractor is not compiled."""
        return torch.zeros(1, 3, tiny.SIZE, tiny.SIZE, dtype=torch.uint8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The requested layers, in order."""
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"torch-fidelity hands uint8 (N, 3, H, W) to an extractor, got {x.dtype} {tuple(x.shape)}")
        pictures = [images.from_uint8(picture.permute(1, 2, 0).cpu().numpy()) for picture in x]
        layers = dict(
            zip(self.get_provided_features_list(), self.net.features_and_logits(tiny.prepare(pictures).to(x.device)))
        )
        return tuple(layers[name] for name in self.features_list)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, TinyFeatures)
