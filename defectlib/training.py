"""ONE fit loop: seeded batches, cosine or constant rate, EMA, checkpoints, and a resume that is exact.

What a step draws (its items, its noise) comes from a generator seeded by (seed, step), so a run that was killed and
goes on from a checkpoint ends with the weights of an undisturbed one: bit for bit on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from defectlib import paths
from defectlib.profiles import Strict

Loss = Callable[[Tensor, torch.Generator], Tensor]
Curve = list[tuple[int, float]]
State = dict[str, Tensor]
ENDED = "ended"
"""The folder in which a method keeps, by :func:`once`, what it has trained, until all of it is saved."""


class FitSettings(Strict):
    """How a model is trained; the optimiser is AdamW with torch's betas.

    Attributes:
        steps: Optimiser steps.
        batch_size: Items a step.
        learning_rate: Peak rate.
        schedule: After ``warmup`` steps of linear rise, constant or a cosine to zero.
        weight_decay: AdamW's.
        max_grad_norm: Gradients are clipped to this norm; None leaves them.
        precision: "no" is float32; "bf16" runs the model under autocast, the weights staying float32.
        ema: Decay of the exponential moving average that replaces the weights at the end; None for none.
        save_every: Steps between checkpoints; None is a quarter of ``steps``, and 500 at most.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.01, ge=0)
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    precision: Literal["no", "bf16"] = "no"
    ema: float | None = Field(default=None, gt=0, lt=1)
    save_every: int | None = Field(default=None, ge=1)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of one step: a stream of its own for every (seed, step), but for chance."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1))


def batch_indices(n_items: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The items (batch_size,) of a step: a window of seeded permutations laid end to end, so all are seen equally."""
    start = step * batch_size
    epochs = range(start // n_items, (start + batch_size - 1) // n_items + 1)
    order = torch.cat([torch.from_numpy(np.random.default_rng([seed, 7, e]).permutation(n_items)) for e in epochs])
    return order[start - epochs[0] * n_items :][:batch_size]


def fit(
    model: nn.Module,
    loss: Loss,
    n_items: int,
    settings: FitSettings,
    *,
    seed: int,
    folder: Path,
    progress: Callable[[int, float], None] | None = None,
    factors: Sequence[float] | None = None,
    decays: Sequence[float | None] | None = None,
) -> Curve:
    """Train the parameters of ``model`` that require gradients, in place; go on from ``folder`` where a run stopped.

    Args:
        model: Any module; its weights at the end are the EMA's where ``settings.ema`` is set.
        loss: (items (B,), generator) -> scalar; runs the model itself, on the model's device.
        n_items: How many items there are to draw batches from.
        settings: See :class:`FitSettings`.
        seed: Of the batches and of the generators that ``loss`` is given.
        folder: Where checkpoints go; the caller removes it once the weights are kept, see :func:`once`.
        progress: Called with (step, mean loss since the last call) about a hundred times.
        factors: Of the learning rate, one a trained parameter; None: all 1.
        decays: Weight decay, one a trained parameter; None, also for one of them: that of the settings.

    Returns:
        The curve: (step, mean loss since the last point).

    Raises:
        ValueError: A checkpoint cannot be read, or is of another model or other settings.
        FloatingPointError: The loss is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device = trained[0].device
    accelerator = Accelerator(device_placement=False)  # one for the process: it must not choose the device
    # One kernel for all parameters: 0.3 s a step instead of 1.5 s on a CPU for half of Stable Diffusion's ControlNet.
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    n = len(trained)
    for parameter, factor, decay in zip(trained, factors or [1.0] * n, decays or [None] * n, strict=True):
        alike.setdefault((factor, settings.weight_decay if decay is None else decay), []).append(parameter)
    groups = [
        {"params": own, "lr": factor * settings.learning_rate, "weight_decay": decay}
        for (factor, decay), own in alike.items()
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    schedule = get_scheduler(
        "cosine" if settings.schedule == "cosine" else "constant_with_warmup",
        optimiser, num_warmup_steps=settings.warmup, num_training_steps=settings.steps,
    )  # fmt: skip
    accelerator.prepare(model, optimiser, schedule)
    ema = EMAModel(trained, decay=settings.ema) if settings.ema else None
    if ema:
        accelerator.register_for_checkpointing(ema)
    stamp = {"settings": settings.model_dump(), "seed": seed, "n_items": n_items}
    done, curve, window = _resume(accelerator, folder, stamp)
    if ema:
        ema.to(device)  # accelerate reads it back to the CPU
    model.train()
    report_every, save_every = max(1, settings.steps // 100), settings.save_every or min(500, -(-settings.steps // 4))
    for step in range(done, settings.steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            value = loss(batch_indices(n_items, settings.batch_size, seed, step), step_generator(seed, step))
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        if settings.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)
        optimiser.step()
        schedule.step()
        if ema:
            ema.step(trained)
        window.append(value.item())
        if not np.isfinite(window[-1]):
            raise FloatingPointError(f"the loss is {window[-1]} at step {step}: lower learning_rate")
        if (step + 1) % report_every == 0 or step + 1 == settings.steps:
            curve.append((step + 1, float(np.mean(window))))
            window = []
            if progress:
                progress(*curve[-1])
        if (step + 1) % save_every == 0 and step + 1 < settings.steps:
            _save(accelerator, folder, step + 1, stamp | {"curve": curve, "window": window})
    if ema:
        ema.copy_to(trained)
    model.eval()
    return curve


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 over the values of tensors on the CPU: what a training was given, for :func:`once`."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy())
    return found.hexdigest()


def once(file: Path, asked: list, train: Callable[[Path], tuple[State, Curve]]) -> tuple[State, Curve]:
    """What ``train`` returns, kept in ``file``, so that a run that is killed later does not train it anew.

    Args:
        file: A safetensors file; removing it is the caller's part.
        asked: What the training depends on, as JSON values: a file of another training is not taken.
        train: Called with a folder for its checkpoints, another one for what else is asked, which goes when the file is
            written; returns named weights and the loss curve.

    Raises:
        ValueError: The file cannot be read.
    """
    if (curve := kept_curve(file, asked)) is not None:
        return safetensors.torch.load_file(file), curve
    name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    checkpoints = file.with_name(f"{file.stem}-{name}")
    state, curve = train(checkpoints)
    described = {"fit": json.dumps({"asked": asked, "curve": curve})}
    paths.write_bytes(file, safetensors.torch.save(state, metadata=described))
    paths.remove(checkpoints)
    return state, curve


def kept_curve(file: Path, asked: list) -> Curve | None:
    """The loss curve of what :func:`once` keeps in ``file``; None where it holds nothing, or another training."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as kept:  # compares the header with the file's length
            known = json.loads(kept.metadata()["fit"])
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: delete it to train anew") from error
    same = known["asked"] == json.loads(json.dumps(asked))
    return [tuple(point) for point in known["curve"]] if same else None


def _checkpoints(folder: Path) -> Iterator[Path]:
    """Complete checkpoints, the newest first."""
    yield from sorted((p for p in folder.glob("step-*") if p.is_dir()), reverse=True)


def _save(accelerator: Accelerator, folder: Path, step: int, state: dict) -> None:
    """Write a checkpoint beside the last one, rename it into place, then drop the older ones."""
    partial = folder / ".part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    accelerator.save_state(str(partial))
    # A step's randomness comes from its own generator; what accelerate keeps would move the caller's.
    for states in partial.glob("random_states_*.pkl"):
        states.unlink()
    (partial / "fit.json").write_text(json.dumps(state))
    os.replace(partial, folder / f"step-{step:07d}")
    for old in list(_checkpoints(folder))[1:]:
        shutil.rmtree(old)


def _resume(accelerator: Accelerator, folder: Path, stamp: dict) -> tuple[int, Curve, list[float]]:
    """Load the newest checkpoint, if any: steps done, curve, losses since its last point."""
    newest = next(_checkpoints(folder), None)
    if newest is None:
        return 0, [], []
    try:
        state = json.loads((newest / "fit.json").read_text())
        if {k: state[k] for k in stamp} == stamp:
            accelerator.load_state(str(newest))
            return int(newest.name.removeprefix("step-")), [tuple(point) for point in state["curve"]], state["window"]
    except Exception as error:  # whatever a truncated file raises: zip, header, key, shape
        raise ValueError(f"checkpoint {newest} cannot be read: delete {folder} to train from the start") from error
    raise ValueError(f"checkpoint {newest} is of other settings: delete {folder} to train from the start")
