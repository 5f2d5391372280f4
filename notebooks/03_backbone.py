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
# # 3. The base model: a small latent diffusion model, taken apart
#
# All four systems adapt a text-to-image model that is already there. The paper profile takes Stable Diffusion 1.5; the
# others take `tiny`, which ships with the package: the same classes, the same folder layout, and small enough for two
# cores; its noise schedule and what it predicts differ (below). This notebook shows the parts the systems share
# (autoencoder, noise, denoising loop, inversion, cross-attention), how `tiny` was made, and what it knows. The maps of
# attention are those of DualAnoDiff's **Fig. 3**.
#
# The unit of this notebook is a data set: it looks at one category's images.

# %% tags=["parameters"]
profile = None  # smoke, demo or paper; None: the environment variable DEFECTLIB_PROFILE, else smoke
dataset = "mini"
data_root = None
category = None  # None: the first category of the data set
defects = None
methods = None
variants = None
seeds = None
split = None
tiles = None
grid = None
prompts = {}
foregrounds = None
runs_root = None
figures_root = None

# %%
import json

import pandas as pd
import torch
from IPython.display import Markdown, display

from defectlib import attention, backbone, diffusion, params, study
from defectlib.data import world
from defectlib.pretrain import card, recipe
from defectlib.report import figures

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()
base = backbone.load(s.settings.backbone)
home = backbone.folder_of(base.name)
shots, shape = s.shots(), base.latent_shape(s.size)

# %% [markdown]
# ## The parts
#
# An **autoencoder** (VAE) turns an image into a small grid of latents and back; a **UNet** predicts, from noisy latents,
# what is noise in them; a **text encoder** turns a prompt into the sequence that the UNet's cross-attention reads. All of
# them stay frozen in what follows.

# %%
size = " x ".join(map(str, shape))
does = {
    "vae": f"3 x {s.size} x {s.size} px to {size} latents and back",
    "unet": f"what is noise in {size} latents",
    "text_encoder": f"a prompt to {' x '.join(map(str, base.embed(['']).shape[1:]))} numbers",
}
table = pd.DataFrame(
    [[part, sum(w.numel() for w in getattr(base, part).parameters()) / 1e6, what] for part, what in does.items()],
    columns=["part", "million parameters", "does"],
)
print(f"base model {base.name}, {table['million parameters'].sum():.1f} million parameters")
table.round(2)

# %% [markdown]
# ## How `tiny` was made
#
# `make backbone` trains such a model from nothing, by this recipe (the weights that ship were trained by its parts in several
# goes; their [model card](../defectlib/backbone/tiny/README.md) tells how), in two parts:
#
# 1. **The autoencoder** on pictures of a generated world (`defectlib/data/world.py`: surfaces, simple objects, marks on
#    them, silhouettes). A *warm* start first ties the latents to the leading principal components of small blocks of
#    pixels, then encoder and decoder learn together: L1, at last the squared error in its place, and a weak pull of the
#    latents towards the normal distribution.
# 2. **UNet and text encoder** together on the latents, by the loss of diffusion. In one item of five the prompt is left
#    out, so that guidance is possible later. The *warm* start predicts the noise that was added, under Stable Diffusion's
#    schedule and at timesteps drawn uniformly; the rest has the model's own schedule and target (see below), and half of
#    its timesteps where forms take shape.
#
# The world holds no picture of `mini`. These are the settings of the recipe:

# %%
parts = {
    "VAE, warm": recipe.WARM_FIT, "VAE": recipe.VAE_FIT, "VAE, last": recipe.VAE_LAST_FIT,
    "UNet, warm": recipe.UNET_WARM_FIT, "UNet": recipe.UNET_FIT,
    "UNet, last": recipe.UNET_LAST_FIT,
}  # fmt: skip
print(f"{recipe.WORLD:,} pictures of the world, {recipe.HELD_OUT} of them held out; KL weight {recipe.KL_WEIGHT}")
pd.DataFrame({name: settings.model_dump() for name, settings in parts.items()})

# %% [markdown]
# Its training curves; a base model from elsewhere has none here. A loss jumps where it becomes one of another thing: the
# VAE's where the error is squared, the UNet's where it predicts velocity under the scheduler that ships with it, after
# 6,000 steps of predicting noise.

# %%
file = home / "curves.json"
if file.is_file():
    recorded = json.loads(file.read_text())
    curve = pd.DataFrame(
        [[part, step, loss] for part, points in recorded.items() for step, loss in points],
        columns=["part", "step", "loss"],
    )
    figure = figures.curves(curve, x="step", y="loss", log=True, panel="part")
    figures.save(figure, folder, f"backbone_curves_{s.category}", curve)
    display(figure)
else:
    print(f"{home.name} holds no curves.json: this base model was not made by `make backbone`.")

# %% [markdown]
# ## Through the autoencoder and back
#
# What the autoencoder loses, no method can draw. One real image of each defect, their reconstructions, and the error
# (the largest over the channels, white is 64 grey levels or more); the numbers are peak signal to noise ratios over all
# shots of a defect, and over the normals.

# %%
few = [shot for d in s.defects for shot in [shot for shot in shots if shot.defect == d][:1]]
real = torch.stack([shot.image for shot in few])
latents = base.encode(real)
back = base.decode(latents)
error = ((back - real).abs().amax(1, keepdim=True) * 127.5 / 64).clamp(max=1)
figure = figures.sheet(
    [list(real), list(back), list(error)],
    row_labels=["real", "reconstruction", "error"], column_labels=[shot.defect for shot in few],
)  # fmt: skip
figures.save(figure, folder, f"vae_round_trip_{s.category}")
figure

# %%
every = {d: torch.stack([shot.image for shot in shots if shot.defect == d]) for d in s.defects}
every["normal"] = torch.stack(s.normals())
kept = pd.Series({name: card.reconstruction(base, images) for name, images in every.items()}, name="PSNR, dB")
kept.round(2).to_frame()

# %% [markdown]
# ## The schedule
#
# Latents $z_0$ become $z_t = \sqrt{\bar\alpha_t}\, z_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon$. DefectSynth's text says
# "cosine noise schedule", but it fine-tunes a ControlNet on a frozen Stable Diffusion 1.5, whose schedule is "scaled
# linear"; a frozen network cannot follow another one, so the base's own schedule is used here. That of `tiny` is DDPM's
# linear one, which goes further into noise: Stable Diffusion's last step keeps 7 % of the signal, which on so few cells
# is enough to see an image's mean tone, and a model trained on it takes its colours from the noise that it starts from.
# For the same reason `tiny` predicts not the noise $\epsilon$ but the velocity
# $v = \sqrt{\bar\alpha_t}\, \epsilon - \sqrt{1 - \bar\alpha_t}\, z_0$; the scheduler's configuration says which of them it is.

# %%
steps = torch.arange(0, 1000, 20)
alpha_bar = base.scheduler.alphas_cumprod
kept_signal = {base.name: alpha_bar, "Stable Diffusion 1.5": diffusion.sd_scheduler().alphas_cumprod}
schedule = pd.DataFrame(
    [[name, t.item(), values[t].sqrt().item()] for name, values in kept_signal.items() for t in steps],
    columns=["schedule", "t", "signal"],
)
figure = figures.curves(schedule, x="t", y="signal", hue="schedule", log=True)
figures.save(figure, folder, f"schedule_{s.category}", schedule)
figure

# %% [markdown]
# ## Noise, and one guess
#
# One real defect, noised in latent space and decoded (above), and what the UNet takes it for in a single step, given the
# defect's prompt (below): the finer a detail, the earlier it is lost. Noise comes from one CPU generator per sample, so a
# seed gives the same image on any machine and in any batch.


# %%
shot, asked = few[0], s.prompts()[few[0].defect]
levels = [260, 700]
noise = diffusion.noise_like([0], shape).to(base.device)
noised = [base.scheduler.add_noise(latents[:1], noise, torch.tensor([t])) for t in levels]
predict = diffusion.prompted(base, [asked])
base.scheduler.set_timesteps(50)
guesses = [base.scheduler.step(predict(z, torch.tensor(t)), t, z).pred_original_sample for z, t in zip(noised, levels)]
figure = figures.sheet(
    [[base.decode(z)[0] for z in row] for row in (noised, guesses)],
    row_labels=["noised", "one guess"], column_labels=[f"t = {t}" for t in levels],
)  # fmt: skip
figures.save(figure, folder, f"dualanodiff_fig_3_noising_{s.category}")
figure

# %% [markdown]
# ## The denoising loop
#
# A sample starts as noise, and a deterministic loop (DDIM) follows the UNet's guess. The loop calls hooks with the
# fraction of the schedule that is done; here a hook keeps one sample's predicted $z_0$ of every step. The prompts
# are those of held-out pictures of the generated world, two of each kind: the base model's own language.

# %%
pool = world.pool(60, 0)
pictures = [picture for kind in world.KINDS for picture in [one for one in pool if one.kind == kind][:2]]
prompts = [picture.prompt for picture in pictures]
seen = []


def keep(done, latents, pred_x0):
    seen.append((done, pred_x0[3:4]))
    return latents


own = diffusion.denoise(
    diffusion.prompted(base, prompts, 2.0),
    diffusion.noise_like(range(len(prompts)), shape).to(base.device),
    base.scheduler,
    30,
    [keep],
)
shown = seen[::10] + seen[-1:]
figure = figures.sheet(
    [[base.decode(z)[0] for _, z in shown]],
    row_labels=["predicted"], column_labels=[f"{done:.0%}" for done, _ in shown],
)  # fmt: skip
figures.save(figure, folder, f"denoising_loop_{s.category}")
figure

# %% [markdown]
# ## What it draws
#
# The world's picture of each prompt, what the base model draws for the same words by the deterministic loop above, and what it
# draws from the same noise without a word: by that loop, and by more of DDPM's own steps ($\eta = 1$), whose fresh noise lets
# the model mend what an earlier step got wrong.

# %%
start, predict = diffusion.noise_like(range(len(prompts)), shape).to(base.device), diffusion.prompted(base, [""])
unasked = [
    diffusion.denoise(predict, start, base.scheduler, steps, eta=eta, seeds=range(len(prompts)))
    for steps, eta in ((30, 0), (100, 1))
]
figure = figures.sheet(
    [[picture.image for picture in pictures], *(list(base.decode(z)) for z in (own, *unasked))],
    row_labels=["world", "drawn", "without a prompt", "without a prompt,\nDDPM"],
    column_labels=prompts,
    scale=128 / s.size,
)
figures.save(figure, folder, f"zero_shot_world_{s.category}")
figure

# %% [markdown]
# ## Inversion
#
# The loop can be run backwards: DDIM inversion finds the noise that an image comes from (without a prompt, as DefectSynth's
# latent mask interpolation does). Plain inversion asks the UNet one step beside the loop, so its way back is close, not
# exact; more steps, closer. Solving each step by fixed-point iterations closes the gap without more steps on the way back.
# The first column of numbers is the autoencoder alone, which no inversion can pass.

# %%
ways, returned, spread = {"20 steps": (20, 1), "50 steps": (50, 1), "20 steps, solved": (20, 4)}, {}, {}
for way, (count, iterations) in ways.items():
    space = diffusion.latent_space(base, count, iterations=iterations)
    found = space.to_noise(real)
    returned[way], spread[way] = space.from_noise(found), found.std().item()
figure = figures.sheet(
    [list(images) for images in returned.values()],
    row_labels=list(returned), column_labels=[shot.defect for shot in few],
)  # fmt: skip
figures.save(figure, folder, f"inversion_{s.category}")
figure

# %%
pictured = {"autoencoder": back} | returned
inverted = pd.DataFrame({
    "PSNR, dB": {name: card.psnr(images, real) for name, images in pictured.items()},
    "standard deviation of the noise": spread,
})  # fmt: skip
inverted.loc[list(pictured)].T.round(3)

# %% [markdown]
# ## Where the words look: DualAnoDiff, Fig. 3
#
# Cross-attention gives every cell a share for every token of the prompt. Averaged over layers, heads and steps of one
# drawing, and over the tokens of a word, it is a map of where that word is read. DualAnoDiff looks at the maps of the rare
# words `vfx` and `sks` before it ties its two branches to them. First a prompt that the base model knows, then theirs;
# each map is stretched between its own smallest and largest share, which the table holds.


# %%
def looks(prompt, seeds=(0,)):
    """Images of a prompt, and for each of its words the share (N, 1, h, w) of the cells' attention that it has."""
    start = diffusion.noise_like(seeds, shape).to(base.device)
    with attention.watched_text(base.unet) as looked:
        final = diffusion.denoise(diffusion.prompted(base, [prompt], 3.0), start, base.scheduler, 20)
    maps = attention.text_maps(looked, shape[1:])[len(seeds) :]  # the first rows are those without a prompt
    return base.decode(final), [
        (word, maps[:, places].mean(1, keepdim=True)) for word, places in backbone.words(base.tokenizer, prompt)
    ]


def stretched(m):
    """A map between its extremes, on the image's grid."""
    m = (m - m.min()) / (m.max() - m.min()).clamp_min(1e-12)
    return m.repeat_interleave(base.cell, -1).repeat_interleave(base.cell, -2)


def look_sheet(image, maps):
    """The drawn image beside its words' maps."""
    pictures = [image[0], *[stretched(m[0]) for _, m in maps]]
    return figures.sheet([pictures], column_labels=["drawn", *[word for word, _ in maps]])


image, maps = looks("a disc of wood with a stain")
figure = look_sheet(image, maps)
figures.save(figure, folder, f"attention_words_{s.category}")
figure

# %%
image, rare = looks("a vfx with sks")
figure = look_sheet(image, rare)
figures.save(figure, folder, f"dualanodiff_fig_3_attention_{s.category}")
figure

# %%
shares = pd.DataFrame(
    [[word, m.min().item(), m.mean().item(), m.max().item()] for word, m in [*maps, *rare]],
    columns=["word", "smallest share", "mean", "largest"],
)
shares.round(4)

# %% [markdown]
# ## What it does not know
#
# Asked for this category's defects by their prompts, the base model draws what its own world taught it. Beside the real
# ones it is plain that placement and look have to come from the shots.

# %%
n, rows, gaps = 2, [], []
for i, defect in enumerate(s.defects):
    mine = [shot.image for shot in shots if shot.defect == defect]
    naive = card.draw(base, [s.prompts()[defect]] * 4, range(100 * i, 100 * i + 4), size=s.size)
    rows.append([mine[0], *naive[:n]])
    apart, near = (torch.cdist(x.flatten(1), torch.stack(mine).flatten(1)) for x in (torch.stack(mine), naive))
    apart = apart.fill_diagonal_(torch.inf).amin(1)
    gaps.append([defect, *[x.mean().item() / mine[0].numel() ** 0.5 for x in (apart, near.amin(1))]])
figure = figures.sheet(rows, row_labels=list(s.defects), column_labels=["real", *["zero-shot"] * n])
figures.save(figure, folder, f"zero_shot_defects_{s.category}")
figure

# %% [markdown]
# The distance to the nearest shot (root mean square over pixels, range 2): of a shot to another shot of its defect, and of
# four zero-shot samples to the shots. One shot alone has no other, and the distance is infinite.

# %%
gaps = pd.DataFrame(gaps, columns=["defect", "a shot to the next", "a zero-shot sample to the next shot"])
gaps.round(3)

# %% [markdown]
# The model card, where the base model has one, with what was measured on it:

# %%
file = home / "README.md"
Markdown(file.read_text() if file.is_file() else f"{home.name} holds no README.md.")

# %% [markdown]
# ## Why not train on the shots alone?
#
# For a finite set of images the best possible denoiser has a closed form: if $x_0$ is one of $M$ images with equal
# probability, it is the posterior mean
# $E[x_0 | x_t] = \sum_i \mathrm{softmax}_i\!\left(-\frac{\|x_t - \sqrt{\bar\alpha_t}\, x_i\|^2}{2(1 - \bar\alpha_t)}\right) x_i$.
# Trained to perfection on a few images, a diffusion model is this, and can only draw those images again. Below, in pixels:
# for one shot under growing noise, the closed form's answer, and the probability that it gives to the right shot.

# %%
few = torch.stack([item.image for item in shots])
late = [140, 650, 999]
noise, closed_form = diffusion.noise_like([0], few[0].shape), diffusion.sd_scheduler()
alpha_bar = closed_form.alphas_cumprod
start = [closed_form.add_noise(few[:1], noise, torch.tensor([t])) for t in late]
best = [diffusion.empirical_x0(x, alpha_bar[t], few)[0].clamp(-1, 1) for x, t in zip(start, late)]
sure = [diffusion.posterior(x, alpha_bar[t], few)[0, 0].item() for x, t in zip(start, late)]
figure = figures.sheet(
    [best],
    row_labels=["E[x_0 | x_t]"], column_labels=[f"t = {t}: {share:.2f}" for t, share in zip(late, sure)],
)  # fmt: skip
figures.save(figure, folder, f"closed_form_denoiser_{s.category}")
figure

# %% [markdown]
# The same loop with this denoiser, from three seeds; their distance to the nearest shot stands at the end.


# %%
def perfect(x, t):
    return diffusion.noise_from_x0(x, diffusion.empirical_x0(x, alpha_bar[t], few), alpha_bar[t])


samples = diffusion.denoise(perfect, diffusion.noise_like(range(3), few[0].shape), closed_form, 50)
distance = torch.cdist(samples.flatten(1), few.flatten(1)) / few[0].numel() ** 0.5
figure = figures.sheet([list(samples.clamp(-1, 1))], row_labels=["sample"])
distances = pd.DataFrame({"seed": range(3), "rms_to_nearest": distance.min(1).values})
figures.save(figure, folder, f"memorisation_{s.category}", distances)
figure

# %% [markdown]
# What the papers add is a prior that comes from elsewhere: the base model stays frozen, and only what steers it is trained.
#
# ## What was found

# %%
print(f"{base.name}: latents {size}, {table['million parameters'].sum():.1f} million parameters.")
print(f"{s.category} through the autoencoder and back: {', '.join(f'{k} {v:.1f} dB' for k, v in kept.items())}.")
for way, images in returned.items():
    print(f"Inverted in {way}, and drawn back: {card.psnr(images, real):.1f} dB.")
print(
    f"A perfect model of {len(few)} shots copies: three samples lie at most {distance.min(1).values.max():.4f} from a shot."
)
print(s.stamp())
