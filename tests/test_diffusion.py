import pytest
import torch

from defectlib import diffusion
from defectlib.pretrain import parts

SCHEDULER = diffusion.sd_scheduler()
ALPHA = SCHEDULER.alphas_cumprod


def test_the_schedule_is_stable_diffusions():
    """sqrt(beta) runs linearly from sqrt(0.00085) to sqrt(0.012); nothing is clipped."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - beta, 0)
    assert torch.allclose(ALPHA.double(), expected, rtol=1e-4)
    assert SCHEDULER.config.clip_sample is False


def test_noise_of_a_sample_depends_on_its_seed_alone():
    whole = diffusion.noise_like([3, 5, 7], (3, 4, 4))
    assert torch.equal(diffusion.noise_like([5], (3, 4, 4))[0], whole[1])
    assert not torch.equal(whole[0], whole[1])


def test_posterior_mean_of_two_points_by_hand():
    """For data -1 and +1 in one dimension, E[x0 | x] = tanh(sqrt(a) x / (1 - a))."""
    data = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    x = torch.tensor([0.3, -1.2]).view(2, 1, 1, 1)
    for t in (50, 400, 900):
        a = ALPHA[t]
        expected = torch.tanh(a.sqrt() * x / (1 - a))
        assert torch.allclose(diffusion.empirical_x0(x, a, data), expected, atol=1e-5)


def test_much_noise_gives_the_mean_and_little_noise_the_image():
    data = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = diffusion.noise_like([0], (3, 8, 8))
    late, early = torch.tensor([999]), torch.tensor([5])
    x = SCHEDULER.add_noise(data[:1], noise, early)
    assert torch.allclose(diffusion.empirical_x0(x, ALPHA[5], data), data[:1], atol=1e-4)
    x = SCHEDULER.add_noise(data[:1], noise, late)
    mean = data.mean(0, keepdim=True)
    far = (diffusion.empirical_x0(x, ALPHA[999], data) - mean).abs().mean()
    assert far < 0.5 * (data[:1] - mean).abs().mean()


def test_noise_and_x0_are_two_views_of_one_prediction():
    x0, noise = diffusion.noise_like([1], (3, 4, 4)), diffusion.noise_like([2], (3, 4, 4))
    x = SCHEDULER.add_noise(x0, noise, torch.tensor([300]))
    assert torch.allclose(diffusion.noise_from_x0(x, x0, ALPHA[300]), noise, atol=1e-5)


def perfect(data):
    def predict(x, t):
        return diffusion.noise_from_x0(x, diffusion.empirical_x0(x, ALPHA[t], data), ALPHA[t])

    return predict


@pytest.mark.parametrize("steps", [10, 50])
def test_the_loop_with_the_perfect_denoiser_ends_at_training_images(steps):
    data = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    start = diffusion.noise_like(range(6), (3, 8, 8))
    end = diffusion.denoise(perfect(data), start, SCHEDULER, steps)
    assert torch.cdist(end.flatten(1), data.flatten(1)).min(1).values.max() < 0.8, "last step keeps its little noise"
    alone = diffusion.denoise(perfect(data), start[2:3], SCHEDULER, steps)
    assert torch.allclose(alone[0], end[2], atol=1e-5)


def test_hooks_see_fractions_and_may_edit():
    data = torch.zeros(1, 3, 4, 4)
    seen = []

    def zero(done, latents, pred_x0):
        seen.append(done)
        assert pred_x0.abs().max() < 1e-4
        return latents * 0 if done == 1 else latents

    end = diffusion.denoise(perfect(data), diffusion.noise_like([0], (3, 4, 4)), SCHEDULER, 4, [zero])
    assert seen == [0.25, 0.5, 0.75, 1.0] and (end == 0).all()


def test_a_noised_step_is_the_schedules_own():
    clean, scheduler = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), diffusion.sd_scheduler()
    noisy, timesteps, noise = diffusion.noised(clean, scheduler, torch.Generator().manual_seed(0))
    a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    assert torch.allclose(noisy, a.sqrt() * clean + (1 - a).sqrt() * noise, atol=1e-6)
    assert len(set(timesteps.tolist())) > 1


def test_latent_masks_keep_a_crack_of_one_pixel():
    crack = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    crack[..., 33, 5:60] = True
    assert diffusion.to_latents(crack, (16, 16))[0, 0].sum() == 14


def test_dilation_by_hand():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 3, 3] = True
    assert (
        diffusion.dilated(mask, 0).sum() == 1
        and diffusion.dilated(mask, 1).sum() == 9
        and diffusion.dilated(mask, 2).sum() == 25
    )
    # The released schedule: floor((t + 100) * 8 / 1000) cells of 64.
    assert [diffusion.reach(t, 64, 0.125) for t in (951, 400, 100, 20, 0)] == [8, 4, 1, 0, 0]
    assert [diffusion.reach(t, 16, 0.125) for t in (951, 400, 100)] == [2, 1, 0]


def test_velocity_is_asked_for_where_the_scheduler_is_of_it():
    """v = sqrt(a) eps - sqrt(1 - a) x_0, from which one step of DDIM has x_0 back."""
    clean, scheduler = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)), parts.new_scheduler()
    noisy, timesteps, velocity = diffusion.noised(clean, scheduler, torch.Generator().manual_seed(0))
    a = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    eps = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
    assert torch.allclose(velocity, a.sqrt() * eps - (1 - a).sqrt() * clean, atol=1e-3)
    scheduler.set_timesteps(50)
    step = scheduler.step(velocity[:1], int(timesteps[0]), noisy[:1])
    assert torch.allclose(step.pred_original_sample, clean[:1], atol=1e-3)
    assert scheduler.alphas_cumprod[-1].sqrt() < 0.01 < 0.06 < ALPHA[-1].sqrt(), "all but noise at the end"
