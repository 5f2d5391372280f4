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
# A generator that is told *where* to draw needs more masks than the few real ones. This notebook compares three sources:
# Perlin noise (the random baseline of **Table VI**), affine copies of real masks in image space (what Table V uses when
# interpolation is switched off, and what Crop-Paste does with whole patches), and DefectSynth's own, interpolation between
# two real masks in image space. Its second branch, interpolation in latent space, is not part of this release. The notebook
# also finds the *foreground* of a normal image without labels, because a defect must lie on the object; AdaBLDM calls the
# resulting three-valued map a **trimap** (its Fig. 2).
#
# One unit of this notebook is a category.

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
import ipywidgets
import numpy as np
import pandas as pd
import torch

from defectlib import params, stages
from defectlib.masks import interpolation, shape, trimap
from defectlib.masks import random as random_masks
from defectlib.report import figures

p = params.read(globals())
s = stages.study(p)
folder = stages.figures_folder(p)
figures.style()

# %% [markdown]
# ## Real masks
#
# All shots of the category, and the range of their areas, which the random sources are asked to keep.

# %%
shots = s.shots()
by_defect = {d: [shot for shot in shots if shot.defect == d] for d in s.defects}
ranges = {d: [shot.mask.float().mean().item() for shot in few] for d, few in by_defect.items()}
pd.DataFrame(
    [[d, len(v), min(v), float(np.mean(v)), max(v)] for d, v in ranges.items()],
    columns=["defect", "shots", "smallest area", "mean area", "largest area"],
).round(4)

# %% [markdown]
# ## Sources side by side
#
# *Perlin*: smooth noise, thresholded so that the area falls in the real range; its shapes know nothing of the defect.
# *Affine*: a real mask, flipped, rotated about its centre (0 to 360 degrees) and scaled (0.85 to 1.15, as AdaBLDM does).
# *Interpolated*: a mask between two random shots' masks at a random weight; it needs two shots of a defect. Each mask comes
# from its own seed.

# %%
n = 24
size = s.size


def perlin(defect, seed):
    return random_masks.perlin(np.random.default_rng(seed), size, (min(ranges[defect]), max(ranges[defect])))


def affine(defect, seed):
    rng = np.random.default_rng(seed)
    shot = by_defect[defect][rng.integers(len(by_defect[defect]))]
    patch = random_masks.affine(shot.mask, rng)
    corner = random_masks.place(patch, torch.ones(1, size, size, dtype=torch.bool), rng)
    return shot.mask if corner is None else random_masks.at(patch, corner, (size, size))


def interpolated(defect, seed):
    return interpolation.hmi_image(np.random.default_rng(seed), by_defect[defect], s.normals()[0])


sources = {"real": lambda d, i: by_defect[d][i % len(by_defect[d])].mask, "Perlin": perlin, "affine": affine}
if min(len(few) for few in by_defect.values()) > 1:
    sources["interpolated"] = interpolated
drawn = {(d, name): [draw(d, i) for i in range(n)] for d in s.defects for name, draw in sources.items()}

# %%
figure = figures.sheet([masks[:8] for masks in drawn.values()], row_labels=[f"{d}\n{name}" for d, name in drawn])
figures.save(figure, folder, f"fig_2_mask_sources_{s.category}")
figure

# %% [markdown]
# ## In numbers
#
# Three shape statistics of each source, beside those of the real masks: area, number of components, and elongation (ratio
# of the principal axes of the largest component). A source is plausible where its row is close to the real one.

# %%
statistics = pd.DataFrame(
    [(d, name, *shape.describe(mask)) for (d, name), masks in drawn.items() for mask in masks],
    columns=["defect", "source", "area", "components", "elongation"],
)
summary = statistics.groupby(["defect", "source"], sort=False).mean().round(3)
figures.save_data(statistics, folder, f"fig_2_mask_sources_{s.category}")
summary

# %% [markdown]
# ## Between two masks
#
# The white pixels of the one mask travel to those of the other. The paper pairs them in raster order, which pays no heed to
# shape; ours pairs them by optimal transport, piece by piece. A frame is kept where it has as many pieces as its endpoints
# and an area within half to twice the interpolated one; frames that are not kept are drawn red.

# %%
forms = ("raster", "transport")


def between(defect, form, alphas=None):
    ends = by_defect[defect][0].mask, by_defect[defect][-1].mask
    return interpolation.interpolate(*ends, alphas, form, by_piece=form == "transport")


rows, outlines, kept = [], [], []
for d in s.defects:
    for form in forms:
        frames = between(d, form)
        rows.append([by_defect[d][0].mask, *frames.masks, by_defect[d][-1].mask])
        outlines.append([None, *(mask if why else None for mask, why in zip(frames.masks, frames.refused)), None])
        kept.append([d, form, len(frames.kept), len(frames.masks)])
figure = figures.sheet(rows, row_labels=[f"{d}\n{form}" for d, form, *_ in kept], outline_masks=outlines)
kept = pd.DataFrame(kept, columns=["defect", "correspondence", "frames kept", "frames"])
figures.save(figure, folder, f"fig_2_interpolation_{s.category}", kept)
figure

# %%
kept

# %% [markdown]
# With a running kernel: slide alpha from the first shot's mask to the last one's. The picture below the widget shows the
# middle.


# %%
def slide(defect, form, alpha):
    return figures.sheet([list(between(defect, form, [alpha]).masks)], row_labels=[f"{defect}\nalpha {alpha:.2f}"])


ipywidgets.interactive(slide, defect=list(s.defects), form=list(forms[::-1]), alpha=(0.0, 1.0, 0.05))

# %%
slide(s.defects[0], "transport", 0.5)

# %% [markdown]
# ## Foreground and trimap
#
# The foreground is found from the statistics of the image's border: where the border is one homogeneous surface that
# differs from the middle, the image shows an object and what resembles the border is background; otherwise the surface
# fills the frame. The trimap is 1 on the defect, 0.5 on the rest of the object and 0 on the background.

# %%
normals = s.normals()[:8]
foregrounds = [trimap.foreground(image) for image in normals]
masks = [by_defect[s.defects[i % len(s.defects)]][0].mask & f for i, f in enumerate(foregrounds)]
trimaps = [trimap.trimap(mask, f) for mask, f in zip(masks, foregrounds)]
figure = figures.sheet([normals, foregrounds, trimaps], row_labels=["normal", "foreground", "trimap"])
figures.save(figure, folder, f"adabldm_fig_2_trimap_{s.category}")
figure

# %% [markdown]
# ## What was found

# %%
share = float(torch.stack(foregrounds).float().mean())
print(f"The foreground covers {share:.0%} of the first {len(normals)} normals of {s.category}.")
for d in s.defects:
    real, noise, copies = (summary.loc[(d, name), "elongation"] for name in ("real", "Perlin", "affine"))
    print(f"{d}: elongation {real:.1f} real, {noise:.1f} Perlin, {copies:.1f} affine copies.")
print(stages.stamp(s))
