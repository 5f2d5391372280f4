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
# # 4. The methods, step by step
#
# Each method of this project is one file in `defectlib/methods`, over shared parts. This notebook takes them apart and
# shows every idea switched on and off: **Crop-Paste**, the baseline of DefectSynth's Tables II, III, VIII and IX,
# **DefectSynth**, equation by equation (its Fig. 2, stage 2; where masks come from, stage 1, is notebook 2),
# **DualAnoDiff**, what its two branches see (its Figs. 2 and 3), and **AdaBLDM**, stage by stage (its Figs. 1 and 3). The
# symmetry-aware system is DualAnoDiff with three parts more, which show over the defects of a category: they are taken apart in notebook 8.
#
# The unit of this notebook is a data set: it looks at one category.

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
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from defectlib import attention, augmentation, backbone, diffusion, params, sampling, stages, study
from defectlib.branches import BRANCHES, PROMPTS, BranchUNet, found_again
from defectlib.control import embedded_once, steered
from defectlib.masks import alignment, saliency, shape, sources, trimap
from defectlib.masks import random as random_masks
from defectlib.masks.extraction import extract, ground
from defectlib.methods import base, crop_paste
from defectlib.metrics import regions
from defectlib.report import figures

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## What a method promises
#
# `fit` on shots and normals, `sample` for requests, `save` and `load`. Three facts are declared by the class, and a
# contract test holds every registered method to them.

# %%
pd.DataFrame(
    [[name, m.scope, m.makes_masks, m.preserves_background] for name, m in ((n, base.get(n)) for n in base.names())],
    columns=["method", "one fit covers", "draws its own mask", "background untouched"],
)

# %% [markdown]
# ## Crop-Paste in five steps
#
# A shot (1) is cut out by its mask (2), flipped, rotated by 0 to 360 degrees and scaled by 0.85 to 1.15 (3). Legal places
# are those where the whole patch lies inside the normal's foreground; they are counted by one convolution, never tried
# one by one (4). The patch is pasted at one of them (5).

# %%
config = base.configure("crop_paste", {})
shots, normals = s.shots(), s.normals()
steps, labels = [], ["shot", "cut out", "moved", "foreground", "pasted"]
for row, defect in enumerate(s.defects):
    rng = np.random.default_rng(row)
    shot = next(item for item in shots if item.defect == defect)
    patch, mask, _ = random_masks.affine_crop(shot.image, shot.mask, rng)
    normal = normals[row]
    allowed = trimap.foreground(normal)
    corner = random_masks.place(mask, random_masks.Places(allowed), rng)
    y, x = corner or random_masks.centred(mask, allowed)  # it may fit nowhere whole
    drawn, placed = augmentation.paste(normal, patch, mask, y, x, feather=0)
    moved, _ = augmentation.paste(torch.zeros_like(normal), patch, mask, y, x, feather=0)
    steps.append([shot.image, torch.where(shot.mask, shot.image, 0.0), moved, allowed, drawn])
figure = figures.sheet(steps, row_labels=list(s.defects), column_labels=labels)
figures.save(figure, folder, f"crop_paste_steps_{s.category}")
figure

# %% [markdown]
# ## On and off
#
# The paper's Crop-Paste has a hard edge. Feathering blends the patch from its edge inwards, so that the background stays
# untouched to the bit. The same requests, hence the same shots, places and turns:

# %%
requests = sampling.plan(shots, normals, 1, None, 0, s.prompts(), s.all_defects)
variants = {
    "paper": {},
    "feather 2 px": {"feather": 2.0},
    "no turns": {"rotate": 0.0, "scale_low": 1.0, "scale_high": 1.0, "flip": False},
}
drawn = {}
for name, values in variants.items():
    method = crop_paste.CropPaste(base.configure("crop_paste", values))
    method.fit(shots, normals, prompts=s.prompts(), seed=0, workdir=p.dataset_folder())
    drawn[name] = method.sample(requests)
figure = figures.sheet(
    [[samples[0].image for samples in drawn.values()]], column_labels=list(drawn), scale=128 / s.size
)
figures.save(figure, folder, f"crop_paste_on_off_{s.category}")
figure

# %% [markdown]
# The background is untouched: the largest difference to the normal image outside the mask, over all of these samples.

# %%
rows = []
for name, samples in drawn.items():
    outside = max((a.image - r.normal).abs()[:, ~a.mask[0]].max().item() for a, r in zip(samples, requests))
    inside = float(np.mean([(a.image - r.normal).abs()[:, a.mask[0]].mean().item() for a, r in zip(samples, requests)]))
    rows.append([name, outside, inside])
changes = pd.DataFrame(rows, columns=["variant", "largest change outside the mask", "mean change inside"])
changes

# %% [markdown]
# ## DefectSynth
#
# A ControlNet, a copy of the base model's encoder, reads the mask and steers the frozen base model; it alone is trained,
# on the shots. Drawing starts from a normal image. Two ideas are added at that time, and both can be switched off in the
# same fit: **SAE** re-weights cross-attention towards what differs from a real defect, and **SFF** lets the samples of a
# group lend each other features. The fit is that of notebook 5 where it is there; else it is made here, whatever
# `methods` asks for, for this one category. A batch has this notebook only where it asks for DefectSynth, DualAnoDiff and
# AdaBLDM.

# %%
seed = s.seeds[0]
record = stages.fit(s, "defectsynth", seed)
fitted, model = s.load("defectsynth", seed), s.backbone("defectsynth", seed)
usual = fitted.config
grid = model.latent_shape(s.size)[1:]
print(
    f"fitted in {record['metrics'][0]['value']:.1f} s on {len(fitted.shots)} shots; {usual.num_inference_steps} steps"
)

# %% [markdown]
# ### The requests
#
# The masks of this notebook are real ones, moved and turned. All that follows is drawn for the same requests with the same
# seeds.

# %%
size = max(2, s.settings.sample.group_size)
asked = sampling.plan(shots, normals, size, sources.SOURCES["affine"], seed, s.prompts(), s.all_defects, size)
first = [next(r for r in asked if r.defect == defect) for defect in s.defects][: usual.batch_size]
masks = diffusion.to_latents(torch.stack([r.mask for r in first]), grid)


def enlarged(cells):
    """A map (1, h, w) on the latents' grid, on the image's."""
    return cells.repeat_interleave(model.cell, -1).repeat_interleave(model.cell, -2)


# %% [markdown]
# ### Mask, hint, and the reach of blending
#
# The ControlNet sees the mask in pixels (its *hint*). On the latents' grid a cell belongs to the mask if any of its pixels
# does. After each step everything outside is replaced by the normal image's latents, noised to the same level. Early on the
# border is set wide, so that a defect can join its surroundings; it shrinks to the mask.

# %%
moments = [950, 700, 450, 200, 0]
reaches = [diffusion.reach(t, grid[1], usual.dilation) for t in moments]
figure = figures.sheet(
    [
        [r.normal, r.mask, enlarged(m), *[enlarged(diffusion.dilated(m[None], n)[0]) for n in reaches]]
        for r, m in zip(first[-1:], masks[-1:])
    ],
    row_labels=[r.defect for r in first[-1:]],
    column_labels=["normal", "hint", "latents", *[f"t = {t}: {n} cells" for t, n in zip(moments, reaches)]],
)
figures.save(figure, folder, f"defectsynth_blending_{s.category}")
figure

# %% [markdown]
# ### Equations 5 and 6: alignment
#
# SAE compares with a real defect, so a real one must lie where the new one is to be. The motion $(t^*, \theta^*)$ is the
# one that lays the real mask on the requested one with the largest overlap (Eq. 5), over all shifts and a fine grid of
# angles; it is then applied to the real image's latents (Eq. 6), decoded here to be looked at.

# %%
rows, motions = [], []
for r in first:
    shot = next(shot for shot in shots if shot.defect == r.defect)
    real, wanted = (alignment.coverage(mask, grid) for mask in (shot.mask, r.mask))
    motion = alignment.align(real, wanted)
    moved = alignment.apply(model.encode(shot.image[None])[0], motion)[0]
    placed = alignment.apply(real, motion)[0].clamp(0, 1)
    rows.append([shot.image, enlarged(real), enlarged(wanted), enlarged(placed), model.decode(moved[None])[0]])
    before, possible = (real * wanted).sum().item(), min(real.sum().item(), wanted.sum().item())
    motions.append([r.defect, motion.dy, motion.dx, motion.angle, before / possible, motion.overlap / possible])
figure = figures.sheet(
    rows[-1:], row_labels=[r.defect for r in first[-1:]],
    column_labels=["real", "its mask", "requested", "moved", "aligned latents"],
)  # fmt: skip
figures.save(figure, folder, f"defectsynth_alignment_{s.category}")
figure

# %%
columns = ["defect", "down, cells", "right, cells", "turn, degrees", "overlap before", "overlap after"]
motions = pd.DataFrame(motions, columns=columns)
motions.round(2)

# %% [markdown]
# The overlap is a share of the smaller mask's area; masks count by coverage, so that a crack thinner than a cell counts.
#
# ### Equation 7: the weights
#
# $w = \lVert M \rVert_1\, \mathrm{softmax}\big(\mathrm{mean}_c (M (z_r' - z_t))^2\big) + 1$: largest where the latents of
# this step differ most from the aligned real defect's. As printed the softmax runs over all pixels of the image; over those
# of the mask the mean inside is exactly 2. Both are drawn here with all of their tail, and every step's weights are kept;
# elsewhere weights are cut at `sae_cap`. Whether the tail or the cut damages what is drawn is counted further down and, over many
# samples, by rows of notebook 8's ablation (*SAE over all pixels, no limit*; *SAE's weights without limit*): on this base model no form of SAE is told from another there.
# How heavy the tail is on Stable Diffusion's larger grid is simulated below.

# %%
kept = {}
for over in ("mask", "image"):
    fitted.config = base.configure("defectsynth", usual.model_dump() | {"sae_softmax": over, "sae_cap": None})
    with attention.watched_weights(model.unet) as kept[over]:
        fitted.sample(first)
levels = {"largest": 1.0, "90 %": 0.9, "median": 0.5}
spread = pd.DataFrame(
    [
        [f"{over}, {name}", over, name, t, w[: len(first)][masks].quantile(q).item()]
        for over, steps in kept.items() for t, w in steps for name, q in levels.items()
    ],
    columns=["softmax over", "over", "quantile", "t", "weight"],
)  # fmt: skip
figure = figures.curves(spread, x="t", y="weight", hue="softmax over", log=True)
figures.save(figure, folder, f"defectsynth_weights_{s.category}", spread)
figure

# %% [markdown]
# The weights inside the masks at every step (drawing runs from right to left), and as maps, over the mask: black is 1,
# white the map's own largest weight, logarithmic between.

# %%
steps = [kept["mask"][i] for i in np.unique(np.linspace(0, len(kept["mask"]) - 1, 5).round().astype(int))]
maps = [(log := w[: len(first)].log()) / log.amax((2, 3), keepdim=True).clamp_min(1e-12) for _, w in steps]
figure = figures.sheet(
    [[r.mask, *[enlarged(m[i]) for m in maps]] for i, r in enumerate(first)],
    row_labels=[r.defect for r in first],
    column_labels=["mask", *[f"t = {t}: up to {w[: len(first)].max():.1f}" for t, w in steps]],
)
figures.save(figure, folder, f"defectsynth_weight_maps_{s.category}")
figure

# %%
tail = pd.DataFrame({
    over: {
        "largest weight, median over steps": np.median([w[: len(first)][masks].max().item() for _, w in steps]),
        "mean inside": np.mean([w[: len(first)][masks].mean().item() for _, w in steps]),
        "mean outside": np.mean([w[: len(first)][~masks].mean().item() for _, w in steps]),
    }
    for over, steps in kept.items()
})  # fmt: skip
tail.round(3)

# %% [markdown]
# On 64 x 64 cells of four channels, where no base model ships here, from Gaussian latents of unit variance on both sides, which is
# what $z_t$ is at the first step: 200 draws under a disc of 376 cells. The sum of all gains is fixed, and a few cells take it; a limit cuts
# them, and hands what it cuts to no other.

# %%
generator = torch.Generator().manual_seed(0)
y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
disc = ((y - 31.5) ** 2 + (x - 31.5) ** 2 < 10.9**2).expand(200, 1, 64, 64)
sides = [torch.randn(200, 4, 64, 64, generator=generator) for _ in range(2)]
heavy = {}
for over, cap in (("image", None), ("mask", None), ("mask", 2.0)):
    w = attention.selective_weights(*sides, disc, softmax_over=over, cap=cap)[disc].view(200, -1)
    gains = (w - 1).sort(descending=True).values
    heavy[f"over the {over}, {'all of the tail' if cap is None else f'cut at {cap:g}'}"] = {
        "largest weight, median": w.amax(1).median().item(), "mean inside, median": w.mean(1).median().item(),
        "median weight": w.median().item(), "share of the gain in ten cells": (gains[:, :10].sum(1) / gains.sum(1)).median().item(),
    }  # fmt: skip
print(f"{int(disc[0].sum())} cells")
pd.DataFrame(heavy).T.round(3)

# %% [markdown]
# ### Equations 8 and 9, on and off
#
# The weights multiply the rows of every cross-attention (Eq. 8). SFF comes after the last step: at random positions each
# sample's feature is mixed with the most similar one of every other sample of its group (Eq. 9), and the base sample weighs 0.7 in its
# turn, whichever it is. Here only positions inside the mask are written, as in the released code; the mixing is the paper's. Eq. 9 as it is printed
# changes the background too (*SFF anywhere*; KID rises with it in all five categories of `mini`: `figures/full/ablation.md`). *As released* takes the values of the published code, which are below; its references
# weigh 0.3 each, 1.6 in all in a group of four, as here (in its own group of two it compares a sample with itself):

# %%
released = type(usual).as_released(**usual.fit_values())
paper = usual.model_dump()
pd.DataFrame(
    [[name, str(paper[name]), str(value)] for name, value in released.model_dump().items() if value != paper[name]],
    columns=["field", "here", "as released"],
).set_index("field")

# %%
changed = {
    "SAE and SFF": {}, "no SAE": {"sae": False}, "no SFF": {"sff": False}, "neither": {"sae": False, "sff": False},
    "softmax over image": {"sae_softmax": "image"}, "no limit to weights": {"sae_cap": None},
    "SFF anywhere": {"sff_within": "image"},
}  # fmt: skip
configs = {name: base.configure("defectsynth", paper | values) for name, values in changed.items()}
drawn = {}
for name, config in (configs | {"as released": released}).items():
    fitted.config = config
    drawn[name] = torch.stack([item.image for item in fitted.sample(asked)])
fitted.config = usual
i = next(k for k, r in enumerate(asked) if r.defect == s.defects[-1])
pictured = [name for name in drawn if name not in ("neither", "SFF anywhere")]
figure = figures.sheet(
    [[asked[i].normal, *[drawn[name][i] for name in pictured]]], column_labels=["normal", *pictured],
    outline_masks=[[asked[i].mask] + [None] * len(pictured)], scale=128 / s.size,
)  # fmt: skip
figures.save(figure, folder, f"defectsynth_on_off_{s.category}")
figure

# %% [markdown]
# In numbers: the mean absolute change against the normal image (inside and outside the masks) and against the first row
# (inside), all in grey levels of 255; and what share of the cells inside the masks is *beyond the shots*: in some channel
# of the latents larger or smaller than any cell of any shot of that defect. Real defects that were held out go beyond the
# shots too; the last row says how often. Where a variant goes beyond much more often than they do, it has damaged what it
# drew.

# %%
normal, within = torch.stack([r.normal for r in asked]), torch.stack([r.mask for r in asked])
unseen = [item for item in s.held_out(seed) if item[2] != "good"]


def change(a, b, where):
    return ((a - b).abs() * 127.5).mean(1, keepdim=True)[where].mean().item()


def inside(images, masks):
    """The latents of the cells inside the masks, (cells, C)."""
    cells = diffusion.to_latents(torch.stack(masks), grid)[:, 0]
    return model.encode(torch.stack(images)).cpu().movedim(1, -1)[cells]


limits = {}
for d in s.defects:
    cells = inside(*zip(*[(shot.image, shot.mask) for shot in shots if shot.defect == d]))
    limits[d] = cells.amin(0), cells.amax(0)


def beyond(items):
    """The share of cells inside the masks of (image, mask, defect) that leave the range of their defect's shots."""
    found = [inside([i[0]], [i[1]]) for i in items]
    return (
        torch.cat([((z < limits[i[2]][0]) | (z > limits[i[2]][1])).any(1) for z, i in zip(found, items)])
        .double()
        .mean()
        .item()
    )


rows = []
for name, x in drawn.items():
    far = beyond([(image, r.mask, r.defect) for image, r in zip(x, asked)])
    rows.append(
        [name, change(x, normal, within), change(x, normal, ~within), change(x, drawn["SAE and SFF"], within), far]
    )
rows.append(["real, held out", None, None, None, beyond(unseen)])
columns = ["variant", "to the normal, inside", "outside", "to the first row, inside", "beyond the shots"]
effects = pd.DataFrame(rows, columns=columns).set_index("variant")
effects.round(3)

# %% [markdown]
# What SAE and SFF change is hard to see in the samples themselves: of each defect one with both, without each, and with SFF anywhere,
# and what each differs by from the one with both (white is 32 grey levels or more).

# %%
on, rows, compared = drawn["SAE and SFF"], [], ("no SAE", "no SFF", "SFF anywhere")
for d in s.defects:
    k = next(k for k, r in enumerate(asked) if r.defect == d)
    others = [drawn[name][k] for name in compared]
    apart = [((other - on[k]).abs().amax(0, keepdim=True) * 127.5 / 32).clamp(max=1) for other in others]
    rows.append([on[k], *[cell for pair in zip(others, apart) for cell in pair]])
titles = ["SAE and SFF", *[title for name in compared for title in (name, "difference")]]
figure = figures.sheet(rows, row_labels=list(s.defects), column_labels=titles, scale=128 / s.size)
figures.save(figure, folder, f"defectsynth_fusion_{s.category}")
figure

# %% [markdown]
# ## DualAnoDiff
#
# No mask is asked for: the image and the *anomaly part*, the image times its mask on mid-grey, are drawn together, and the
# mask is read off the part. Both go through one frozen UNet as two halves of one batch. Each half, or branch, has a LoRA of
# its own. After every attention layer the rows $h_a$, $h_b$ of a pair attend to each other at the same position (**SAIM**),
# with $u = W_i\,\mathrm{LN}(h)$; a softmax over two is a sigmoid $\sigma$:
#
# $$h_a \leftarrow h_a + W_o\left(v_b + \sigma\!\left(\tfrac{q_a \cdot (k_a - k_b)}{\sqrt{C}}\right)(v_a - v_b)\right),
# \qquad q = W_q u,\; k = W_k u,\; v = W_v u$$
#
# Background compensation (**BCM**) makes keys and values of the image branch's self-attention of
# $\varphi(z) + \gamma\,\mathrm{MLP}(\varphi(z_b))$, where $z_b$ is the image without its object, seen by the frozen base model
# at the same noise level; notebook 8 shows it, on a category of objects (`make reproduce` draws `dualanodiff_fig_4_gear`). One model is trained for every defect, to predict in both
# branches what the base predicts: noise, or velocity in the case of `tiny`; that base is adapted to the category's normal images
# first where the profile says so (notebook 5).

# %%
record = stages.fit(s, "dualanodiff", seed)
pair = s.load("dualanodiff", seed)
counts = pair.dual(s.defects[0]).branches.counts()
print(
    f"fitted in {record['metrics'][0]['value']:.1f} s, {pair.config.steps} steps a defect; in the UNet of one defect:"
)
print(
    ", ".join(f"{part} {n:,}" for part, n in counts.items())
    + f"; the frozen UNet {sum(w.numel() for w in pair.backbone.unet.parameters()):,}"
)
text_encoder = sum(v.numel() for name, v in next(iter(pair.states.values())).items() if "text_encoder" in name)
added = [
    BranchUNet(pair.backbone.unet, pair.config.rank, seed, compensation=True, released=form).counts()["BCM"]
    for form in (False, True)
]
print(
    f"LoRA of the text encoder {text_encoder:,}; BCM, where it is asked for, {added[0]:,} more (as released {added[1]:,})"
)

# %% [markdown]
# ### What each branch sees along the denoising
#
# The predicted end result of both branches at several points of the loop, for one request: how early the defect shows in
# either, and whether at the same place.

# %%
wanted = sampling.plan(shots, normals, 1, None, seed, s.prompts(), s.all_defects)
moments = (0.1, 0.25, 0.5, 0.75, 1.0)


def along(r, seen):
    """What the image and the part are taken for at the moments: their names, and two rows of images."""

    def note(done, latents, x0):
        if any(abs(done - m) < 0.5 / pair.config.num_inference_steps for m in moments):
            seen[f"{done:.0%} done"] = model.decode(x0[[0, len(x0) // 2]])
        return latents

    pair.denoised([r], hooks=[note])
    return list(seen), [list(images) for images in zip(*seen.values())]


names, drawn_along = zip(*[along(r, {}) for r in wanted[-1:]])
labels = [f"{r.defect}\n{branch}" for r in wanted[-1:] for branch in ("image", "part")]
rows = [row for pair_of_rows in drawn_along for row in pair_of_rows]
figure = figures.sheet(rows, row_labels=labels, column_labels=names[0], scale=128 / s.size)
figures.save(figure, folder, f"dualanodiff_branches_{s.category}")
figure

# %% [markdown]
# How early it can show: the shots themselves are noised to a level $t$ of 1,000, and both branches say in one step what lies beneath. Of the
# defect's contrast (to a ring around it; in a part, to mid-grey) the share that is found again, 1 being all, the mean over the shots: drawing goes
# from left to right. Where a defect is found again only under little noise, it is a detail that need not be drawn; where it comes back in the
# part sooner than in the image, a mask may have what the image does not show.

# %%
levels = (900, 700, 500, 300, 100)
rows = []
for shot in shots:
    dual = pair.dual(shot.defect)
    for t, shares in zip(levels, found_again(dual.branches, dual.text()[:2], model, shot, levels, seed)):
        rows += [(shot.defect, branch, t, share) for branch, share in zip(BRANCHES, shares)]
told = pd.DataFrame(rows, columns=["defect", "branch", "t", "share"]).groupby(["defect", "branch", "t"], sort=False)
told["share"].mean().unstack()[list(levels)].round(2)

# %% [markdown]
# ### From part to mask
#
# A drawn part's ground is a little lighter or darker than the mid-grey it was trained with, so it is read off the part's
# border (the median; further off than `tint` it is no ground, and the mask is full). The departure from it (white is
# 1 or more) is split by Otsu's threshold, never below a floor, and small specks are dropped. Threshold and tint stand with
# every mask, in its file and in `samples.csv`. A defect nearer to the ground than the floor cannot be seen in a part, nor
# the weaker tone of a strong one: how much of the real masks is found again in the shots' own parts is the ceiling.

# %%
rows, outlines = [], []
for r in wanted:
    (image,), (part,) = pair.denoised([r])
    found = extract(part, pair.config.floor, tint=pair.config.tint)
    departure = (part - ground(part)).abs().amax(0, keepdim=True).clamp(max=1)
    rows.append([image, part, departure, found.mask, image])
    outlines.append([None] * 4 + [found.mask])
    cut = f"cut at {found.threshold:.3f}, set by {found.by}, its ground off by {found.tint:.3f}"
    print(f"{r.defect}: {cut}; {found.mask.float().mean():.1%} of the image")
figure = figures.sheet(
    rows, row_labels=[r.defect for r in wanted], column_labels=["image", "part", "departure", "mask", "overlay"],
    outline_masks=outlines, scale=128 / s.size,
)  # fmt: skip
figures.save(figure, folder, f"dualanodiff_pairs_{s.category}")
figure

# %%
ceiling = pd.DataFrame(
    [[x.defect, regions.mask_iou(extract(x.image * x.mask, pair.config.floor, tint=0).mask, x.mask)] for x in shots],
    columns=["defect", "IoU of a real mask and what is read off its part"],
)
ceiling.groupby("defect", sort=False).describe().round(2)

# %% [markdown]
# The paper reads its masks by U²-Net, a saliency network. Where its weights are, the two are compared on the drawn parts.

# %%
if saliency.problem():
    print("U²-Net is not here; `python -m defectlib doctor` says how to get it.")
else:
    network, drawn_parts = saliency.load(), [pair.denoised([r])[1][0] for r in wanted]
    ours = [extract(part, pair.config.floor, tint=pair.config.tint).mask for part in drawn_parts]
    rows = [[part, mask, saliency.mask(part, network)] for part, mask in zip(drawn_parts, ours)]
    display(figures.sheet(rows, row_labels=[r.defect for r in wanted], column_labels=["part", "departure", "U²-Net"]))
    for r, (_, mask, theirs) in zip(wanted, rows):
        print(f"{r.defect}: IoU of the two masks {regions.mask_iou(mask, theirs)}")

# %% [markdown]
# ### Interaction, on and off
#
# What SAIM adds before any training: nothing, because its last layer starts at zero. The released code starts with random
# values and so disturbs the frozen model from its first step (`as_released()`).

# %%
own = pair.backbone
start = diffusion.noise_like([0, 1], own.latent_shape(s.size)).to(own.device)
text, t = own.embed(list(PROMPTS)), torch.tensor(500)
with torch.no_grad():
    plain = own.unet(start, t, text).sample
    for released in (False, True):
        untrained = BranchUNet(own.unet, pair.config.rank, 0, released=released)
        apart = (untrained(start, t, text) - plain).norm() / plain.norm()
        print(
            f"{'as released' if released else 'here'}: untrained branches depart from the base model by {apart:.2f} of its norm"
        )

# %% [markdown]
# The same fit and the same noise, with SAIM taken out while drawing: what is then drawn differently is what the branches tell
# each other. (A model trained without it is a variant of notebook 8.)

# %%
rows = []
for r in wanted[-1:]:
    together = pair.denoised([r])
    with pair.dual(r.defect).branches.apart():
        rows.append([images[0] for images in (*together, *pair.denoised([r]))])
titles = ["image, SAIM", "part, SAIM", "image, without", "part, without"]
figure = figures.sheet(rows, row_labels=[r.defect for r in wanted[-1:]], column_labels=titles, scale=128 / s.size)
figures.save(figure, folder, f"dualanodiff_interaction_{s.category}")
figure

# %% [markdown]
# ### Where the words look (Fig. 3)
#
# Cross-attention to "a vfx with" and to "sks" in each branch, the mean over the words' tokens, layers, heads and steps of one
# drawing (as in notebook 3, now after training); each map is stretched between its own extremes, white its highest, and its range is
# printed. With it its mean on the drawn mask, over that elsewhere: above 1 a word looks at the defect, below 1 it looks away from it.
# Nothing in training asks for the former, and which it is differs by word, branch and fit.

# %%
rows, labels = [], []
n = pair.config.batch_size
for r in wanted[-1:]:
    with attention.watched_text(pair.dual(r.defect).branches.unet) as looked:
        images, parts = pair.denoised([r])
    on = extract(parts[0], pair.config.floor, tint=pair.config.tint).mask
    rows_drawn = max(map(len, looked))  # a background's own pass has fewer rows, and no words
    maps = attention.text_maps([shares for shares in looked if len(shares) == rows_drawn], grid)
    for k, (branch, prompt, drawn_one) in enumerate(zip(BRANCHES, PROMPTS, (images[0], parts[0]))):
        first = (2 * k + 1) * n if pair.config.guidance_scale > 1 else k * n  # rows without a prompt come before
        own = dict(backbone.words(model.tokenizer, prompt))
        asked = {words: [i for w in words.split() if w in own for i in own[w]] for words in ("a vfx with", "sks")}
        found = {words: maps[first, at].mean(0, keepdim=True) for words, at in asked.items() if at}
        shown = [enlarged((m - m.min()) / (m.max() - m.min()).clamp_min(1e-12)) for m in found.values()]
        for words, m in found.items():
            told = f"{enlarged(m)[on].mean() / enlarged(m)[~on].mean():.2f}" if shape.usable(on) else "no usable mask"
            print(f"{branch}, '{words}': {m.min():.4f} to {m.max():.4f}; on the mask, over elsewhere: {told}")
        rows.append([drawn_one, *[None] * (2 - len(shown)), *shown])
        labels.append(f"{r.defect}\n{branch}")
figure = figures.sheet(rows, row_labels=labels, column_labels=["drawn", "a vfx with", "sks"], scale=128 / s.size)
figures.save(figure, folder, f"dualanodiff_attention_{s.category}")
figure

# %% [markdown]
# ## AdaBLDM
#
# A ControlNet reads a **trimap**, 1 on the defect, 0.5 on the object and 0 elsewhere, and steers the frozen base model. It is
# trained on *composites*, real defects turned, scaled and pasted on normal images, one model a defect (notebook 5 shows what
# it learns from). The text goes to the base model alone: the ControlNet's prompt is always empty.
#
# ### Four stages (Fig. 3)
#
# Drawing starts from noise. Over the first 40 % of the steps nothing is edited. Up to 90 % the latents outside the defect,
# widened a little, are replaced after each step by the normal image's, noised to the level that follows. Then the edit is
# one of pixels: what the latents are taken for is decoded, gets the normal's pixels outside the mask itself, and is encoded
# and noised again. Last, a copy of the decoder is trained for this one image. What the latents are taken for after each
# stage, and below, from the same noise, what they would be without edits:

# %%
record = stages.fit(s, "adabldm", seed)
blended = s.load("adabldm", seed)
usual = blended.config
print(
    f"fitted in {record['metrics'][0]['value']:.1f} s, {usual.steps or 'all'} steps a defect on {usual.composites} composites"
)
placed = sampling.plan(shots, normals, 1, s.mask_source("adabldm"), seed, s.prompts(), s.all_defects)
moments = (usual.latent_from, 0.65, usual.image_from, 1.0)


def taken_for(r, seen):
    """Images that the latents of a request are taken for at the moments, and what is decoded at last."""

    def note(done, latents, x0):
        if any(abs(done - m) < 0.5 / usual.num_inference_steps for m in moments):
            seen[f"{done:.0%}: {blended.config.stage(done)}"] = model.decode(x0[:1])[0]
        return latents

    return seen | {"decoded": model.decode(blended.denoised([r], [note])[:1])[0]}


r = placed[-1]
edited = taken_for(r, {}) | {"adapted decoder": blended.sample([r])[0].image}
blended.config = base.configure("adabldm", usual.model_dump() | {"latent_editing": False, "image_editing": False})
plain = taken_for(r, {})
blended.config = usual
figure = figures.sheet(
    [[r.normal, *edited.values()], [r.mask, *plain.values(), None]], row_labels=[f"{r.defect}\nedited", "without edits"],
    column_labels=["normal; mask", *edited],
)  # fmt: skip
figures.save(figure, folder, f"adabldm_fig_3_stages_{s.category}")
figure

# %% [markdown]
# ### What the network is told (Fig. 2)
#
# One step of it: a normal image, noised half-way; the trimap, which the ControlNet reads; what the latents are taken for by
# the base model with the prompt alone, and with the ControlNet's residuals added; and where the two differ (white: 64 grey
# levels or more). The difference is what the trimap says.

# %%
rows = []
model.scheduler.set_timesteps(usual.num_inference_steps)
for r in placed[-1:]:
    t, allowed = torch.tensor([600]), trimap.foreground(r.normal)
    noise = diffusion.noise_like([r.seed], model.latent_shape(s.size)).to(model.device)
    noisy = model.scheduler.add_noise(model.encode(r.normal[None]), noise, t)
    text, nothing = model.embed([r.prompt]), model.embed([""])
    told = trimap.trimap(r.mask, allowed)
    net, own = blended.net(r.defect), blended.backbone  # the base model that it was trained on, adapted or not
    with torch.no_grad(), embedded_once(net, told.expand(1, 3, -1, -1).to(model.device)) as hint:
        steer = steered(net, own, text, hint, control_text=nothing)
        guesses = [own.unet(noisy, t[0], text).sample, steer(noisy, t[0])]
    alone, with_it = (model.decode(model.scheduler.step(g, t[0], noisy).pred_original_sample)[0] for g in guesses)
    apart = ((with_it - alone).abs().amax(0, keepdim=True) * 2).clamp(max=1)
    rows.append([r.normal, told, model.decode(noisy)[0], alone, with_it, apart])
titles = ["normal", "trimap", "noised", "prompt alone", "with the trimap", "difference"]
figure = figures.sheet(rows, row_labels=[r.defect for r in placed[-1:]], column_labels=titles)
figures.save(figure, folder, f"adabldm_fig_2_network_{s.category}")
figure

# %% [markdown]
# ### Three styles of drawing a defect (Fig. 1)
#
# The paper sets its samples beside pasted ones and a GAN's. Here stand Crop-Paste, plain blended latent diffusion (the base
# model and its prompt alone, edited in latent space at every step: what AdaBLDM starts from), and AdaBLDM. The last two draw
# for the same mask from the same noise; Crop-Paste places a shot by itself.

# %%
titles, rows = ["normal", "trimap", "Crop-Paste", "blended latent diffusion", "AdaBLDM"], []
pasting = base.get("crop_paste")(base.configure("crop_paste", {}))
pasting.fit(shots, normals, prompts=s.prompts(), seed=0, workdir=p.dataset_folder())
for r in placed:
    noise = diffusion.noise_like([r.seed], model.latent_shape(s.size)).to(model.device)
    z = model.encode(r.normal[None])
    cells = diffusion.dilated(diffusion.to_latents(r.mask[None], grid), 1).to(model.device)
    blend = diffusion.kept_outside(cells, z, noise, model.scheduler)
    predict = diffusion.prompted(model, [r.prompt], usual.guidance_scale)
    alone = diffusion.denoise(predict, noise, model.scheduler, usual.num_inference_steps, [blend])
    drawn_here = [model.decode(alone)[0], blended.sample([r])[0].image]
    allowed = trimap.trimap(r.mask, trimap.foreground(r.normal))
    rows.append([r.normal, allowed, pasting.sample([r])[0].image, *drawn_here])
figure = figures.sheet(rows, row_labels=[r.defect for r in placed], column_labels=titles)
figures.save(figure, folder, f"adabldm_fig_1_styles_{s.category}")
figure

# %% [markdown]
# ## What was found

# %%
assert (changes["largest change outside the mask"] == 0).all()
print(
    f"Crop-Paste: {len(requests)} requests, {len(variants)} variants: no pixel outside a mask changed in any of them."
)
print(
    f"Alignment: mean overlap {motions['overlap before'].mean():.2f} before, {motions['overlap after'].mean():.2f} after."
)
largest = tail.loc["largest weight, median over steps"]
print(
    f"Largest SAE weight, median over steps: {largest['mask']:.1f} over the mask, {largest['image']:.1f} over the image."
)
shares = effects["beyond the shots"]
print(
    f"Cells beyond the shots: {shares['SAE and SFF']:.1%}; without limit to the weights "
    f"{shares['no limit to weights']:.1%}, without SAE {shares['no SAE']:.1%}; real, held out {shares['real, held out']:.1%}."
)
for name in ("no SAE", "no SFF", "as released"):
    print(f"DefectSynth, {name}: inside the masks {effects.loc[name, columns[3]]:.2f} grey levels from SAE and SFF.")
for d, iou in ceiling.groupby("defect", sort=False)[ceiling.columns[1]]:
    print(f"DualAnoDiff, {d}: masks read off real parts overlap the real masks with an IoU of {iou.mean():.2f}.")
print(s.stamp())
