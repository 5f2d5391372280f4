"""DefectSynth's Selective Attention Enhancement (SAE): weights from latents, and cross-attention scaled by them.

The weights multiply whole rows of the attention matrix, so w * (A V) = (w * A) V: they scale the rows of the output of
fused attention, and no (queries x keys) matrix is ever formed. The released code forms it, at +50 % time an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


# DefectSynth, Equation 7.
def selective_weights(
    reference: Tensor,
    latents: Tensor,
    mask: Tensor,
    *,
    softmax_over: Literal["mask", "image"] = "mask",
    cap: float | None = None,
    form: Literal["paper", "released"] = "paper",
) -> Tensor:
    """The weights w = ||M||_1 softmax(mean_c (M (z_r' - z_t))^2) + 1: most where the drawn defect differs most.

    The paper prints the softmax over all pixels ("image"): then w exceeds 1 outside the mask too, and its mean inside
    depends on the mask's area. Inside the mask alone ("mask") that mean is exactly 2 before ``cap``, and outside
    w is 1. The released code has min-max of the same difference, + 1 inside the mask and 1 outside, so w lies in
    [1, 2]; there the extremes are taken over the whole batch, here over each sample, because a sample may not depend on
    its batch.

    Args:
        reference: z_r', the aligned latents of a real defect, (N, C, h, w).
        latents: z_t, (N, C, h, w).
        mask: M_g at the latents' resolution, bool (N, 1, h, w), True is defect.
        softmax_over: The pixels that share the weight; without effect on the released form.
        cap: Largest weight, at least 1; what lies above is cut, not handed to other pixels. None leaves the tail.
        form: Equation 7, or the released code's.

    Returns:
        float32 (N, 1, h, w), at least 1; all 1 for a sample whose mask is empty.

    Raises:
        ValueError: Shapes or the mask's type disagree, an option is unknown, or ``cap`` is below 1.
    """
    if latents.ndim != 4 or reference.shape != latents.shape:
        raise ValueError(
            f"reference and latents must both be (N, C, h, w), got {tuple(reference.shape)} and {tuple(latents.shape)}"
        )
    if mask.dtype != torch.bool or mask.shape != (len(latents), 1, *latents.shape[2:]):
        wanted = (len(latents), 1, *latents.shape[2:])
        raise ValueError(f"mask must be bool {wanted}, got {mask.dtype} {tuple(mask.shape)}")
    if softmax_over not in ("mask", "image") or form not in ("paper", "released"):
        raise ValueError(f"softmax_over is 'mask' or 'image', form 'paper' or 'released': {softmax_over!r}, {form!r}")
    if cap is not None and not cap >= 1:
        raise ValueError(f"cap must be at least 1, the weight of what is not enhanced, got {cap}")
    difference = (mask * (reference.float() - latents.float())).square().mean(1, keepdim=True)
    if form == "released":
        low, high = difference.amin((2, 3), keepdim=True), difference.amax((2, 3), keepdim=True)
        inside, gain = mask, (difference - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    else:
        inside = mask if softmax_over == "mask" else torch.ones_like(mask)
        logits = difference.masked_fill(~inside, -torch.inf).flatten(2)
        gain = mask.sum((2, 3), keepdim=True) * torch.softmax(logits, -1).view_as(difference)
    # torch.where also drops the NaN that a softmax over no pixel gives.
    weights = torch.where(inside, gain + 1, 1.0)
    return weights if cap is None else weights.clamp(max=cap)


class AttentionWeights:
    """The weights of the current step: a hook sets them, the processors of every resolution read them."""

    def __init__(self):
        self.set(None)

    def set(self, weights: Tensor | None) -> None:
        """Take the weights of the step to come, (N, 1, h, w) on the latents' grid, or None for plain attention.

        Raises:
            ValueError: The shape is another.
        """
        if weights is not None and (weights.ndim != 4 or weights.shape[1] != 1):
            raise ValueError(f"weights must be (N, 1, h, w) at the latents' resolution, got {tuple(weights.shape)}")
        self.current = weights
        self._rows: dict[tuple, Tensor] = {}

    def rows(self, output: Tensor) -> Tensor | None:
        """The weights for one layer's attention output (B, queries, C), as (B, queries, 1) of its type; None if unset.

        A level's grid is the latents' halved k times, rounded up, as stride-2 convolutions do; the weights on it are
        area means. With guidance B = k N, and the N weights repeat as a whole, for batches made by ``cat([z] * k)``:
        all unconditional samples first, then all conditional ones. Each resolution is resized once a step.

        Raises:
            ValueError: No level has that many queries, or B is no multiple of N.
        """
        if self.current is None:
            return None
        batch, queries = output.shape[:2]
        key = (batch, queries, output.dtype, output.device)
        if key not in self._rows:
            count, _, height, width = self.current.shape
            if batch % count:
                raise ValueError(f"{count} weight maps cannot serve a batch of {batch}: no multiple")
            size = _level(height, width, queries)
            resized = F.adaptive_avg_pool2d(self.current, size).flatten(2).transpose(1, 2)
            self._rows[key] = resized.to(output.device, output.dtype).repeat(batch // count, 1, 1)
        return self._rows[key]


def _level(height: int, width: int, queries: int) -> tuple[int, int]:
    size = (height, width)
    while size[0] * size[1] > queries and max(size) > 1:
        size = (-(-size[0] // 2), -(-size[1] // 2))
    if size[0] * size[1] != queries:
        raise ValueError(f"no halving of weights of {height} x {width} has {queries} pixels: set them on the latents")
    return size


class ReweightedAttnProcessor:
    """diffusers' ``AttnProcessor2_0`` with the rows of its output scaled by w before the output projection.

    Without weights every operation is the stock one, and so is every bit of the result. Projections are called as
    modules, so LoRA layers in their place work.
    """

    def __init__(self, weights: AttentionWeights):
        self.weights = weights

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attention of ``hidden_states``, (B, queries, C) or (B, C, h, w), to the text, (B, keys, D)."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        grid = hidden_states.shape if hidden_states.ndim == 4 else None
        if grid is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        batch, keys, _ = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, keys, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        query = attn.to_q(hidden_states)
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (x.view(batch, -1, attn.heads, x.shape[-1] // attn.heads) for x in (query, key, value))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output = output.transpose(1, 2).flatten(2).to(query.dtype)

        # DefectSynth, Equation 8.
        rows = self.weights.rows(output)
        if rows is not None:
            # Autograd keeps the output for its backward pass; without it no second copy is needed.
            output = output * rows if torch.is_grad_enabled() else output.mul_(rows)

        output = attn.to_out[1](attn.to_out[0](output))
        if grid is not None:
            output = output.transpose(-1, -2).reshape(grid)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


def _cross_attention(unet: nn.Module) -> dict[str, Attention]:
    layers = {
        name: module
        for name, module in unet.named_modules()
        if name.split(".")[-1] == "attn2" and isinstance(module, Attention)
    }
    if not layers:
        raise ValueError(f"{type(unet).__name__} has no cross-attention layer named attn2")
    return layers


@contextmanager
def reweighted(unet: nn.Module, weights: AttentionWeights) -> Iterator[None]:
    """Within it, every cross-attention (``attn2``) of ``unet`` reads ``weights``; afterwards all is as before.

    Set weights before each prediction. A ControlNet is left alone, as in the released code.

    Raises:
        ValueError: No ``attn2`` was found, or one has a processor with weights of its own, which would be lost.
    """
    layers = _cross_attention(unet)
    previous = {name: layer.processor for name, layer in layers.items()}
    for name, processor in previous.items():
        if isinstance(processor, nn.Module):
            raise ValueError(f"{name} has a processor with weights of its own ({type(processor).__name__})")
    try:
        for layer in layers.values():
            layer.set_processor(ReweightedAttnProcessor(weights))
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(previous[name])


@contextmanager
def watched_weights(unet: nn.Module) -> Iterator[list[tuple[int, Tensor]]]:
    """Within it, every re-weighted call of ``unet`` adds (timestep, weights (N, 1, h, w) on the CPU) to a list."""
    seen: list[tuple[int, Tensor]] = []

    def note(_: nn.Module, arguments: tuple) -> None:
        held = [p.weights for p in unet.attn_processors.values() if isinstance(p, ReweightedAttnProcessor)]
        if held and held[0].current is not None:
            seen.append((int(arguments[1]), held[0].current.cpu()))

    handle = unet.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def watched_text(unet: nn.Module) -> Iterator[list[Tensor]]:
    """Within it, every call of every cross-attention of ``unet`` adds its softmax(Q K^T / sqrt(d)) to a list.

    One tensor (B, queries, keys) on the CPU a call and layer, the mean over heads. The matrix is formed for the list
    alone: what the layers compute is untouched.

    Raises:
        ValueError: No ``attn2`` was found.
    """
    seen: list[Tensor] = []

    @torch.no_grad()
    def note(attn: Attention, arguments: tuple, named: dict) -> None:
        query, key = attn.to_q(arguments[0]), attn.to_k(named["encoder_hidden_states"])
        scores = attn.get_attention_scores(attn.head_to_batch_dim(query), attn.head_to_batch_dim(key))
        seen.append(scores.unflatten(0, (-1, attn.heads)).mean(1).cpu())

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in _cross_attention(unet).values()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def text_maps(seen: list[Tensor], size: tuple[int, int]) -> Tensor:
    """How much each cell looks at each token, the mean over what :func:`watched_text` saw.

    Args:
        seen: Shares (B, queries, keys), of at least one layer.
        size: (h, w) of the latents; coarser levels are resized to it bilinearly.

    Returns:
        float (B, keys, h, w) in [0, 1]; a cell's shares sum to 1 over the tokens.
    """
    total = 0
    for shares in seen:
        grid = shares.transpose(1, 2).unflatten(2, _level(*size, shares.shape[1]))
        total = total + F.interpolate(grid.float(), size, mode="bilinear", align_corners=False)
    return total / len(seen)
