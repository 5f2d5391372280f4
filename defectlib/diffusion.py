"""The noise schedule, noising, and one denoising loop with step hooks.

Schedulers are diffusers' own. ``clip_sample`` is off, as in Stable Diffusion's configuration: a clipped prediction
flattens latents of unit variance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor

from defectlib.backbone import Backbone
from defectlib.masks import latent

# Keeps the noise added on the way apart from the noise started from, which the same seeds draw.
FRESH = 0x5EED
ITERATIONS, DAMPING = 4, 0.7
Hook = Callable[[float, Tensor, Tensor], Tensor]


def sd_scheduler() -> DDIMScheduler:
    """Stable Diffusion 1.5's schedule: T = 1000, "scaled linear" beta from 0.00085 to 0.012."""
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def noise_like(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise (N, *shape), one CPU generator a sample: row i depends on ``seeds[i]`` alone."""
    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def noised(
    clean: Tensor, scheduler: DDIMScheduler, generator: torch.Generator, timesteps: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a training step shows the model and asks of it: clean latents at uniform timesteps.

    Args:
        clean: x_0, (N, C, H, W), on any device.
        scheduler: Its noise schedule is used.
        generator: On the CPU: timesteps first, then noise, so that a device changes neither.
        timesteps: (N,), where they are not drawn here: what is shown beside other latents shares theirs.

    Returns:
        x_t and what the model is to predict (N, C, H, W), with the timesteps (N,) between them: the noise, or where the
        scheduler is of v-prediction sqrt(a) eps - sqrt(1 - a) x_0, as diffusers' schedulers take it.
    """
    if timesteps is None:
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    timesteps = timesteps.to(clean.device)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(clean, noise, timesteps) if velocity else noise
    return scheduler.add_noise(clean, noise, timesteps), timesteps, target


def posterior(noisy: Tensor, alpha_bar: Tensor, data: Tensor) -> Tensor:
    """P(x_0 = x_i | x_t) for x_t = sqrt(a) x_0 + sqrt(1 - a) eps and x_0 uniform over ``data``.

    Args:
        noisy: x_t, float32 (N, C, H, W).
        alpha_bar: The scheduler's cumulative product a at this timestep, a scalar in (0, 1).
        data: All x_0, float32 (M, C, H, W).

    Returns:
        softmax_i(-||x_t - sqrt(a) x_i||^2 / (2 (1 - a))), float64 (N, M).
    """
    distance = torch.cdist(noisy.flatten(1).double(), alpha_bar.double().sqrt() * data.flatten(1).double()).square()
    return torch.softmax(-distance / (2 * (1 - alpha_bar.double())), dim=1)


def empirical_x0(noisy: Tensor, alpha_bar: Tensor, data: Tensor) -> Tensor:
    """The best possible denoiser of a finite data set: the posterior mean E[x_0 | x_t], (N, C, H, W).

    It is the minimiser of the diffusion loss over all functions; arguments as in :func:`posterior`.
    """
    weight = posterior(noisy, alpha_bar, data)
    return (weight @ data.flatten(1).double()).view_as(noisy).to(noisy.dtype)


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    scheduler: DDIMScheduler,
    num_inference_steps: int,
    hooks: Sequence[Hook] = (),
    *,
    eta: float = 0.0,
    seeds: Sequence[int] = (),
) -> Tensor:
    """DDIM: the one loop that every method's sampling goes through; deterministic at eta = 0.

    Args:
        predict: The model: what ``scheduler`` takes it to predict (eps, or v) from (x_t, t); t is a scalar timestep.
        latents: x_T, (N, C, H, W).
        scheduler: Any DDIM scheduler; its own noise schedule is kept.
        num_inference_steps: Steps K.
        hooks: Called after each step with (fraction of the schedule done in (0, 1], latents, predicted x_0); each
            returns the latents to go on with. Fractions, not step indices, so 10 and 50 steps mean the same.
        eta: Share of DDPM's noise that is added anew each step; 1 is DDPM.
        seeds: One a row of the latents, needed where ``eta`` > 0: a row's fresh noise depends on its seed alone.

    Raises:
        ValueError: ``eta`` > 0 without a seed for every row.
    """
    if eta > 0 and len(seeds) != len(latents):
        raise ValueError(f"eta {eta} adds noise: give {len(latents)} seeds, got {len(seeds)}")
    generators = [torch.Generator().manual_seed(seed ^ FRESH) for seed in seeds]
    scheduler.set_timesteps(num_inference_steps)
    for i, timestep in enumerate(scheduler.timesteps):
        fresh = None
        if eta > 0:
            fresh = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
        step = scheduler.step(predict(latents, timestep), timestep, latents, eta=eta, variance_noise=fresh)
        latents = step.prev_sample
        for hook in hooks:
            latents = hook((i + 1) / num_inference_steps, latents, step.pred_original_sample)
    return latents


def invert(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    scheduler: DDIMScheduler,
    num_inference_steps: int,
    iterations: int = ITERATIONS,
) -> Tensor:
    """DDIM inversion: the noise (N, C, h, w) from which :func:`denoise` comes back to these latents.

    A step of DDIM is linear in its latents and in what is predicted, z_s = A z_t + B p(z_t, t), so z_t is the fixed
    point of z -> (z_s - B p(z, t)) / A. Plain DDIM inversion stops after the first of these iterations: on ``tiny``, 20
    such steps bring masks back at an IoU below 0.6, and four iterations at 0.99 or better (``02_masks``). They
    overshoot from side to side, so all but the first go :data:`DAMPING` of the way.
    """
    scheduler.set_timesteps(num_inference_steps)
    # Where the scheduler's own numbers may lie too: its add_noise moves them to what it was last given.
    nothing, one = latents.new_zeros(1, dtype=torch.float32), latents.new_ones(1, dtype=torch.float32)
    for timestep in scheduler.timesteps.flip(0):
        of_latents = scheduler.step(nothing, timestep, one).prev_sample.item()
        of_prediction = scheduler.step(one, timestep, nothing).prev_sample.item()
        noisier = (latents - of_prediction * predict(latents, timestep)) / of_latents
        for _ in range(iterations - 1):
            noisier = noisier.lerp((latents - of_prediction * predict(noisier, timestep)) / of_latents, DAMPING)
        latents = noisier
    return latents


def to_latents(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks bool (N, 1, H, W) on the latents' grid: a cell is in the mask if any of its pixels is.

    One-pixel cracks survive, which bilinear resizing and a threshold would lose.
    """
    return F.adaptive_max_pool2d(masks.float(), size) > 0


def dilated(mask: Tensor, radius: int) -> Tensor:
    """Square dilation of bool (N, 1, h, w) by ``radius`` cells: a max pool."""
    return F.max_pool2d(mask.float(), 2 * radius + 1, 1, radius) > 0 if radius else mask


def reach(timestep: int, side: int, dilation: float) -> int:
    """Cells by which the blending mask is dilated at a timestep: floor((t + 100) / 1000 * dilation * side), 0 at t = 0.

    The released schedule (8 of 64 cells at the start), as a share of the side so that it means the same at any size.
    """
    return int((timestep + 100) * dilation * side / 1000) if timestep > 0 else 0


def at_level(clean: Tensor, noise: Tensor, scheduler: DDIMScheduler, done: float) -> Tensor:
    """Clean latents as noisy as :func:`denoise` goes on from after this share of its schedule; as they are at its end.

    Args:
        clean: x_0, (N, C, h, w).
        noise: Of the same shape.
        scheduler: With the timesteps of the loop that is running.
        done: In [0, 1], as a hook is told.
    """
    following = scheduler.timesteps[round(done * len(scheduler.timesteps)) :]
    return scheduler.add_noise(clean, noise, following[:1]) if len(following) else clean


def kept_outside(inside: Tensor, clean: Tensor, noise: Tensor, scheduler: DDIMScheduler) -> Hook:
    """A hook of blended latent diffusion: outside, other latents' noised to the level that the loop goes on from.

    Args:
        inside: Where the loop's own latents stay, bool (N, 1, h, w).
        clean: x_0 of what stands outside, (N, C, h, w).
        noise: Of the same shape; the same at every step.
        scheduler: That of the loop.
    """
    return lambda done, latents, x0: torch.where(inside, latents, at_level(clean, noise, scheduler, done))


def prompted(base: Backbone, prompts: Sequence[str], scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """What a base model predicts from (x_t, t) for N latents' prompts, or one prompt for all of them.

    A ``scale`` above 1 is classifier-free guidance (Ho and Salimans, 2022).
    """
    text, empty = base.embed(list(prompts)), base.embed([""])

    @torch.no_grad()
    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        asked = text.expand(len(latents), -1, -1)
        if scale <= 1:
            return base.unet(latents, timestep, asked).sample
        both = torch.cat([empty.expand_as(asked), asked])
        without, with_text = base.unet(torch.cat([latents, latents]), timestep, both).sample.chunk(2)
        return without + scale * (with_text - without)

    return predict


@functools.lru_cache(maxsize=4)
def latent_space(
    base: Backbone, num_inference_steps: int = 20, prompt: str = "", iterations: int = ITERATIONS
) -> latent.Space:
    """A base model as the way to noise and back that ``masks.latent`` interpolates on; the released prompt is empty.

    The same one a call, with all that it has drawn so far: the runs of a category share its shots.
    """
    predict = prompted(base, [prompt])
    return latent.Space(
        lambda images: invert(predict, base.encode(images), base.scheduler, num_inference_steps, iterations),
        lambda noise: base.decode(denoise(predict, noise, base.scheduler, num_inference_steps)),
    )


def noise_from_x0(noisy: Tensor, x0: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise that a prediction of x_0 implies: eps = (x_t - sqrt(a) x_0) / sqrt(1 - a)."""
    return (noisy - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
