"""What symmetry-aware models learned, as numbers to show: how alike their classes are, and where their parts went.

Each function looks at one fitted method, so that a notebook need not hold several models at a time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from defectlib.branches import Dual
from defectlib.branches.classes import coefficient_map, scaled_layers
from defectlib.branches.gates import KINDS
from defectlib.methods.symmetry_aware import SymmetryAware
from defectlib.training import State

LEARNED = {
    "coefficients": r"\.departure$", "vectors of VeRA": r"\.vectors$", "LoRA, A": r"\.lora_A\..*weight$",
    "LoRA, B": r"\.lora_B\..*weight$",
}  # fmt: skip
TAU = torch.linspace(0, 1, 21)
STAYED = 0.01
"""What moved by less, at most, has stayed where it was."""


def _dual(method: SymmetryAware) -> Dual:
    return method.dual(next(iter(method.areas)))


def similarity(method: SymmetryAware) -> np.ndarray:
    """Cosines of the departures d_c of all pairs of classes over all layers, (K, K)."""
    rows = torch.nn.functional.normalize(coefficient_map(scaled_layers(_dual(method))), dim=1)
    return (rows @ rows.T).numpy()


def gates(method: SymmetryAware, seed: int) -> pd.DataFrame:
    """Every gate over tau, and as it was at the start: columns kind, block, layer, tau, gate, start.

    Gates on the background are told of the layers that one is injected into: elsewhere they act on nothing.

    Args:
        method: Without gates the table is empty.
        seed: Of the fit.
    """
    branches = _dual(method).branches
    learned, before, injected = branches.gates(), method.untrained(seed).branches.gates(), branches.injected()
    rows = [
        (kind, _block(layer), layer, *values)
        for layer in learned
        for kind, *both in zip(KINDS, _values(learned[layer]), _values(before[layer]), strict=True)
        if kind != "background" or layer in injected
        for values in zip(TAU.tolist(), *both, strict=True)
    ]
    return pd.DataFrame(rows, columns=["kind", "block", "layer", "tau", "gate", "start"])


def leaning(curves: pd.DataFrame) -> pd.DataFrame:
    """Of how many layers the gates are higher at the noisy end, or lower: columns kind, higher, lower, layers.

    Args:
        curves: As :func:`gates` gives them. A gate whose ends differ by less than :data:`STAYED` leans to neither.
    """
    ends = curves.groupby(["kind", "layer"], sort=False)["gate"].agg(["first", "last"])
    rise = ends["last"] - ends["first"]
    counted = pd.DataFrame({"higher": rise.gt(STAYED), "lower": rise.lt(-STAYED), "layers": True})
    return counted.groupby(level="kind", sort=False).sum().reset_index()


def taken_for(records: Sequence[dict[str, Any]], defects: Sequence[str]) -> np.ndarray:
    """What a classifier of the shots takes samples for: counts (C, C), rows what was asked for, over all records.

    Args:
        records: Of the quality stage, with ``class_seen``.
        defects: The C classes in order.
    """
    counts = np.zeros((len(defects),) * 2, int)
    for row in (row for record in records for row in record["metrics"] if "seen_as" in row["protocol"]):
        counts[defects.index(row["defect"])] += [row["protocol"]["seen_as"][name] for name in defects]
    return counts


def _block(layer: str) -> str:
    """A layer's block in words: "down_blocks.1.attentions…" is "down 1"."""
    part, number = re.match(r"(\w+?)_block\w*\.(\w+)", layer).groups()
    return "middle" if part == "mid" else f"{part} {number}"


@torch.no_grad()
def _values(gate: torch.nn.Module) -> list[list[float]]:
    return gate(TAU.to(next(gate.parameters(), TAU).device)).tolist()


def moved(method: SymmetryAware, seed: int) -> pd.DataFrame:
    """How far what is learned lies from its start: columns part, start, moved, most.

    ``start`` and ``moved`` are root mean squares, ``most`` is the largest change. Coefficients and
    weights are told as they are, gates by their values over tau.

    Args:
        method: Fitted.
        seed: Of the fit.
    """
    learned, before = _dual(method).trained_state(), method.untrained(seed).trained_state()
    pairs = [(part, *(_of_part(state, name) for state in (before, learned))) for part, name in LEARNED.items()]
    for kind, own in gates(method, seed).groupby("kind", sort=False):
        pairs.append((f"{kind} gate", *(torch.tensor(own[name].to_numpy()) for name in ("start", "gate"))))
    rows = [
        (part, *(x.square().mean().sqrt().item() for x in (start, end - start)), (end - start).abs().max().item())
        for part, start, end in pairs if len(start)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["part", "start", "moved", "most"])


def _of_part(state: State, named: str) -> Tensor:
    """All numbers of the UNet's adapters with such names, in one row."""
    own = (v.flatten() for name, v in state.items() if name.startswith("branches.") and re.search(named, name))
    return torch.cat([torch.empty(0), *own])
