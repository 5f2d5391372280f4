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
# # 6. Generation: drawing the set
#
# Draws the requested number of image-mask pairs for every defect, method and seed, looks at all of them in a few numbers,
# and shows them beside the real ones: DefectSynth's **Figures 3 and 4**, DualAnoDiff's Fig. 5 and AdaBLDM's Figs. 4 and 5
# are sheets of this kind.
#
# A sample depends on its request alone: the same seed gives the same pixels in any order, in any batch and after a
# restart. Files are named by their seed.
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
import pandas as pd

from defectlib import images, params, sampling, stages, study
from defectlib.metrics import features, nearest
from defectlib.report import explorer, figures, layout, tables
from defectlib.types import Shot

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## The prompts
#
# One text a defect. Crop-Paste ignores it; DefectSynth was trained with it and draws with it; so was AdaBLDM, whose ControlNet
# alone reads an empty one; DualAnoDiff has its paper's two, "a vfx with sks" and "sks", for every defect.

# %%
pd.Series(s.prompts(), name="prompt").to_frame()

# %% [markdown]
# ## Drawing

# %%
records = {(m, seed): stages.sample(s, m, seed) for m in s.methods for seed in s.seeds}
reports = {run: sampling.read_report(s.folder(*run).path) for run in records}
report = pd.concat(
    [table.assign(method=m, seed_of_run=seed) for (m, seed), table in reports.items()], ignore_index=True
)
print(f"{len(report)} pairs in {len(records)} runs")

# %% [markdown]
# ## The report on the samples
#
# What spoils a training set is seldom seen on a sheet: empty masks, masks over the whole image, images in which nothing
# was drawn. The change is the mean absolute difference to the normal image, in grey levels of 255. A background that a
# method promises to keep must show 0 outside; where it does not promise that, the number is what passing through its
# autoencoder changes (for AdaBLDM with a decoder adapted to each image), and what it draws beside the mask. DualAnoDiff draws no normal image over: its change is that to an
# image it has not looked at, inside and outside alike.

# %%
numbers = report.groupby(["method", "defect"], sort=False).agg(
    pairs=("seed", "size"), mean_area=("area", "mean"), components=("components", "mean"),
    change_inside=("change_inside", "mean"), change_outside=("change_outside", "max"),
)  # fmt: skip
numbers["background_kept"] = [s.method_of(method).preserves_background for method, _ in numbers.index]
numbers["bad"] = report.groupby(["method", "defect"], sort=False).apply(lambda t: len(sampling.problems(t)))
numbers.round(3)

# %% [markdown]
# ### What was drawn again
#
# Before a mask reaches a method it is checked (empty, outside the foreground, an area no real defect has), and drawn again if
# it fails, with a bound; a method that draws its own masks draws the pair again where the mask is empty, full, or of a size
# that no real one has. Both are counted, and so are the masks that the hybrid source took from image space because latent
# space gave none, and the drawn masks that are a shot's (an IoU above 0.95, turned or not). A pair that still has a flaw after the last drawing is kept, counted as bad, and left out of what
# localisers learn from.

# %%
again = pd.DataFrame(
    [
        [m, seed, row.get("defect", "all"), row["metric"].replace("_", " "), int(row["value"]), row["protocol"]["n_generated"],
         ", ".join(f"{why} {n}" for why, n in row["protocol"].get("reasons", {}).items())]
        for (m, seed), record in records.items() for row in record["metrics"]
        if row["metric"] in ("masks_refused", "pairs_redrawn", "masks_copied")
    ],
    columns=["method", "seed", "defect", "what", "times", "for pairs", "why"],
).set_index(["method", "seed"])  # fmt: skip
again

# %% [markdown]
# ## At a glance
#
# Of every defect the first shot, and the first sample of each method, not its best, with their masks.

# %%
rows, labels, seed = [], [], s.seeds[0]
for defect in s.defects:
    real = next(shot for shot in s.shots(seed) if shot.defect == defect)
    firsts = [sampling.first(s.folder(m, seed).path, defect) for m in s.methods]
    rows += [[item and item.image for item in (real, *firsts)], [item and item.mask for item in (real, *firsts)]]
    labels += [defect, "mask"]
titles = ["real", *map(layout.method_title, s.methods)]
figure = figures.sheet(rows, row_labels=labels, column_labels=titles, missing="none kept")
figures.save(figure, folder, f"overview_{s.category}")
figure

# %% [markdown]
# ## Real, mask, generated
#
# For every defect: real masks and images, then for each method the masks and what was drawn for them. These carry no outline:
# whether a defect is seen without one is the question. Where a method draws its masks itself, the anomaly parts stand in their
# place, with the masks read off them outlined.

# %%
rows, labels, outlines = [], [], []
n = 3
for defect in s.defects:
    real = [shot for shot in s.shots(s.seeds[0]) if shot.defect == defect][:n]
    named = defect.replace("_", " ")
    rows += [[shot.mask for shot in real], [shot.image for shot in real]]
    labels += [f"{named}\nreal masks", f"{named}\nreal"]
    outlines += [[None] * len(real)] * 2
    for method in s.methods:
        drawn = sampling.load(s.folder(method, s.seeds[0]).path, defect, limit=n)
        parts = [sampling.part_file(s.folder(method, s.seeds[0]).path, item.seed) for item in drawn]
        parts = [images.read_image(file) for file in parts if file.is_file()]
        rows += [parts or [item.mask for item in drawn], [item.image for item in drawn]]
        title = layout.method_title(method)
        labels += [f"{title}\n{'parts' if parts else 'masks'}", f"{named}\n{title}"]
        outlines += [[item.mask if parts else None for item in drawn], [None] * len(drawn)]
fold = len(rows) // len(s.defects)
figure = figures.sheet(rows, row_labels=labels, outline_masks=outlines, scale=64 / s.size, fold=fold)
figures.save(figure, folder, f"fig_3_generated_{s.category}")
figure

# %% [markdown]
# ## Pairs that are drawn together (DualAnoDiff Fig. 5)
#
# Of every defect the first pair that a method kept, from its files: the image, the anomaly part, the mask read off the part, and the
# mask on the image. Beside it stand the drawing at which it was kept (one with a flaw is drawn again, with a bound), the threshold and
# what set it, and the flaw that was left, if any.

# %%
together = [m for m in s.methods if s.method_of(m).makes_masks and s.method_of(m).needs_backbone]
rows, labels, outlines = [], [], []
for m in together:
    told = reports[m, seed].drop_duplicates("defect")
    for row in told.itertuples():
        (image, mask), kept = sampling.read_pair(s.folder(m, seed).path, row.seed), s.folder(m, seed).path
        rows.append([image, images.read_image(sampling.part_file(kept, row.seed)), mask, image])
        flaw = f"\n{row.flaw}" if row.flaw else ""
        cut = f"{float(row.threshold):.2f} ({row.threshold_by})"
        labels.append(f"{layout.method_title(m)}\n{row.defect}\ndrawing {row.drawing}, cut at {cut}{flaw}")
        outlines.append([None, None, None, mask])
if together:
    figure = figures.sheet(
        rows, row_labels=labels, column_labels=["image", "part", "mask", "overlay"], outline_masks=outlines,
        scale=64 / s.size,
    )  # fmt: skip
    figures.save(figure, folder, f"fig_5_pairs_{s.category}")
figure if together else "No method here draws its masks together with its images."

# %% [markdown]
# ## The failures
#
# The sheet above shows the first samples, good or bad. This one looks for the worst: for every sample the distance to the
# nearest shot of its defect, in the features of the profile's extractor. Compared is a square around the defect, as large
# as the largest shot needs, because the rest of the image differs from shot to shot anyway. **A large distance says that a
# sample is drawn least like any real defect.** That need not be wrong (a new, good one is far from the shots too), so held-out
# real defects stand in the same table, and the twelve farthest samples of each method that learns are shown, by defect and the
# farthest first, to be judged by eye, under their masks and with their distances. A star marks those that the report above counts as bad.

# %%
extract = features.load(s.settings.quality.extractor)
shots = {d: [shot for shot in s.shots(seed) if shot.defect == d] for d in s.defects}
unseen = [Shot(image, mask, s.category, d, name) for image, mask, d, name in s.held_out(seed) if d != "good"]
found = []
for d in s.defects:
    if real := [shot for shot in unseen if shot.defect == d]:
        found.append(nearest.nearest_shots(real, shots[d], extract).assign(source="real, held out", defect=d))
    for method in s.methods:
        if drawn := sampling.load(s.folder(method, seed).path, d):
            table = nearest.nearest_shots(drawn, shots[d], extract).assign(source=method, defect=d)
            found.append(table.assign(seed=[drawn[i].seed for i in table["sample"]]))
distances = pd.concat(found, ignore_index=True)
distances.groupby(["defect", "source"], sort=False)["distance"].describe()[["count", "min", "50%", "max"]].round(2)

# %%
learning = [method for method in s.methods if s.method_of(method).needs_backbone] or list(s.methods)
ranked = distances[distances["source"].isin(learning)].sort_values("distance", ascending=False, kind="stable")
ranked = ranked.groupby("source").head(12).astype({"seed": int})
rows, titles, captions = [], [], []
bad = {method: set(sampling.problems(reports[method, seed])["seed"]) for method in learning}
for method in learning:
    own = ranked[ranked["source"] == method].sort_values(
        "defect", key=lambda names: names.map(s.defects.index), kind="stable"
    )
    drawn = [sampling.read_pair(s.folder(method, seed).path, one) for one in own["seed"]]
    rows += [[mask for _, mask in drawn], [image for image, _ in drawn]]
    titles += ["masks", layout.method_title(method)]
    heads = own["defect"].where(~own["defect"].duplicated(), "").str.replace("_", " ")  # under the first of each defect
    stars = ["*" if one in bad[method] else "" for one in own["seed"]]
    told = [f"{head}\n{far:.2f}{star}" for head, far, star in zip(heads, own["distance"], stars)]
    captions += [[""] * len(drawn), told]
listed = ranked[["source", "defect", "seed", "distance"]].reset_index(drop=True)
reals = distances[distances["source"] == "real, held out"].groupby("defect", sort=False)["distance"].max()
meant = "Below each: the distance to the nearest shot"
if len(reals):
    meant += "; of real, held-out ones it is at most "
    meant += ", ".join(f"{far:.2f} ({d.replace('_', ' ')})" for d, far in reals.items())
if any(bad.values()):
    meant += ".\n*: a mask that is empty, full or of a size no real one has, or nothing drawn inside it"
figure = None
if len(listed):
    figure = figures.sheet(rows, row_labels=titles, captions=captions, scale=64 / s.size, title=meant)
    figures.save(figure, folder, f"failures_{s.category}", listed)
figure

# %%
listed.groupby(["source", "defect"], sort=False)["distance"].describe()[["count", "min", "max"]].round(2)

# %% [markdown]
# ## Explore
#
# With a running kernel: any sample that is drawn, of any category, method, variant and seed in this run folder, beside the
# shot that it is nearest to. The slider lays its mask over it: at 0 it is what a classifier sees, at 1 nothing but the mask
# is left of the defect. Nothing is drawn or trained here: the mask's IoU with what is seen there appears once notebook 7 has
# trained its localiser, and only where that finds real defects.

# %%
explorer.explore_samples(s)

# %% [markdown]
# What it starts with, for those who read without a kernel: the last method's first sample. Distance and LPIPS are in the
# profile's networks, named in brackets; changes are in grey levels of 255.

# %%
explorer.view(s, s.methods[-1], s.seeds[0], s.defects[0])

# %% [markdown]
# ## Table IV, inference
#
# Pairs per second of drawing; where masks come from a source, it has drawn them before the clock starts. The published
# figures are for 256 px on an RTX 4090. This is the part of this category; the report writes the whole table: `table_4`,
# beside `report.html`.

# %%
layout.view(tables.build(study.results(p, [s.category]), "table_4"))

# %% [markdown]
# ## What was found

# %%
bad = int(numbers["bad"].sum())
for what, times in again.groupby("what")["times"].sum().items():
    print(f"{what}: {times}")
print(
    f"{len(report)} pairs drawn; {bad} of them have a mask that is empty, full or of a size no real one has, or, on a normal image, nothing drawn inside it."
)
for (method, defect), row in numbers.iterrows():
    print(f"{method}, {defect}: mean area {row.mean_area:.3f}, change {row.change_inside:.0f} grey levels inside the mask, "
          f"at most {row.change_outside:.2g} outside.")  # fmt: skip
for method, own in distances.groupby("source", sort=False):
    print(f"{method}: median distance to the nearest shot {own['distance'].median():.2f}, "
          f"largest {own['distance'].max():.2f}.")  # fmt: skip
print(s.stamp())
