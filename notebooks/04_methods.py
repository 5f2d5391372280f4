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
# shows every idea switched on and off. In this release that is **Crop-Paste**, the baseline of DefectSynth's Tables II,
# III, VIII and IX; the four diffusion systems of the papers are not part of it yet.

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
import numpy as np
import pandas as pd
import torch

from defectlib import params, sampling, stages
from defectlib.masks import random as random_masks
from defectlib.masks import trimap
from defectlib.methods import base, crop_paste
from defectlib.report import figures

p = params.read(globals())
s = stages.study(p)
folder = stages.figures_folder(p)
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
    y, x = random_masks.place(mask, allowed, rng) or random_masks.centred(mask, allowed)  # it may fit nowhere whole
    drawn, placed = crop_paste.paste(normal, patch, mask, y, x, feather=0)
    moved, _ = crop_paste.paste(torch.zeros_like(normal), patch, mask, y, x, feather=0)
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
few = {d: 4 for d in s.defects}
requests = sampling.plan(shots, normals, 4, None, 0, s.prompts(), s.all_defects)
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
    [[item.image for item in samples] for samples in drawn.values()],
    row_labels=list(drawn), column_labels=[request.defect for request in requests],
    outline_masks=None,
)  # fmt: skip
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
# ## What was found

# %%
assert (changes["largest change outside the mask"] == 0).all()
print(f"{len(requests)} requests, {len(variants)} variants: no pixel outside a mask changed in any of them.")
print(stages.stamp(s))
