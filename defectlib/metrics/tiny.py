"""The small feature extractor: a convnet of 0.8 M parameters trained to name procedural textures.

Where no Inception or AlexNet weights can be had, KID, IS and a perceptual distance still need features. These see
orientation, scale, colour and defect-like marks on surfaces. Its numbers mean something among themselves only; they are
named after it (``tiny-kid``) and never share a column with Inception's.

The recipe, which makes the shipped file anew::

    python -m defectlib.metrics.tiny --steps 1000 --seed 0 --out tiny.safetensors
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from defectlib import images, paths
from defectlib.data import textures

WEIGHTS = Path(__file__).parent / "weights" / "tiny.safetensors"
SIZE = textures.SIZE
WIDTHS = (32, 48, 96, 160, 192)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class TinyNet(nn.Module):
    """Five stages, each half the size of the one before; float32 (N, 3, 64, 64) in [-1, 1].

    ``widths`` are the channels of the stages; the last one's spatial mean is the feature vector.
    """

    def __init__(self, n_classes: int = len(textures.CLASSES), widths: Sequence[int] = WIDTHS):
        super().__init__()
        a, b, c, d, e = widths
        self.stages = nn.ModuleList([
            _conv(3, a), _conv(a, b, 2), nn.Sequential(_conv(b, c, 2), _conv(c, c)),
            nn.Sequential(_conv(c, d, 2), _conv(d, d)), _conv(d, e, 2),
        ])  # fmt: skip
        self.head = nn.Linear(e, n_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        """The output of every stage: (N, C, H, W), H from 64 down to 4."""
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def features_and_logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spatial means of the last stage (N, 192) and class logits (N, 32)."""
        features = self.maps(x)[-1].mean((2, 3))
        return features, self.head(features)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (N, 32)."""
        return self.features_and_logits(x)[1]


@functools.lru_cache(maxsize=2)
def load(path: Path = WEIGHTS) -> TinyNet:
    """The trained network on the CPU, in evaluation mode; the file holds float16, the network float32.

    Raises:
        FileNotFoundError: The file is missing; the sentence names the recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: run `git checkout -- {path.name}` in its folder, or train it anew by "
            f"`python -m defectlib.metrics.tiny --steps 1000 --seed 0 --out {path}`"
        )
    state = {name: value.float() for name, value in safetensors.torch.load_file(path).items()}
    model = TinyNet()
    missing = model.load_state_dict(state, strict=False)
    wrong = [*missing.unexpected_keys, *(k for k in missing.missing_keys if not k.endswith("num_batches_tracked"))]
    if wrong:
        raise ValueError(f"{path} is not a file of this network ({', '.join(wrong)}): restore it from git")
    return model.eval().requires_grad_(False)


def prepare(pictures: Sequence[Tensor]) -> Tensor:
    """Images of any size, float32 (3, H, W) in [-1, 1], to one batch (N, 3, 64, 64) by the rule in ``images``."""
    return torch.stack([images.resize_image(picture, SIZE) for picture in pictures])


def save(model: TinyNet, path: Path) -> None:
    """Write the weights as float16 safetensors, by atomic rename."""
    state = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    paths.write_bytes(path, safetensors.torch.save(state, {"source": "python -m defectlib.metrics.tiny"}))


def train(steps: int, seed: int, batch_size: int = 64, rate: float = 2e-3, progress: bool = False) -> TinyNet:
    """Train on fresh textures at every step: AdamW, one-cycle rate, cross-entropy with label smoothing 0.05.

    Args:
        steps: Optimiser steps.
        seed: Of the initial weights and of the textures.
        batch_size: Textures a step.
        rate: Peak learning rate.
        progress: Print the running loss and accuracy.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = TinyNet().train().to(memory_format=torch.channels_last)  # a fifth faster on the CPU
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=min(0.2, 200 / steps))
    clock, running = time.perf_counter(), []
    for step in range(steps):
        x, y = textures.batch(batch_size, np.random.default_rng([seed, 0, step]))
        logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, y, label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        running.append((loss.item(), (logits.argmax(1) == y).float().mean().item()))
        if progress and (step + 1) % 50 == 0:
            mean_loss, mean_accuracy = np.mean(running[-50:], axis=0)
            took = time.perf_counter() - clock
            print(f"step {step + 1}: loss {mean_loss:.3f}, accuracy {mean_accuracy:.3f}, {took:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def accuracy(model: TinyNet, n: int, seed: int) -> dict[str, float]:
    """Shares of ``n`` held-out textures named rightly: the class, its surface alone, and marked or clean alone."""
    right = np.zeros(3)
    for start in range(0, n, 64):
        x, y = textures.batch(64, np.random.default_rng([seed, 1, start]))
        guess = model(x).argmax(1)
        right += [(guess == y).sum().item(), (guess // 2 == y // 2).sum().item(), (guess % 2 == y % 2).sum().item()]
    share = right / (64 * len(range(0, n, 64)))
    return dict(zip(("accuracy", "surface", "marked"), share.tolist()))


def main() -> None:
    """Train, save, and print accuracy on textures that were not trained on (from the saved float16 file)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = train(options.steps, options.seed, progress=True)
    save(model, options.out)
    scores = accuracy(load(options.out.resolve()), 2048, options.seed)
    print(", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
