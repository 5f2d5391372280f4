"""DefectSynth's Similarity-Based Feature Fusion (SFF): the samples of one group lend each other local features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SIMILARITIES = 2**22
"""Similarities held at once: 16 MB in float32."""


# DefectSynth, Equation 9.
def fuse(
    latents: Tensor,
    generator: torch.Generator,
    *,
    rate: float = 0.2,
    base_weight: float = 0.7,
    reference_weight: float | None = None,
    masks: Tensor | None = None,
    neighbours: Literal["sequential", "simultaneous"] = "sequential",
    similarity: Literal["dot", "cosine"] = "dot",
) -> Tensor:
    """f_fused = w_i f_select + sum_j w_j r_select^(j) at random positions of every sample of a group; sum w = 1.

    Sample by sample, ``rate * H * W`` positions are drawn; for each, every other sample gives the feature most similar
    to the base's, out of all its positions; the weighted mean takes the base's place. The paper leaves the weights and
    the rate open: they are the released code's, with what the base leaves shared equally, so that they sum to one (the
    released references have 0.3 each, which sums to 1.6 in a group of four). At the default size of its batch, two, the
    released code compares the base with itself, and nothing changes.

    The released form is ``neighbours="simultaneous"``, ``similarity="cosine"`` and ``reference_weight=0.3``, with
    ``masks``. Limiting it to the mask is not part of Equation 9. A dot product favours long vectors: the match of a
    feature in an equal sample need not be itself, and fusion pulls towards the extremes of the latents; by cosine,
    equal samples are left as they are.

    Args:
        latents: z_0 of one group, (B, C, H, W).
        generator: A CPU generator, seeded by the group. The draws depend on it, B and H * W alone.
        rate: Share of the positions to draw, in [0, 1].
        base_weight: w_i in [0, 1].
        reference_weight: w_j of each of the other B - 1 samples; None: they share equally what the base leaves.
        masks: Where a base sample may be written, bool (B, 1, H, W); None for everywhere. The draws are the same, and
            only those inside are matched.
        neighbours: "sequential", the paper's loop: sample i is matched against samples that are already fused where
            they come before it; "simultaneous": against the latents as they came.
        similarity: The paper's dot product, or cosine.

    Returns:
        The fused latents, (B, C, H, W), of the latents' type. A group of one is returned as it came: its weight is 1.

    Raises:
        ValueError: Shapes or the masks' type disagree, a share lies outside [0, 1], or an option is unknown.
    """
    if latents.ndim != 4:
        raise ValueError(f"latents must be (B, C, H, W), got {tuple(latents.shape)}")
    count, channels, height, width = latents.shape
    if masks is not None and (masks.dtype != torch.bool or masks.shape != (count, 1, height, width)):
        raise ValueError(f"masks must be bool {(count, 1, height, width)}, got {masks.dtype} {tuple(masks.shape)}")
    if not (0 <= rate <= 1 and 0 <= base_weight <= 1):
        raise ValueError(f"rate and base_weight must lie in [0, 1], got {rate} and {base_weight}")
    if neighbours not in ("sequential", "simultaneous") or similarity not in ("dot", "cosine"):
        raise ValueError(f"unknown neighbours {neighbours!r} or similarity {similarity!r}")
    if count == 1:
        return latents.clone()
    # Features as rows, (B, H * W, C): a match is then one row. A clone even where one channel needs no rearranging.
    fused = latents.float().flatten(2).transpose(1, 2).clone(memory_format=torch.contiguous_format)
    source = fused if neighbours == "sequential" else fused.clone()
    points = round(rate * height * width)
    for i in range(count):
        chosen = torch.randperm(height * width, generator=generator)[:points].to(latents.device)
        if masks is not None:
            chosen = chosen[masks[i].flatten()[chosen]]
        others = torch.cat([source[:i], source[i + 1 :]])
        matched = _best_match(fused[i, chosen], others, similarity)
        lent = (1 - base_weight) * matched.mean(0) if reference_weight is None else reference_weight * matched.sum(0)
        fused[i, chosen] = base_weight * fused[i, chosen] + lent
    return fused.transpose(1, 2).reshape(latents.shape).to(latents.dtype)


def _best_match(features: Tensor, others: Tensor, similarity: str) -> Tensor:
    """For each of ``features`` (n, C), the most similar row of each of ``others`` (m, HW, C): (m, n, C)."""
    # Only the candidates' length changes which of them is the best.
    candidates = F.normalize(others, dim=2) if similarity == "cosine" else others
    rows = max(1, SIMILARITIES // (others.shape[0] * others.shape[1]))
    best = [(chunk @ candidates.transpose(1, 2)).argmax(2) for chunk in features.split(rows)]
    index = torch.cat(best, 1)[..., None].expand(-1, -1, others.shape[2])
    return others.gather(1, index)
