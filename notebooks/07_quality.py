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
# # 7. Quality: KID, IS, LPIPS and how far to trust them
#
# Measures the samples against the real images: Tables **II** and **III** of DefectSynth, and the IS and IC-LPIPS that the
# other papers report. With 5 to 30 real images these numbers move a lot, and the same name stands for different
# computations in different papers. So every number here carries its protocol, and the last section shows how much the
# numbers move by themselves.
#
# An extractor's name is part of a number's name. Offline, features come from a small network trained on procedural
# textures (`tiny-kid`, `tiny-is`, `tiny-lpips`); its numbers mean something among themselves and are never set beside
# Inception's.
#
# One unit of this notebook is a category; `methods` and `seeds` are lists.

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

from defectlib import backbone, judges, params, sampling, stages, study
from defectlib.masks.extraction import extract
from defectlib.metrics import features, quality, regions, symmetry
from defectlib.report import explorer, figures, layout, tables

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## The measures
#
# * **KID**: squared maximum mean discrepancy between real and generated features, unbiased, polynomial kernel. Can be
#   negative for equal sets; lower is better. The subset size is min(real, generated, cap), because the usual 1,000 does
#   not exist here.
# * **IS**: exp of the mean divergence between the class distribution of an image and that of all. Higher is more varied.
# * **LPIPS**: distance to the nearest real image. DefectSynth reads it as diversity, so its tables have higher as better; but a
#   sample can also be far because it looks like nothing real.
# * **IC-LPIPS**: samples are assigned to their nearest shot; mean distance between samples of one cluster. Higher is more
#   diverse. Three protocols are in use; the one used here is named beside the number.
# * **Precision, recall, density, coverage** tell realism from variety, which one number mixes. A ball reaches from an image to
#   its third nearest neighbour among its own kind.
#   - precision: the share of samples that lie in a real image's ball;
#   - density: how many such balls a sample lies in, over three; samples of the real distribution itself would have 1;
#   - recall: the share of real images that lie in a sample's ball;
#   - coverage: the share of real balls that hold a sample; `of_real_itself` in its protocol is what the real distribution would
#     score with as many images.
# * **Distance to the shots**: the median distance of a sample to its nearest shot, around the defect, over the shots' own
#   distance to the next one. Near 0 the samples are copies. A high one is not better.

# %%
for method in s.methods:
    for seed in s.seeds:
        stages.quality(s, method, seed)
results = study.results(p, [s.category])
own = results[(results["stage"] == "quality") & results["method"].isin(s.methods)]
for row in own[own["value"].isna()].drop_duplicates(["method", "metric", "defect"]).itertuples():
    print(f"{row.method}, {row.defect}, {row.metric}: withheld; {json.loads(row.protocol)['why_withheld']}.")
own.pivot_table(index=["metric", "defect"], columns="method", values="value", aggfunc="mean", sort=False).round(3)

# %% [markdown]
# ### With error bars
#
# How far a number would move with other images of the same kind: the 95 % interval of a bootstrap over the images that its
# protocol names (`ci95_over`), around the value. **Where intervals of two methods overlap widely, the order of their values says
# nothing.** An interval covers neither the choice of the shots nor another training: that is what seeds are for, a bar each.

# %%
bounds = [json.loads(text).get("ci95", (float("nan"),) * 2) for text in own["protocol"]]
own = own.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])
measures = quality.names(s.settings.quality.extractor, s.settings.quality.perceptual)
measured = own[own["metric"].isin(measures) & own["value"].notna()]
measured = measured.sort_values("method", key=lambda names: names.map(s.methods.index), kind="stable")
figure = figures.intervals(measured) if len(measured) else None
if figure is not None:
    of_the_run = ["protocol", "git_sha", "dirty", "wall_s", "peak_memory_mb", "device", "path"]
    figures.save(figure, folder, f"quality_intervals_{s.category}", measured.drop(columns=of_the_run))
figure

# %% [markdown]
# The protocol of each number, as it is stored beside it:

# %%
first = own.drop_duplicates("metric")
pd.DataFrame([json.loads(text) for text in first["protocol"]], index=first["metric"]).T.fillna("")

# %% [markdown]
# ## How much the numbers move
#
# The same samples, measured on random halves, quarters and so on of them: the spread is what a difference between two
# methods has to exceed before it means anything. And KID of real against real, which should be zero, shows the noise of
# the measure itself.

# %%
method, seed, defect = s.methods[0], s.seeds[0], s.defects[0]
drawn = [item.image for item in sampling.load(s.folder(method, seed).path, defect)]
real = s.real(defect, seed)
extractor = features.load(s.settings.quality.extractor)
f_drawn, f_real = extractor(drawn), extractor(real)
spread = quality.subset_spread(f_real, f_drawn, repeats=20, seed=0)
looked = f"KID ×10³, {layout.method_title(method)}, {defect}"
moved = spread.assign(kid=1000 * spread["kid"]).rename(columns={"kid": looked, "n": "images of each set"})
figure = figures.spread(moved, x="images of each set", y=looked, hue="pair")
figures.save(figure, folder, f"kid_spread_{s.category}", spread)
figure

# %%
spread.groupby(["pair", "n"])["kid"].agg(["mean", "std"]).round(4)

# %% [markdown]
# A sample that was drawn through an autoencoder carries its marks everywhere, not only on the defect. What they cost alone:
# the same real images, encoded and decoded, against themselves.

# %%
base = backbone.load(s.settings.backbone)
kid = measures[0]
of = (
    own[(own["metric"] == kid) & own["method"].isin(s.methods)]
    .groupby(["defect", "method"], sort=False)["value"]
    .mean()
    .unstack()
    * 1000
)
for d in s.defects:
    pictures = s.real(d, seed)
    through = list(base.decode(base.encode(torch.stack(pictures))))
    rows = quality.evaluate(through, pictures, pictures, **s.quality_arguments())
    value = next(row["value"] for row in rows if row["metric"] == kid)  # withheld where there are few real images
    of.loc[d, "real, through the autoencoder"] = float("nan") if value is None else 1000 * value
of.round(1).rename(columns=layout.method_title)

# %% [markdown]
# ## Does the mask lie on the defect?
#
# A localiser trained on the real shots alone (the U-Net of notebook 9, with its settings; it has seen no sample) looks for
# the defect in every sample. **The IoU of what it finds above 0.5 with the sample's own mask** says whether the mask covers
# what an eye for real defects sees there. Real images that were held out set the scale: the localiser misses some of them
# too, and where it misses most of them (an IoU below 0.2) what it says of samples means nothing: the number is withheld from
# the tables. It is DualAnoDiff's question, whose masks are drawn along with the image (its Fig. 1, "mask aligned").

# %%
looked_at = {"real, held out": [(image, mask, d) for image, mask, d, _ in s.held_out(seed) if d != "good"]}
looked_at |= {m: [(x.image, x.mask, x.defect) for x in sampling.load(s.folder(m, seed).path)] for m in s.methods}
rows = []
for source, items in looked_at.items():
    if items:
        pictures, masks, names = zip(*items)
        found = judges.seen(s, seed, torch.stack(pictures), torch.stack(masks))
        rows += [[source, d, iou] for d, iou in zip(names, found)]
seen = pd.DataFrame(rows, columns=["source", "defect", "IoU"])
seen.groupby(["defect", "source"], sort=False)["IoU"].agg(["count", "mean", "median"]).round(3)

# %% [markdown]
# A mask that is read off an anomaly part can be no better than the part. How much of the shots' own masks is read off their perfect
# parts (the image times its mask, on mid-grey), and off those once they went through the autoencoder, as every drawn part does:
# the ceiling of what DualAnoDiff and the symmetry-aware system can reach, as IoU.

# %%
few = s.shots(seed)
through = base.decode(base.encode(torch.stack([shot.image * shot.mask for shot in few])))
ceiling = pd.DataFrame(
    [
        [shot.defect, *(regions.mask_iou(extract(part).mask, shot.mask) for part in (shot.image * shot.mask, lossy))]
        for shot, lossy in zip(few, through)
    ],
    columns=["defect", "off the part itself", "through the autoencoder"],
)
ceiling.groupby("defect", sort=False).mean().round(2)

# %% [markdown]
# ## Do drawn defects break what real ones break?
#
# The residual of an image under its own best symmetry, inside the mask over outside of it (`ratio`), over what the same mask has
# on normal images (`on_normals`; notebook 1): where `beyond` is above 1, the defect disturbs the regularity. Medians over up to
# 24 images of each source, with the 95 % interval of `beyond` over them; a source below the real one blends its
# defects in, or breaks the structure around them. In the picture, the image of each source whose ratio is nearest to the
# median, and its residual: white is a difference of 128 grey levels or more, plain grey is where an image has no copy. Below it stand the
# kind of symmetry that was found, how much of the mask has a copy (the rest tells nothing and does not count) and the ratio.

# %%
parts, typical = [], {}
usual = [symmetry.best_symmetry(image) for image in s.normals(seed)[:8]]
for source, items in looked_at.items():
    for d in dict.fromkeys(name for *_, name in items):
        own = [(image, mask) for image, mask, name in items if name == d and mask.any()][:24]
        if own:
            parts.append(symmetry.asymmetry(*zip(*own), usual).assign(source=source, defect=d))
            ratios = parts[-1]["ratio"]
            typical[source, d] = own[int((ratios - ratios.median()).abs().fillna(float("inf")).argmin())]
regular = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["defect", "source"])
whole = symmetry.summary(regular.sort_values("defect", kind="stable"), ["defect", "source"]) if parts else regular
whole.drop(columns="symmetries", errors="ignore").round(2)

# %%
rows, masks, told = [], [], []
for d in s.defects:
    shown = [typical.get((source, d)) for source in looked_at]
    found = [pair and symmetry.best_symmetry(pair[0]) for pair in shown]
    rows += [[pair and pair[0] for pair in shown], [one and one.picture() for one in found]]
    masks += [[pair and pair[1] for pair in shown]] * 2
    ratios = [pair and symmetry.asymmetry([pair[0]], [pair[1]])["ratio"].item() for pair in shown]
    copied = [one and f"{one.kind}, {one.copied(pair[1]):.0%} copied" for one, pair in zip(found, shown)]
    told += [[""] * len(shown), [one and f"{one}\nratio {ratio:.1f}" or "" for one, ratio in zip(copied, ratios)]]
labels = [text for d in s.defects for text in (d, "residual")]
titles = [layout.method_title(source) for source in looked_at]
figure = figures.sheet(rows, labels, titles, masks, captions=told) if parts else None
if figure is not None:
    figures.save(figure, folder, f"symmetry_of_samples_{s.category}", regular)
figure

# %% [markdown]
# ## The worst first
#
# A mean hides its tail. Here are the samples of a run sorted by any of their scores, with a running kernel of any category,
# method, variant and seed in the run folder: LPIPS to the nearest real image as above, distance to the nearest shot
# (notebook 6), the mask's IoU with what the localiser sees, its area and pieces, and the change inside and outside of it.
# **Which end of a score is the worse one says where to look first, not what is bad**: a good defect unlike any shot is far
# from them all too.

# %%
explorer.explore_sheet(s)

# %% [markdown]
# What it starts with, for those who read without a kernel: the last method's samples of the first defect that are least like
# any real image of it by LPIPS, each with its file's name and its score beneath.

# %%
explorer.contact_sheet(s, s.methods[-1], s.seeds[0], s.defects[0])

# %% [markdown]
# ## Tables II and III
#
# `published | reproduced | delta | why not comparable`. A cell that was not run is empty. This is the part of this
# category; the report writes the whole tables, with averages: `table_2` and `table_3`, beside `report.html`.

# %%
built = [tables.build(results, name) for name in ("table_2", "table_3")]
run_here = [table for table in built if table["reproduced"].notna().any()]
layout.view((run_here or built)[0])

# %% [markdown]
# ## What was found

# %%
width = spread[spread["pair"] == "real vs generated"].groupby("n")["kid"].std()
print(
    f"{method} on {s.category}/{defect}: with {width.index[0]} samples KID moves by {width.iloc[0]:.3f} (one standard deviation),"
)
print(f"with {width.index[-1]} by {width.iloc[-1]:.3f}. n_real = {len(real)}, n_generated = {len(drawn)}.")
for name in s.methods:
    print(
        f"{name}: KID x 1000 {of[name].mean():.1f}, {of['real, through the autoencoder'].mean():.1f} of real images through the autoencoder."
    )
told = results[(results["seed"] == seed) & (results["metric"] == judges.MASK_SEEN) & results["method"].isin(s.methods)]
for row in told[told["value"].notna()].itertuples():
    print(
        f"{row.method}, {row.defect}: masks overlap what a localiser of the shots finds with an IoU of {row.value:.2f}."
    )
print(s.stamp())
