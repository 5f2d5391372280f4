"""Models that learned from a run's shots alone, and what they say of samples.

The reader is the localiser of the row ``shots_only`` at its last step, the sorter its classifier. Neither looks at the
test set to judge a sample; where they fail on real, held-out defects too, what they say is withheld.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defectlib import downstream as models
from defectlib import paths, sampling
from defectlib.metrics import bootstrap, regions
from defectlib.profiles import TrainSettings
from defectlib.study import SHOTS_ONLY, Study
from defectlib.training import Curve, State, once

MASK_SEEN, CLASS_SEEN = "mask_seen", "class_seen"
# Below it the reader misses even most real defects, and what it says of drawn ones means nothing.
SEEN_LEAST = 0.2


def reader(s: Study, seed: int) -> nn.Module:
    """The localiser trained on the shots alone, as the row ``shots_only`` has it; trained once a run and kept."""
    settings = s.settings.downstream.localiser

    def train() -> tuple[nn.Module, list[float]]:
        pictures, masks = sampling.stack(s.shots(seed))
        return models.train_localiser(pictures, masks, torch.stack(s.normals(seed)), settings, seed)

    return _of_shots(s, seed, "reader", settings, train, models.build_localiser)


def sorter(s: Study, seed: int) -> nn.Module:
    """The classifier trained on the shots alone, as the row ``shots_only`` has it; trained once a run and kept."""
    settings, n = s.settings.downstream.classifier, len(s.defects)

    def train() -> tuple[nn.Module, list[float]]:
        shots = s.shots(seed)
        labels = torch.tensor([s.defects.index(shot.defect) for shot in shots])
        return models.train_classifier(torch.stack([shot.image for shot in shots]), labels, n, settings, seed)

    return _of_shots(s, seed, "sorter", settings, train, lambda blank: models.build_classifier(blank, n))


def _of_shots(
    s: Study,
    seed: int,
    name: str,
    settings: TrainSettings,
    train: Callable[[], tuple[nn.Module, list[float]]],
    build: Callable[[TrainSettings], nn.Module],
) -> nn.Module:
    """A downstream model of the shots, from its file where it is there."""

    def learned(_: Path) -> tuple[State, Curve]:
        model, losses = train()
        state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        return state, list(enumerate(losses, 1))

    file, asked = _kept(s, seed, name, settings)
    with paths.locked(file.with_name(f".{name}.lock")):  # jobs of many methods ask for one
        state, _ = once(file, asked, learned)
    with torch.device("meta"):  # initial weights would only be thrown away
        model = build(settings.model_copy(update={"pretrained": False}))
    model.load_state_dict(state, assign=True)
    return model.to(models.device()).eval()


def kept_reader(s: Study, seed: int) -> tuple[Path, list]:
    """The file in which :func:`reader` is kept, and what its training depends on."""
    return _kept(s, seed, "reader", s.settings.downstream.localiser)


def _kept(s: Study, seed: int, name: str, settings: TrainSettings) -> tuple[Path, list]:
    file = s.folder(SHOTS_ONLY, seed).path / f"{name}.safetensors"
    return file, [models.asked(settings), s.data_key(seed), seed]


def seen(s: Study, seed: int, images: Tensor, masks: Tensor) -> list[float]:
    """How far masks lie on what is seen there: their IoU with what :func:`reader` finds above 0.5, an image each.

    The reader knows real defects alone. An empty mask lies on nothing: 0, also where it finds nothing.

    Args:
        s: Of the category.
        seed: Of the run.
        images: float32 (N, 3, H, W) in [-1, 1].
        masks: bool (N, 1, H, W).
    """
    found = models.predict_maps(reader(s, seed), images) > 0.5
    values = [regions.mask_iou(a, b) for a, b in zip(found, masks[:, 0], strict=True)]
    return [value or 0.0 for value in values]


def sees(s: Study, seed: int, defect: str, held_out: list) -> tuple[int, float | None]:
    """How many real images of a defect are held out, and how far the reader's finds lie on their masks (mean IoU)."""
    real = [(image, mask) for image, mask, name, _ in held_out if name == defect]
    return len(real), float(np.mean(seen(s, seed, *map(torch.stack, zip(*real))))) if real else None


def mask_seen(s: Study, seed: int, defect: str, held_out: list, images: Tensor, masks: Tensor) -> dict[str, Any]:
    """Value and protocol of ``mask_seen``; withheld where the reader does not see real, held-out defects either."""
    n_real, known = sees(s, seed, defect, held_out)
    told = {
        "n_generated": len(images), "n_real": n_real, "reader": "the localiser of the shots, above 0.5",
        "on_real": known,
    }  # fmt: skip
    if known is not None and known < SEEN_LEAST:
        why = f"on real, held-out defects what the localiser finds overlaps the mask with an IoU of {known:.2f} only"
        return {"value": None, "protocol": told | {"why_withheld": why}}
    values = np.array(seen(s, seed, images, masks))
    value, n = float(values.mean()), len(values)
    drawn = bootstrap.mean(values, bootstrap.counts(n, 0))
    return {"value": value, "protocol": told | bootstrap.told(n, lambda: bootstrap.interval(value, drawn))}


def class_seen(s: Study, seed: int, defect: str, held_out: list, images: Tensor) -> dict[str, Any]:
    """Value and protocol of ``class_seen``; withheld where the sorter does not know real, held-out defects either.

    ``on_others`` is the share of other real defects that it takes for this one: where high, the value says little.
    """
    if len(s.defects) < 2:
        return {"value": None, "protocol": {"why_withheld": "one defect type: there is nothing to tell apart"}}
    model, label = sorter(s, seed), s.defects.index(defect)
    real = [image for image, _, name, _ in held_out if name == defect]
    others = [image for image, _, name, _ in held_out if name not in (defect, "good")]
    known, wrong = (
        _taken_for(model, torch.stack(some)).eq(label).float().mean().item() if some else None
        for some in (real, others)
    )
    taken = _taken_for(model, images)
    told = {
        "n_generated": len(images), "n_real": len(real), "sorter": "the classifier of the shots", "on_real": known,
        "on_others": wrong,
        "seen_as": {name: int(taken.eq(i).sum()) for i, name in enumerate(s.defects)},
    }  # fmt: skip
    if known is not None and known <= 1 / len(s.defects):
        why = f"the classifier knows {known:.0%} of the real, held-out ones, which is no better than chance"
        return {"value": None, "protocol": told | {"why_withheld": why}}
    rightly, n = taken.eq(label).double(), len(taken)
    value = rightly.mean().item()
    drawn = bootstrap.mean(rightly, bootstrap.counts(n, 0))
    return {"value": value, "protocol": told | bootstrap.told(n, lambda: bootstrap.of_share(value, n, drawn))}


def _taken_for(model: nn.Module, images: Tensor) -> Tensor:
    return models.predict_classes(model, images).argmax(1)
