"""Downstream models: trained on samples (or on the shots alone), tested on held-out real images.

Protocols (DefectSynth, Section V): a ResNet-34 classifier of defects trained on the base set merged with samples, and a
U-Net localiser trained on samples alone. Unless a rule of ``SELECTIONS`` says otherwise the last step is the model: no
checkpoint is chosen by looking at the test set. Batch-norm statistics are then computed anew over the training images
(torch's ``update_bn``): after the few steps of the small profiles the running averages still describe the first ones.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defectlib.metrics import files
from defectlib.profiles import TrainSettings

SELECTIONS = {
    "last": "batch-norm statistics recomputed",
    "val_generated": "best of the checkpoints on a tenth of the training items of each defect, held back from training",
    "test_oracle": "best of the checkpoints on the test set itself, which is then no test",
}


@dataclass
class Checkpoints:
    """Checkpoints evenly along a training, each scored with batch-norm statistics of its own.

    Attributes:
        n: How many; the last is the end of the training. A training of fewer steps has one a step.
        score: Of a model in evaluation mode; more is better.
        scores: (step, score), filled by the training.
        best: The model of the best score, the earliest of equals.
    """

    n: int
    score: Callable[[nn.Module], float]
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: nn.Module | None = None

    def look(self, step: int, model: nn.Module) -> None:
        """Score a checkpoint, and keep it where none before it was as good."""
        value = self.score(model)
        if all(value > earlier for _, earlier in self.scores):
            self.best = model
        self.scores.append((step, value))


def held_back(defects: Sequence[str], seed: int) -> np.ndarray:
    """A seeded tenth of the items of each defect, at least one: bool (N,)."""
    rng, labels = np.random.default_rng([seed, 4]), np.asarray(defects)
    chosen = np.zeros(len(labels), dtype=bool)
    for defect in dict.fromkeys(defects):
        own = rng.permutation(np.flatnonzero(labels == defect))
        chosen[own[: max(1, round(len(own) / 10))]] = True
    return chosen


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Initial weights and dropout from ``seed``; the caller's random state is given back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def n_steps(settings: TrainSettings, n: int) -> int:
    """Optimiser steps: as given, or epochs over ``n`` images."""
    return settings.steps if settings.steps is not None else settings.epochs * ceil(n / settings.batch_size)


def asked(settings: TrainSettings) -> dict[str, Any]:
    """What a training depends on besides its data and its seed, for the keys of what is kept.

    ``statistics`` tells it from those whose batch-norm statistics weighed a small last batch as much as a full one.
    """
    return settings.model_dump() | {"statistics": "of equal batches"}


def batches(n: int, batch_size: int, steps: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """``steps`` index batches of exactly ``batch_size``, walking through shuffled passes over ``n`` images."""
    queue = np.empty(0, dtype=np.int64)
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = np.concatenate([queue, rng.permutation(n)])
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield batch


def flipped(tensors: Sequence[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Flip each image of a batch at random, the same way in all of ``tensors`` (N, C, H, W)."""
    horizontal, vertical = rng.random((2, len(tensors[0]))) < 0.5
    for dim, chosen in ((3, horizontal), (2, vertical)):
        pick = torch.from_numpy(chosen)[:, None, None, None]
        tensors = [torch.where(pick, t.flip(dim), t) for t in tensors]
    return list(tensors)


def _optimise(
    model: nn.Module,
    loss: Callable[[np.ndarray], Tensor],
    index: Iterator[np.ndarray],
    rate: float,
    images: Tensor,
    checkpoints: Checkpoints | None,
) -> tuple[nn.Module, list[float]]:
    """Adam with one cosine decay to zero; the model of the last step, and all losses."""
    index = list(index)
    optimiser = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, len(index)))
    due = {ceil(len(index) * k / checkpoints.n) for k in range(1, checkpoints.n + 1)} if checkpoints else set()
    model.train()
    curve, settled = [], None
    for step, batch in enumerate(index, 1):
        value = loss(batch)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        decay.step()
        curve.append(value.item())
        if step in due:
            with torch.random.fork_rng():  # to be looked at changes nothing in a training
                settled = _settled(copy.deepcopy(model), images)
                checkpoints.look(step, settled)
    return settled if settled is not None else _settled(model, images), curve  # the last checkpoint is the end


def batch_sizes(n: int, size: int = 16) -> list[int]:
    """Sizes, up to ``size``, of the batches whose statistics are averaged, of which each weighs the same.

    So they are as equal as can be: a single last image, weighing as much as 16, once cost a localiser 17 points of
    pixel AP.
    """
    parts = ceil(n / size)
    return [n // parts + (i < n % parts) for i in range(parts)]


def _settled(model: nn.Module, images: Tensor) -> nn.Module:
    """The model with the batch-norm statistics of ``images``, in evaluation mode."""
    mixed = torch.randperm(len(images))  # inside `seeded`: a sorted set would give lopsided batches
    sizes = batch_sizes(len(images))
    batches_of = (images[chunk] for chunk in mixed.split(sizes))
    torch.optim.swa_utils.update_bn(batches_of, model, device=next(model.parameters()).device)
    return model.eval()


def build_classifier(settings: TrainSettings, n_classes: int) -> nn.Module:
    """ResNet-34 of torchvision with a new head; ImageNet weights only where the profile asks for them."""
    from torchvision.models import resnet34

    model = resnet34()
    if settings.pretrained:
        model.load_state_dict(files.state_dict(files.locate("resnet34")[0]))
    model.fc = nn.Linear(model.fc.in_features, n_classes)
    return model


def train_classifier(
    images: Tensor,
    labels: Tensor,
    n_classes: int,
    settings: TrainSettings,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> tuple[nn.Module, list[float]]:
    """Train a defect classifier by cross-entropy with random flips.

    Args:
        images: float32 (N, 3, H, W) in [-1, 1].
        labels: int64 (N,).
        n_classes: Number of defects.
        settings: Length, batch size, rate.
        seed: Of the weights, the order and the flips.
        checkpoints: Scored on the way, which changes nothing in the training; they hold the best of them.
    """
    rng = np.random.default_rng([seed, 2])
    where = device()
    with seeded(seed):
        model = build_classifier(settings, n_classes).to(where)

        def loss(batch: np.ndarray) -> Tensor:
            (x,) = flipped([images[batch]], rng)
            return nn.functional.cross_entropy(model(x.to(where)), labels[batch].to(where))

        index = batches(len(images), settings.batch_size, n_steps(settings, len(images)), rng)
        return _optimise(model, loss, index, settings.learning_rate, images, checkpoints)


@torch.no_grad()
def predict_classes(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class probabilities (N, n_classes) on the CPU."""
    where = next(model.parameters()).device
    return torch.cat([model(chunk.to(where)).softmax(1).cpu() for chunk in images.split(batch_size)])


def build_localiser(settings: TrainSettings) -> nn.Module:
    """segmentation-models-pytorch's U-Net, from scratch, one logit a pixel.

    ``smp-unet-resnet18`` is small, for the small profiles. ``smp-unet-vgg13_bn`` is near DRAEM's discriminative U-Net
    of base 64, the papers' localiser: two 3 x 3 convolutions with batch norm and ReLU a level, 64, 128, 256, 512, 512
    and 512 wide, bilinear upsampling, and a decoder of 512, 256, 128, 64 and 64. Its 25.2 M parameters stand against
    DRAEM's 28.4 M (25,158,529 and 28,371,841, one output each), because two things differ, both in the decoder: no
    convolution lies between the upsampling and the skip, and the level of full resolution gets no skip.
    """
    import segmentation_models_pytorch as smp

    if settings.architecture == "smp-unet-resnet18":
        return smp.Unet("resnet18", encoder_weights=None, classes=1)
    widths = (512, 256, 128, 64, 64)
    return smp.Unet(
        "vgg13_bn", encoder_weights=None, decoder_channels=widths, decoder_interpolation="bilinear", classes=1
    )


def train_localiser(
    images: Tensor,
    masks: Tensor,
    normals: Tensor,
    settings: TrainSettings,
    seed: int,
    checkpoints: Checkpoints | None = None,
) -> tuple[nn.Module, list[float]]:
    """Train a localiser; half of each batch is normal images (the protocol of DRAEM and AnomalyDiffusion).

    The loss is focal (gamma 2), as in that protocol, plus Dice: focal loss alone leaves thin defects unlearnt within
    the few steps of the small profiles.

    Args:
        images: Defect images, float32 (N, 3, H, W) in [-1, 1].
        masks: Their masks, bool (N, 1, H, W).
        normals: Defect-free images, float32 (M, 3, H, W).
        settings: Length, batch size, rate.
        seed: Of the weights, the order and the flips.
        checkpoints: Scored on the way, which changes nothing in the training; they hold the best of them.
    """
    import segmentation_models_pytorch as smp

    focal = smp.losses.FocalLoss("binary", gamma=2.0)
    dice = smp.losses.DiceLoss("binary", from_logits=True)
    rng = np.random.default_rng([seed, 3])
    where = device()
    half = max(1, settings.batch_size // 2)
    nothing = torch.zeros(half, 1, *images.shape[2:], dtype=torch.bool)
    with seeded(seed):
        model = build_localiser(settings).to(where)

        def loss(batch: np.ndarray) -> Tensor:
            good = normals[rng.integers(len(normals), size=half)]
            x = torch.cat([images[batch], good])
            y = torch.cat([masks[batch], nothing])
            x, y = flipped([x, y], rng)
            logits, target = model(x.to(where)), y.to(where).float()
            return focal(logits, target) + dice(logits, target)

        index = batches(len(images), half, n_steps(settings, len(images)), rng)
        return _optimise(model, loss, index, settings.learning_rate, torch.cat([images, normals]), checkpoints)


@torch.no_grad()
def predict_maps(model: nn.Module, images: Tensor, batch_size: int = 16) -> Tensor:
    """Defect probability maps (N, H, W) in [0, 1] on the CPU."""
    where = next(model.parameters()).device
    return torch.cat([model(chunk.to(where)).sigmoid()[:, 0].cpu() for chunk in images.split(batch_size)])
