"""DualAnoDiff's two branches against the plain UNet at as many rows, and against branches run one after the other.

    python benchmarks/branch_interaction.py

The base model that ships, four pairs with SAIM (eight rows), float32 on one thread; times are CPU seconds, in turn. The
last line is JSON; ``ratio`` is a sampling step of ours over one of the plain UNet (medians), ``training`` that of a
training step, whose plain form trains a LoRA of the same rank on the UNet. ``in_turn_s`` is a sampling step of the form
that sends the branches through each attention layer one after the other and has SAIM by general attention over pairs,
and under ``training`` a training step of it; ``max_abs_diff`` is the check against it. Where there is a GPU, ``gpu``
has the same at Stable Diffusion 1.5's size with random weights and 64 x 64 latents, in seconds of the clock, and the
peak memory of a training step.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from training_step import stable_diffusion

from defectlib import backbone
from defectlib.backbone import Backbone
from defectlib.branches import BRANCHES, BranchProcessor, BranchUNet
from defectlib.branches.routing import PROJECTIONS, Route

PAIRS, RANK = 4, 32


class TurnRoute(Route):
    """All rows take the LoRA of the branch whose turn it is."""

    turn = ""

    def __call__(self, layer: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        self.calls += 1
        return arguments, named | {"adapter_names": [self.turn] * len(arguments[0])}


class InTurn(BranchProcessor):
    """An attention processor: one branch after the other, then SAIM as attention over the two rows of a pair."""

    def __init__(self, route: TurnRoute, processor: BranchProcessor) -> None:
        super().__init__(processor.interaction, None)
        self.route = route

    def forward(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_
    ) -> Tensor:
        """(2 N, L, C) to the same."""
        texts = [None, None] if encoder_hidden_states is None else encoder_hidden_states.chunk(2)
        outputs = []
        for name, rows, text in zip(BRANCHES, hidden_states.chunk(2), texts, strict=True):
            self.route.turn = name
            outputs.append(AttnProcessor2_0()(attn, rows, text))
        pairs, saim = torch.stack(outputs, 2), self.interaction  # (N, L, 2, C)
        entered = saim.proj_in(saim.norm(pairs))
        mixed = F.scaled_dot_product_attention(saim.query(entered), saim.key(entered), saim.value(entered))
        return torch.cat(list((pairs + saim.proj_out(mixed)).unbind(2)))


def trained(branches: BranchUNet) -> BranchUNet:
    """Nothing at zero, as after training: else half of the check would see nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in branches.parameters():
            if value.requires_grad:
                value.copy_((0.05 * torch.randn(value.shape, generator=generator)).to(value.device))
    return branches


def in_turn(branches: BranchUNet, base: Backbone) -> BranchUNet:
    """The reference form with the weights of ``branches``."""
    other = BranchUNet(base.unet, RANK, 0)
    other.load_state_dict(branches.state_dict())
    other.route = route = TurnRoute()
    for layer in other.unet.modules():
        if isinstance(layer, LoraLayer):
            layer._forward_pre_hooks.clear()
            layer._forward_pre_hooks_with_kwargs.clear()
            layer._forward_hooks.clear()
            layer.register_forward_pre_hook(route, with_kwargs=True)
    layers = {name: m for name, m in other.unet.named_modules() if isinstance(m, Attention)}
    processors = {f"{name}.processor": InTurn(route, layer.processor) for name, layer in layers.items()}
    other.unet.set_attn_processor(processors)
    return other.eval()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def medians(steps: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = clock(device)
            step()
            times[name].append(clock(device) - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def measure(base: Backbone, size: int, rounds: int) -> dict:
    """Both steps of the three forms."""
    device, generator = base.device, torch.Generator().manual_seed(1)
    shape = base.latent_shape(size)
    noisy, target = (torch.randn(2 * PAIRS, *shape, generator=generator).to(device) for _ in range(2))
    text = base.embed(["a vfx with sks"] * PAIRS + ["sks"] * PAIRS)
    step = torch.tensor(500, device=device)
    branches = trained(BranchUNet(base.unet, RANK, 0)).eval()

    def training(model: nn.Module, predict: Callable[[], Tensor]) -> Callable[[], None]:
        weights = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(weights, lr=1e-5, fused=True)

        def run() -> None:
            optimiser.zero_grad(set_to_none=True)
            (predict().float() - target).square().mean().backward()
            optimiser.step()

        return run

    found = {}
    ours = training(branches, lambda: branches(noisy, step, text))
    ours()
    if device.type == "cuda":  # of the branches and the base model beside them, before the other forms are made
        found["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    slow = in_turn(branches, base)
    with torch.no_grad():
        difference = (branches(noisy, step, text) - slow(noisy, step, text)).abs().max().item()
        branches.fold()
        folded = (branches(noisy, step, text) - slow(noisy, step, text)).abs().max().item()
        drawing = medians({
            "ours": lambda: branches(noisy, step, text), "reference": lambda: base.unet(noisy, step, text).sample,
            "in_turn": lambda: slow(noisy, step, text),
        }, device, rounds)  # fmt: skip
    branches.unfold()
    plain = copy.deepcopy(base.unet)
    plain.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PROJECTIONS))
    reference = training(plain, lambda: plain(noisy, step, text).sample)
    fitting = medians({
        "ours": ours, "reference": reference, "in_turn": training(slow, lambda: slow(noisy, step, text)),
    }, device, rounds)  # fmt: skip
    found |= {f"{name}_s": round(seconds, 4) for name, seconds in drawing.items()}
    found |= {"ratio": round(drawing["ours"] / drawing["reference"], 4), "max_abs_diff": max(difference, folded)}
    found["training"] = {f"{name}_s": round(seconds, 4) for name, seconds in fitting.items()} | {
        "ratio": round(fitting["ours"] / fitting["reference"], 4)
    }
    return found


def main() -> None:
    """The small base on the CPU; Stable Diffusion's size where there is a GPU."""
    torch.set_num_threads(1)
    found = {"name": "branch_interaction", "pairs": PAIRS, **measure(backbone.load("tiny", device="cpu"), 64, 9)}
    if torch.cuda.is_available():
        found["gpu"] = measure(stable_diffusion(device="cuda"), 512, 9)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
