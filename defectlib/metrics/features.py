"""Feature extractors by name.

* for KID and IS: ``tiny`` (ours, shipped) and ``inception`` (torch-fidelity's ``inception-v3-compat``: layer "2048" for
  KID, "logits_unbiased" for IS)
* for LPIPS: ``tiny``, ``alex`` and ``vgg`` (trunks and heads of lpips 0.1.4; ``tiny`` has uniform weights for heads)

An extractor's name is part of a metric's name (:func:`metric_name`). What is missing stops with the command that gets
it: random weights never take its place.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from defectlib import images, paths
from defectlib.metrics import tiny
from defectlib.metrics.files import available, locate, state_dict
from defectlib.types import check_image

__all__ = [
    "EXTRACTORS", "PERCEPTUAL", "Extractor", "Perceptual", "available", "check_images", "load", "load_perceptual",
    "lpips_trunk", "metric_name",
]  # fmt: skip

EXTRACTORS = ("tiny", "inception")
PERCEPTUAL = ("tiny", "alex", "vgg")
MEMORY_LIMIT = 2 * 2**30


def metric_name(extractor: str, metric: str) -> str:
    """An extractor's name before a metric's: ``metric_name("tiny", "kid") == "tiny-kid"``."""
    return f"{extractor}-{metric}"


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, eq=False)
class Extractor:
    """Features for KID and class logits for IS; call it with images for the features alone.

    ``module`` maps uint8 (N, 3, H, W) to the tuple (features, logits), as torch-fidelity's extractors do; ``resize``
    says in words what it does to the size of its input.
    """

    name: str
    module: nn.Module
    resize: str
    weights_sha256: str

    def __call__(self, pictures: Sequence[Tensor], batch_size: int = 32) -> Tensor:
        """Features, float32 (N, D) on the CPU, of images (3, H, W) in [-1, 1]."""
        return self.both(pictures, batch_size)[0]

    @torch.no_grad()
    def both(self, pictures: Sequence[Tensor], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """Features (N, D) and class logits (N, C), from one forward pass an image."""
        check_images(pictures)
        where = next(self.module.parameters()).device
        if self.name == "tiny":
            pictures = [images.resize_image(picture, tiny.SIZE) for picture in pictures]
        _one_size(pictures, self.name)
        # Through 8 bits, as files would be: torch-fidelity takes nothing else.
        pixels = [torch.from_numpy(images.to_uint8(picture)).permute(2, 0, 1) for picture in pictures]
        parts = [
            self.module(torch.stack(pixels[i : i + batch_size]).to(where)) for i in range(0, len(pixels), batch_size)
        ]
        features, logits = (torch.cat(part).float().cpu() for part in zip(*parts))
        return features, logits


def check_images(pictures: Sequence[Tensor]) -> None:
    """Raise ValueError unless there is at least one image and all are float32 (3, H, W) in [-1, 1]."""
    if not len(pictures):
        raise ValueError("there are no images to measure")
    for i, picture in enumerate(pictures):
        check_image(picture, f"image {i}")


def _one_size(pictures: Sequence[Tensor], name: str) -> None:
    sizes = sorted({tuple(picture.shape[1:]) for picture in pictures})
    if len(sizes) > 1:
        raise ValueError(
            f"'{name}' needs images of one size, got {', '.join(f'{h}x{w}' for h, w in sizes)}: resize them first"
        )


@functools.lru_cache(maxsize=2)
def load(name: str) -> Extractor:
    """The extractor ``tiny`` or ``inception``, on the GPU where there is one.

    Raises:
        FileNotFoundError: Its weights are not here; the sentence holds the command that gets them.
        ValueError: There is no such extractor, or its weights are damaged.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"there is no extractor '{name}'; there are: {', '.join(EXTRACTORS)}")
    if name == "inception":
        path, digest = locate(name)
        state_dict(path)  # torch-fidelity unpickles this file; nothing but tensors may be in it
        layers, registered, options = (
            ["2048", "logits_unbiased"],
            "inception-v3-compat",
            {"feature_extractor_weights_path": str(path)},
        )
        resize = "bilinear to 299 px as in TensorFlow 1 (torch-fidelity)"
    else:
        tiny.load()
        digest = paths.sha256(tiny.WEIGHTS)
        from defectlib.metrics import fidelity

        layers, registered, options = ["features", "logits"], fidelity.NAME, {}
        resize = f"{images.IMAGE_FILTER} to {tiny.SIZE} px"
    from torch_fidelity.utils import create_feature_extractor

    module = create_feature_extractor(registered, layers, cuda=_device().type == "cuda", verbose=False, **options)
    return Extractor(name, module, resize, digest[:16])


@dataclass(frozen=True, eq=False)
class Perceptual:
    """LPIPS by embedding: the squared Euclidean distance between two embeddings is the LPIPS distance.

    LPIPS is a sum over layers of the spatial mean of weighted squared differences of unit-normalised features (Zhang et
    al., 2018, Eq. 1). With weights w >= 0 each feature times sqrt(w / (H W)) puts the whole sum into one squared norm,
    so that an image is passed through the network once and every pair costs a subtraction.

    ``trunk`` maps float32 (N, 3, H, W) in [-1, 1] to feature maps; ``heads`` are the weights of each layer's channels,
    None for 1; ``size`` is the side its input must have, None for any.
    """

    name: str
    trunk: Callable[[Tensor], Sequence[Tensor]]
    heads: Sequence[Tensor] | None
    weights_sha256: str
    size: int | None = None
    device: torch.device = torch.device("cpu")

    def __post_init__(self):
        if self.heads is not None and any((head < 0).any() for head in self.heads):
            raise ValueError(f"a head of '{self.name}' has a negative weight: its distance is not a squared norm")

    @torch.no_grad()
    def embed(self, pictures: Sequence[Tensor], size: int | None = None, batch_size: int = 16) -> Tensor:
        """Embeddings float32 (N, D) on the CPU; above ``MEMORY_LIMIT`` bytes they lie in a temporary file.

        Args:
            pictures: Images (3, H, W) in [-1, 1].
            size: Side they are resized to first, by the rule in ``images``; default ``self.size``, else as they are.
            batch_size: Images a forward pass.
        """
        check_images(pictures)
        size = self.size or size
        if size is not None:
            pictures = [images.resize_image(picture, size) for picture in pictures]
        _one_size(pictures, self.name)
        # Through 8 bits where no resize did that already.
        pictures = [images.from_uint8(images.to_uint8(picture)) for picture in pictures]
        found = None
        for start in range(0, len(pictures), batch_size):
            part = self._flat(self.trunk(torch.stack(pictures[start : start + batch_size]).to(self.device)))
            found = _room(len(pictures), part.shape[1]) if found is None else found
            found[start : start + len(part)] = part
        return found

    def _flat(self, maps: Sequence[Tensor]) -> Tensor:
        from lpips import normalize_tensor

        parts = []
        for level, features in enumerate(maps):
            scale = torch.ones(1) if self.heads is None else self.heads[level].reshape(1, -1, 1, 1)
            scale = (scale / prod(features.shape[2:])).sqrt().to(features)
            parts.append((normalize_tensor(features) * scale).flatten(1).cpu())
        return torch.cat(parts, dim=1)


def _room(n: int, width: int) -> Tensor:
    """An uninitialised float32 (n, width), in memory or, where that is large, in a file that goes with the tensor."""
    if 4 * n * width <= MEMORY_LIMIT:
        return torch.empty(n, width)
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(4 * n * width)
        return torch.from_file(file.name, shared=True, size=n * width).view(n, width)


def lpips_trunk(model: nn.Module, name: str, weights_sha256: str, device: torch.device | None = None) -> Perceptual:
    """An ``lpips.LPIPS`` as a :class:`Perceptual`: its scaling layer, its trunk, and its heads where it has them."""
    device = device or torch.device("cpu")
    model = model.eval().requires_grad_(False).to(device)
    heads = [head.model[-1].weight.detach().cpu() for head in model.lins] if model.lpips else None
    return Perceptual(name, lambda x: model.net(model.scaling_layer(x)), heads, weights_sha256, device=device)


@functools.lru_cache(maxsize=3)
def load_perceptual(name: str) -> Perceptual:
    """The perceptual trunk ``tiny``, ``alex`` or ``vgg``, on the GPU where there is one.

    Raises:
        FileNotFoundError: Its weights are not here; the sentence holds the command that gets them.
        ValueError: There is no such trunk, or its weights are damaged.
    """
    if name not in PERCEPTUAL:
        raise ValueError(f"there is no perceptual trunk '{name}'; there are: {', '.join(PERCEPTUAL)}")
    if name == "tiny":
        where = _device()
        net = copy.deepcopy(tiny.load()).to(where)
        digest = paths.sha256(tiny.WEIGHTS)
        return Perceptual("tiny", net.maps, None, digest[:16], tiny.SIZE, where)
    path, digest = locate(name)
    import lpips

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips 0.1.4 names torchvision's old arguments
        model = lpips.LPIPS(net=name, pnet_rand=True, verbose=False)
    state = state_dict(path)
    # lpips cuts torchvision's `features` into slices and keeps their numbers: slice2.3.weight is features.3.weight.
    names = {key: "features." + key.split(".", 1)[1] for key in model.net.state_dict()}
    model.net.load_state_dict({key: state[source] for key, source in names.items()}, strict=True)
    return lpips_trunk(model, name, digest[:16], _device())
