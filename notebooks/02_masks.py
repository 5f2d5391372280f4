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
# # 2. Masks: where new defect shapes come from
#
# A generator that is told *where* to draw needs more masks than the few real ones. This notebook compares the sources of
# **Table VI**: Perlin noise, interpolation between two real masks in image space, interpolation in the latent space of the
# base model, and DefectSynth's hybrid of the two (stage 1 of its **Fig. 2**). Beside them stand affine copies of real masks,
# which Table V uses where interpolation is switched off. The notebook also finds the *foreground* of a normal image without
# labels, because a defect must lie on the object; AdaBLDM calls the resulting three-valued map a **trimap** (its Fig. 2).
#
# One unit of this notebook is a category.

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
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import torch
from IPython.display import display

from defectlib import backbone, diffusion, params, published, study
from defectlib.data import mini, splits
from defectlib.masks import interpolation, latent, random, shape, sources, trimap
from defectlib.metrics import regions
from defectlib.report import explorer, figures

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## Real masks, and the space to interpolate in
#
# All shots of the category, and the range of their areas, which a drawn mask has to keep. Where a defect's masks cover at
# least the share tau of the image on average, DefectSynth interpolates them in latent space, else in image space: a latent
# cell is several pixels wide, and a thin crack does not survive it.

# %%
by_defect = {d: [shot.mask for shot in s.shots() if shot.defect == d] for d in s.defects}
ranges = {d: [interpolation.area_of(mask) for mask in masks] for d, masks in by_defect.items()}
choice = {d: f"{interpolation.branch(masks)} space" for d, masks in by_defect.items()}
pd.DataFrame(
    [[d, len(v), min(v), float(np.mean(v)), max(v), interpolation.TAU, choice[d]] for d, v in ranges.items()],
    columns=["defect", "shots", "smallest area", "mean area", "largest area", "tau", "hybrid interpolates in"],
).round(4)

# %% [markdown]
# ## Foreground and trimap
#
# The foreground is found from the statistics of the image's border: where the border is one homogeneous surface that
# differs from the middle, the image shows an object and what resembles the border is background; otherwise the surface
# fills the frame. The trimap is 1 on the defect, 0.5 on the rest of the object and 0 on the background.

# %%
normals = s.normals()[:8]
objects = [trimap.foreground(image) for image in normals]
masks = [by_defect[s.defects[i % len(s.defects)]][0] & f for i, f in enumerate(objects)]
trimaps = [trimap.trimap(mask, f) for mask, f in zip(masks, objects)]
figure = figures.sheet([normals, objects, trimaps], row_labels=["normal", "foreground", "trimap"])
figures.save(figure, folder, f"adabldm_fig_2_trimap_{s.category}")
figure

# %% [markdown]
# How well is it found? The objects of `mini` are drawn, so its foregrounds are known. The overlap (IoU) of what is found with
# what is known, and that of the answer "everything is foreground", which is right on textures and a miss on objects. Where
# the finder is wrong on your own images, give your own masks: `foregrounds` names their folder.

# %%
if p.dataset == "mini":
    rows = splits.normal_rows(s.manifest(), s.category, limit=s.settings.data.max_normals).head(len(objects))
    known = [mini.foreground(s.category, "train/good", int(Path(i).stem), size=s.size) for i in rows["image"]]
    whole = torch.ones_like(known[0])
    overlaps = pd.DataFrame(
        [[regions.mask_iou(a, k), regions.mask_iou(whole, k)] for a, k in zip(objects, known)],
        columns=["found", "everything"],
    )
    display(overlaps.describe().loc[["mean", "min"]].round(3))
else:
    print(f"The foregrounds of {p.dataset} are not known: look at the sheet above.")

# %% [markdown]
# ### Where a mask may lie
#
# A moved mask must lie on the object with every pixel. All places where it does are counted at once, by one correlation of
# the mask with what is not object (in the picture: where its middle may lie, and how likely each place is under `affine_as_shots`, white the likeliest; then two draws of each source). One of them is drawn, each as likely as the
# next; with the source `affine_as_shots` a place is the likelier, the nearer its depth inside the object to that of a shot's
# mask, so that what sits on a rim stays there. Where the surface fills the frame, the two are the same.

# %%
rows = []
for i, d in enumerate(s.defects):
    few, normal, allowed = (
        [shot for shot in s.shots() if shot.defect == d],
        normals[i % len(normals)],
        objects[i % len(normals)],
    )
    depth, depths = trimap.depth(allowed), trimap.depths_of(tuple(few))
    places, patch = random.Places(allowed, depth), random.affine(few[0].mask, np.random.default_rng(i))
    corners = places.corners(patch)
    at = np.rint(corners + np.argwhere(patch[0].numpy()).mean(0)).astype(int).T
    middles, likely = torch.zeros(2, 1, s.size, s.size)
    middles[0, *at] = 1
    if len(corners):
        chances = random.chances(places.depths(patch, corners), depths)
        likely[0, *at] = torch.from_numpy(chances / chances.max()).float()
    draws = [
        sources.SOURCES[name](np.random.default_rng(k), few, normal)
        for name in ("affine", "affine_as_shots")
        for k in (0, 1)
    ]
    shown = random.at(patch, random.centred(patch, allowed), (s.size, s.size))
    maps = [middles, likely] if len(corners) else [None, None]
    rows.append([normal, shown, *maps, *[trimap.trimap(mask, allowed) for mask in draws]])
columns = ["normal", "a mask", "its middle", "how likely", "anywhere", "again", "as the shots", "again"]
figure = figures.sheet(rows, row_labels=list(s.defects), column_labels=columns, missing="fits nowhere whole")
figures.save(figure, folder, f"placement_{s.category}")
figure

# %% [markdown]
# ## To noise and back
#
# For the latent branch a mask is drawn white on black and encoded, and DDIM inversion runs the denoising loop backwards, to
# the noise from which the base model would draw this mask. From there the loop leads back to a picture, whose threshold is a
# mask again. Plain inversion asks the model one step behind the loop; here each step is solved by a few fixed-point
# iterations, and both are shown. What the way back loses, every interpolated mask loses too.

# %%
model = backbone.load(s.settings.backbone)
space = diffusion.latent_space(model)
rows, numbers = [], []
for d, (mask, *_) in by_defect.items():
    for kind, way_to in (("plain", diffusion.latent_space(model, iterations=1)), ("solved", space)):
        noise = way_to.noise(mask)
        back = way_to.from_noise(noise[None])[0]
        again = interpolation.threshold(back)
        cells = (noise[:1].cpu() / 6 + 0.5).clip(0, 1)  # three standard deviations each way
        rows.append([mask, cells.repeat_interleave(model.cell, 1).repeat_interleave(model.cell, 2), back, again])
        numbers.append([d, kind, noise.std().item(), ((mask & again).sum() / (mask | again).sum()).item()])
columns = ["mask", "its noise (first channel)", "the way back", "thresholded"]
way = pd.DataFrame(numbers, columns=["defect", "inversion", "sd of the noise", "IoU of mask and way back"])
figure = figures.sheet(
    rows, row_labels=(way["defect"] + "\n" + way["inversion"]).tolist(), column_labels=columns, scale=128 / s.size
)
figures.save(figure, folder, f"fig_2_inversion_{s.category}", way)
figure

# %%
way.round(3)

# %% [markdown]
# ## Between two masks
#
# In image space the white pixels of the one mask travel to those of the other. The paper pairs them in raster order, which
# pays no heed to shape; ours pairs them by optimal transport, piece by piece, and is the default: how many frames
# each of them keeps of 100 random pairs a kind is printed by `benchmarks/mask_interpolation.py`; raster as printed keeps none between two masks of two pieces. In latent space the two noises $z_0$ and $z_1$
# are interpolated along the sphere that noise lies on, by the angle $\omega$ between them (Eq. 4):
#
# $$z_\alpha = \frac{\sin((1 - \alpha)\,\omega)}{\sin \omega}\, z_0 + \frac{\sin(\alpha\,\omega)}{\sin \omega}\, z_1$$
#
# A frame is kept where it has as many pieces as its endpoints (where they differ, as many as the one, the other, or between)
# and an area within half to twice the interpolated one. Frames that are not kept are framed red. A latent frame that comes
# out black, but for specks beyond the rectangle that holds both masks, is refused and counted. The hybrid source goes by the paper's
# mean area alone: where latent space keeps few frames of a large defect, it draws pairs until one is kept.

# %%
n_frames = min(interpolation.FRAMES, s.settings.sample.n_per_defect)
n_pairs = 2
forms = ("raster", "transport", "latent")


def between(defect, form, pair, alphas):
    ends = [by_defect[defect][i] for i in pair]
    if form == "latent":
        return latent.interpolate(*ends, space, alphas)
    return interpolation.interpolate(*ends, alphas, form, by_piece=form == "transport")


rng = np.random.default_rng(0)
pairs = {  # the first and the last shot, for the picture; then random ones
    d: [(0, len(few) - 1), *(rng.choice(len(few), 2, replace=len(few) == 1) for _ in range(n_pairs - 1))]
    for d, few in by_defect.items()
}
alphas = interpolation.weights(n_frames)
frames = {(d, form): [between(d, form, pair, alphas) for pair in pairs[d]] for d in s.defects for form in forms}

# %%
red = torch.ones(1, s.size, s.size, dtype=torch.bool)
shown = {key: several[0] for key, several in frames.items()}
figure = figures.sheet(
    [[by_defect[d][0], *found.masks, by_defect[d][-1]] for (d, _), found in shown.items()],
    row_labels=[f"{d}\n{form}" for d, form in shown],
    outline_masks=[[None, *(red if why else None for why in found.refused), None] for found in shown.values()],
)
kept = pd.DataFrame(
    [
        [d, form, sum(len(f.masks) for f in several), sum(len(f.kept) for f in several),
         sum(why == "all black" for f in several for why in f.refused)]
        for (d, form), several in frames.items()
    ],
    columns=["defect", "form", "frames", "kept", "all black"],
)  # fmt: skip
figures.save(figure, folder, f"fig_2_interpolation_{s.category}", kept)
figure

# %%
kept

# %% [markdown]
# With a running kernel: slide alpha from the first shot's mask to the last one's. The picture below the widget shows the
# middle.


# %%
def slide(defect, form, alpha):
    drawn = between(defect, form, (0, -1), [alpha]).masks
    return figures.sheet([list(drawn)], row_labels=[f"{defect}\nalpha {alpha:.2f}"], scale=128 / s.size)


explorer.interactive(
    slide,
    defect=ipywidgets.Dropdown(description="defect", options=list(s.defects)),
    form=ipywidgets.Dropdown(description="form", options=["transport", "raster", "latent"]),
    alpha=ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.05, description="alpha", continuous_update=False),
)

# %%
slide(s.defects[0], "transport", 0.5)

# %% [markdown]
# ## Sources side by side
#
# *Perlin*: smooth noise, thresholded so that the area falls in the real range; its shapes know nothing of the defect.
# *Affine*: a real mask, flipped, rotated (0 to 360 degrees), scaled (0.85 to 1.15, as AdaBLDM does) and placed inside the
# foreground. *Image space* and *latent space*: the frames from above, pixels paired by transport; they need two shots of a
# defect. *Hybrid* is the one of the two that was chosen above.
#
# These are first draws. One with a flaw is framed red: in use it is drawn again.

# %%
n, pool = n_frames * n_pairs, {}
for d, masks in by_defect.items():
    few = [shot for shot in s.shots() if shot.defect == d]
    for name, title in (("perlin", "Perlin"), ("affine", "affine")):
        draw = sources.SOURCES[name]
        pool[d, title] = [(draw(np.random.default_rng(k), few, normals[k % len(normals)]), "") for k in range(n)]
    if len(masks) > 1:
        for form, title in (("transport", "image space"), ("latent", "latent space")):
            pool[d, title] = [drawn for f in frames[d, form] for drawn in zip(f.masks, f.refused)]


def flaws(defect, k, mask, refused):
    if refused:
        return (refused if refused == "all black" else "not kept between its ends",)
    return interpolation.flaws(mask, objects[k % len(normals)], (min(ranges[defect]), max(ranges[defect])))


wrong = {key: [flaws(key[0], k, *drawn) for k, drawn in enumerate(pool[key])] for key in pool}

# %%
few, shown = slice(None, None, max(1, n // 8)), {}
for d, masks in by_defect.items():
    shown[d, "real"] = [(mask, ()) for mask in masks]
    shown |= {key: list(zip((mask for mask, _ in pool[key]), wrong[key]))[few] for key in pool if key[0] == d}
figure = figures.sheet(
    [[mask for mask, _ in row[:8]] for row in shown.values()],
    row_labels=[f"{d}\n{title}" + (" (hybrid)" if title == choice[d] else "") for d, title in shown],
    outline_masks=[[red if why else None for _, why in row[:8]] for row in shown.values()],
)
figures.save(figure, folder, f"fig_2_mask_sources_{s.category}")
figure

# %% [markdown]
# ## The mask report
#
# What was wrong with the first draws of each source. A frame is first judged between its endpoints (*all black*, *not
# kept*), then every mask on the normal it is drawn for: *empty*, more than a tenth of it *outside the foreground*, or its
# *area outside the real range* (half the smallest to twice the largest). *Draws a mask* is how often one has to draw for one
# usable mask; `inf` says that none was usable.

# %%
reasons = [
    *("all black", "not kept between its ends", "empty", "outside the foreground", "area outside the real range")
]
report = pd.DataFrame({
    key: {"drawn": len(found), **{r: sum(r in why for why in found) for r in reasons}, "usable": found.count(())}
    for key, found in wrong.items()
}).T.rename_axis(["defect", "source"])  # fmt: skip
report["draws a mask"] = report["drawn"] / report["usable"]
report.round(2)

# %% [markdown]
# ## Mask IoU, as in Table VI
#
# The paper prints a "Mask IoU" without defining it. Here it is, in words: the real mask is moved and turned to where it
# overlaps the drawn one most (Eq. 5), the intersection over union of the two is taken, and of all shots of the defect the
# best one counts; so place and direction do not matter, shape and size do. The number is the mean over the usable masks of a
# source, and `NaN` where it has none. It asks for likeness to one shot and rewards a copy most; variety counts nothing, so a
# high value is no merit by itself.
#
# The published column is for MVTec AD's wood, with masks and a measure of the paper's own: it ranks the sources, and its
# values cannot be compared with ours.

# %%
usable = {
    key: [mask & objects[k % len(normals)] for k, (mask, _) in enumerate(drawn) if not wrong[key][k]]
    for key, drawn in pool.items()
}
scores = {key: [interpolation.mask_iou(mask, by_defect[key[0]]) for mask in masks] for key, masks in usable.items()}
scores |= {(d, "hybrid"): scores[d, space_of] for d, space_of in choice.items() if (d, space_of) in scores}
iou = pd.Series({key: np.mean(v) if v else np.nan for key, v in scores.items()}).unstack(0)[list(s.defects)]
printed = published.table("table_6").query("metric == 'mask_iou'").set_index("method")["value"]
names = {
    "Perlin": "defectsynth_perlin", "affine": None, "image space": "defectsynth_image_space",
    "latent space": "defectsynth_latent_space", "hybrid": "defectsynth",
}  # fmt: skip
iou = iou.reindex(list(names)).assign(
    mean=lambda t: t.mean(axis=1, skipna=False), published=[printed.get(m) for m in names.values()]
)
iou.round(2)

# %% [markdown]
# ## Shapes in numbers
#
# Three shape statistics of the usable masks of each source, beside those of the real masks: area, number of components, and
# elongation (ratio of the principal axes of the largest component). A source is plausible where its row is close to the
# real one.

# %%
judged = {(d, "real"): masks for d, masks in by_defect.items()} | usable
statistics = pd.DataFrame(
    [(*key, *shape.describe(mask)) for key, masks in judged.items() for mask in masks],
    columns=["defect", "source", "area", "components", "elongation"],
)
figures.save_data(statistics, folder, f"fig_2_mask_sources_{s.category}")
summary = statistics.groupby(["defect", "source"]).mean()
summary.reindex([key for d in s.defects for key in judged if key[0] == d and key in summary.index]).round(3)

# %% [markdown]
# ## What was found

# %%
share = float(torch.stack(objects).float().mean())
print(f"The foreground covers {share:.0%} of the first {len(normals)} normals of {s.category}.")
for d in s.defects:
    print(f"{d}: mean area {np.mean(ranges[d]):.3f}, so hybrid interpolates in {choice[d]} (tau {interpolation.TAU}).")
for (d, title), row in report.iterrows():
    measured = f", Mask IoU {iou.loc[title, d]:.2f}" if row["usable"] else ""
    print(f"{d}, {title}: {row['usable']:.0f} of {row['drawn']:.0f} first draws usable{measured}.")
print(
    f"A mask with a flaw is drawn again, {interpolation.ATTEMPTS} times at most; then the hybrid source turns to image "
    "space and counts it, and the others stop with the counts."
)
print(s.stamp())
