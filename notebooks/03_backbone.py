# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Diffusion: schedule, noise, and one denoising loop
#
# All four systems are latent diffusion models. This notebook shows the parts they share, on pixels, where everything can
# be seen: Stable Diffusion's noise schedule, noising, and the deterministic DDIM loop through which every sample of this
# project goes.
#
# No pretrained network is used here. For a finite set of images the best possible denoiser has a closed form, and it
# makes a point that matters for few-shot generation: **trained to perfection on a few images, a diffusion model can only
# draw those images again.** What the papers add is a prior that comes from elsewhere.

# %% tags=["parameters"]
profile = None  # smoke, demo or paper; None: the environment variable DEFECTLIB_PROFILE, else smoke
dataset = "mini"
data_root = None
category = None  # None: the first category of the data set
defects = None
methods = None
seeds = None
split = None
tiles = None
grid = None
prompts = {}
runs_root = None
figures_root = None

# %%
import pandas as pd
import torch

from defectlib import diffusion, params, stages
from defectlib.report import figures

p = params.read(globals())
s = stages.study(p)
folder = stages.figures_folder(p)
figures.style()
scheduler = diffusion.sd_scheduler()

# %% [markdown]
# ## The schedule
#
# An image $x_0$ becomes $x_t = \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$. DefectSynth's text says
# "cosine noise schedule", but it fine-tunes a ControlNet on a frozen Stable Diffusion 1.5, whose schedule is "scaled
# linear"; a frozen network cannot follow another one, so the base's own schedule is used here.

# %%
steps = torch.arange(0, 1000, 20)
alpha_bar = scheduler.alphas_cumprod
schedule = pd.DataFrame({
    "t": steps, "signal": alpha_bar[steps].sqrt(), "noise": (1 - alpha_bar[steps]).sqrt(),
})  # fmt: skip
figure = figures.curves(schedule.melt("t", var_name="part", value_name="amplitude"), x="t", y="amplitude", hue="part")
figures.save(figure, folder, f"schedule_{s.category}", schedule)
figure

# %% [markdown]
# ## Noising
#
# Eight levels of noise on one real defect. Noise comes from one CPU generator per sample, so a seed gives the same image
# on any machine and in any batch.

# %%
shot = s.shots()[0]
levels = [0, 20, 60, 140, 260, 420, 650, 950]
noise = diffusion.noise_like([0], shot.image.shape)
noised = [scheduler.add_noise(shot.image[None], noise, torch.tensor([t]))[0].clamp(-1, 1) for t in levels]
figure = figures.sheet([noised], row_labels=[shot.defect], column_labels=[f"t = {t}" for t in levels])
figures.save(figure, folder, f"dualanodiff_fig_3_noising_{s.category}")
figure

# %% [markdown]
# ## The best denoiser of a finite set
#
# If $x_0$ is one of $M$ images with equal probability, the minimiser of the diffusion loss is the posterior mean
# $E[x_0 | x_t] = \sum_i \mathrm{softmax}_i\!\left(-\frac{\|x_t - \sqrt{\bar\alpha_t}\, x_i\|^2}{2(1 - \bar\alpha_t)}\right) x_i$.
# With nothing but noise it would be the mean of all images. But this schedule never comes to that: its last level keeps a
# little signal, an image has thousands of pixels, and together they give it away where the eye sees nothing. The table
# shows, for each level, the signal that is left and the probability of the image that the noise was added to.

# %%
few = torch.stack([item.image for item in s.shots()])
late = [140, 420, 650, 850, 950, 980, 999]
start = [scheduler.add_noise(shot.image[None], noise, torch.tensor([t])) for t in late]
best = [diffusion.empirical_x0(x, alpha_bar[t], few)[0].clamp(-1, 1) for x, t in zip(start, late)]
figure = figures.sheet(
    [[x[0].clamp(-1, 1) for x in start], best],
    row_labels=["x_t", "E[x_0 | x_t]"],
    column_labels=[f"t = {t}" for t in late],
)
figures.save(figure, folder, f"closed_form_denoiser_{s.category}")
figure

# %%
known = [diffusion.posterior(x, alpha_bar[t], few)[0, 0].item() for x, t in zip(start, late)]
table = pd.DataFrame({"t": late, "signal": alpha_bar[late].sqrt().tolist(), "probability of the right image": known})
table.set_index("t").T.round(3)

# %% [markdown]
# ## The denoising loop
#
# The loop calls hooks with the fraction of the schedule that is done; here a hook keeps the predicted $x_0$ of every
# step. Eight samples start from eight seeds.


# %%
def predict_noise(x, t):
    return diffusion.noise_from_x0(x, diffusion.empirical_x0(x, alpha_bar[t], few), alpha_bar[t])


seen = []


def keep(done, latents, pred_x0):
    seen.append((done, pred_x0[0].clamp(-1, 1)))
    return latents


seeds = list(range(8))
samples = diffusion.denoise(predict_noise, diffusion.noise_like(seeds, shot.image.shape), scheduler, 50, [keep])
shown = seen[4::6]
figure = figures.sheet(
    [[x for _, x in shown]], row_labels=["predicted x_0"], column_labels=[f"{done:.0%}" for done, _ in shown]
)
figures.save(figure, folder, f"denoising_loop_{s.category}")
figure

# %% [markdown]
# Each sample beside its nearest shot:

# %%
distance = torch.cdist(samples.flatten(1), few.flatten(1)) / samples[0].numel() ** 0.5
nearest = distance.argmin(1)
figure = figures.sheet([list(samples.clamp(-1, 1)), list(few[nearest])], row_labels=["sample", "nearest shot"])
distances = pd.DataFrame({"seed": seeds, "rms_to_nearest": distance.min(1).values})
figures.save(figure, folder, f"memorisation_{s.category}", distances)
figure

# %% [markdown]
# ## The same loop at any number of steps
#
# Same seeds, same final images? DDIM is deterministic, so the answer may only depend on how finely the path is followed.

# %%
ends = {
    k: diffusion.denoise(predict_noise, diffusion.noise_like(seeds, shot.image.shape), scheduler, k)
    for k in (10, 20, 50, 100)
}
same = {k: int((torch.cdist(x.flatten(1), few.flatten(1)).argmin(1) == nearest).sum()) for k, x in ends.items()}
pd.DataFrame({"steps": same.keys(), "samples that end at the same shot as with 50 steps": same.values()})

# %% [markdown]
# ## What was found

# %%
between = torch.cdist(few.flatten(1), few.flatten(1))[~torch.eye(len(few), dtype=bool)].min() / few[0].numel() ** 0.5
print(
    f"Largest distance of a sample to its nearest shot: {distance.min(1).values.max():.4f} (root mean square, range 2);"
)
print(f"smallest distance between two shots: {between:.4f}.")
print(
    f"{len(set(nearest.tolist()))} different shots were drawn by {len(seeds)} seeds: a perfect few-shot model only copies."
)
print(stages.stamp(s))
