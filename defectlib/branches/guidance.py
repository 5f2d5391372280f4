"""SGRL: where a training step looks, as weights of its squared errors in latent space.

Stated by the paper (its abstract): "stronger spatial constraints to defect regions and boundary neighborhoods". Our
reading: weights 1 + lambda_m M + lambda_b R, M the defect's cells, R a band around their boundary, brought to a mean of
one so that the loss keeps its scale, and the learning rate its meaning. They weigh the errors of the base model's own
target (noise as Stable Diffusion 1.5's, or velocity as ``tiny``'s), or of x_0 with min-SNR weights (Hang et al., 2023).
The name also promises saliency: ``softness`` lets weights fall off around the mask; by default its edge is hard.
"""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler
from scipy import ndimage
from torch import Tensor

from defectlib.diffusion import dilated, to_latents

MIN_SNR = 5.0


def band(cells: Tensor, radius: int) -> Tensor:
    """The cells within ``radius`` of the boundary of masks bool (N, 1, h, w), on either side of it."""
    return dilated(cells, radius) & dilated(~cells, radius)


def spatial_weights(
    masks: Tensor,
    size: tuple[int, int],
    *,
    mask_weight: float,
    band_weight: float,
    radius: int = 2,
    most: float = 0.5,
    softness: float = 0.0,
) -> Tensor:
    """Weights of a step's squared errors, (N, 1, h, w), with a mean of one for every mask.

    Args:
        masks: bool (N, 1, H, W).
        size: (h, w) of the latents; a cell is in M if any of its pixels is, so a one-pixel crack survives.
        mask_weight: lambda_m.
        band_weight: lambda_b.
        radius: Of the band, in cells.
        most: The mask's largest share of all weight: lambda_m is lowered for large defects, to zero at least.
        softness: Sigma in cells of exp(-d^2 / 2 sigma^2) outside the mask, in the place of M's hard edge; 0: hard.
    """
    cells = to_latents(masks, size)
    inside, around = cells.float(), band(cells, radius).float()
    if softness:
        inside = torch.maximum(inside, _falling(cells, softness))
    covered = cells.float().flatten(1).sum(1)
    other = band_weight * around
    rest = ((1 + other) * ~cells).flatten(1).sum(1)
    own = ((1 + other) * cells).flatten(1).sum(1)
    # own + lambda_m covered <= most / (1 - most) * rest
    limit = ((most / (1 - most) * rest - own) / covered.clamp_min(1)).clamp(0, mask_weight)
    weights = 1 + limit.view(-1, 1, 1, 1) * inside + other
    return weights / weights.mean((1, 2, 3), keepdim=True)


def _falling(cells: Tensor, softness: float) -> Tensor:
    """exp(-d^2 / 2 sigma^2) of the distance to the mask's next cell; zero where there is none."""
    rows = [torch.from_numpy(ndimage.distance_transform_edt(~row.numpy())) for row in cells[:, 0].cpu()]
    soft = torch.exp(-torch.stack(rows).square() / (2 * softness**2)).float()[:, None].to(cells.device)
    return soft * cells.flatten(1).any(1).view(-1, 1, 1, 1)


def min_snr(timesteps: Tensor, scheduler: DDIMScheduler) -> Tensor:
    """What turns squared errors of the base's target into min(SNR, 5)-weighted ones of x_0, (N, 1, 1, 1).

    For noise that is min(SNR, 5) / SNR, for velocity (1 - abar) min(SNR, 5).
    """
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    ratio = alpha_bar / (1 - alpha_bar)
    capped = ratio.clamp_max(MIN_SNR)
    velocity = scheduler.config.prediction_type == "v_prediction"
    return ((1 - alpha_bar) * capped if velocity else capped / ratio).view(-1, 1, 1, 1)
