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
seeds = None
split = None
tiles = None
grid = None
prompts = {}
runs_root = None
figures_root = None

# %%
import ipywidgets
import pandas as pd

from defectlib import params, sampling, stages
from defectlib.report import figures, layout, tables

p = params.read(globals())
s = stages.study(p)
folder = stages.figures_folder(p)
figures.style()

# %% [markdown]
# ## The prompts
#
# One text a defect. Crop-Paste ignores it; text-conditioned systems do not.

# %%
pd.Series(s.prompts(), name="prompt").to_frame()

# %% [markdown]
# ## Drawing

# %%
records = {(m, seed): stages.sample(s, m, seed) for m in s.methods for seed in s.seeds}
reports = {run: pd.read_csv(s.folder(*run).path / "samples.csv") for run in records}
report = pd.concat(
    [table.assign(method=m, seed_of_run=seed) for (m, seed), table in reports.items()], ignore_index=True
)
print(f"{len(report)} pairs in {len(records)} runs")

# %% [markdown]
# ## The report on the samples
#
# What spoils a training set is seldom seen on a sheet of eight: empty masks, masks over the whole image, images in which
# nothing was drawn. The change is the mean absolute difference to the normal image, in grey levels of 255. A background
# that a method promises to leave alone must show 0.

# %%
numbers = report.groupby(["method", "defect"], sort=False).agg(
    pairs=("seed", "size"), mean_area=("area", "mean"), components=("components", "mean"),
    change_inside=("change_inside", "mean"), change_outside=("change_outside", "max"),
)  # fmt: skip
numbers["bad"] = report.groupby(["method", "defect"], sort=False).apply(lambda t: len(sampling.problems(t)))
numbers.round(3)

# %% [markdown]
# ## Real, mask, generated
#
# For every defect: real images, drawn masks, and what was drawn for them. The outlines show the masks; look at the
# images without them first.

# %%
rows, labels, outlines = [], [], []
n = 6
for defect in s.defects:
    real = [shot for shot in s.shots(s.seeds[0]) if shot.defect == defect][:n]
    rows += [[shot.image for shot in real]]
    labels += [f"{defect}\nreal"]
    outlines += [[shot.mask for shot in real]]
    for method in s.methods:
        drawn = sampling.load(s.folder(method, s.seeds[0]).path, defect, limit=n)
        rows += [[item.mask for item in drawn], [item.image for item in drawn]]
        labels += [f"{defect}\nmask", f"{defect}\n{layout.method_title(method)}"]
        outlines += [[None] * len(drawn), [None] * len(drawn)]
figure = figures.sheet(rows, row_labels=labels, outline_masks=outlines)
figures.save(figure, folder, f"fig_3_generated_{s.category}")
figure

# %% [markdown]
# ## Explore
#
# With a running kernel: any method, seed and defect. The picture below the widget shows the first choice, so the page
# says the same without one.


# %%
def explore(method, seed, defect, first):
    drawn = sampling.load(s.folder(method, seed).path, defect)[first : first + 6]
    images, masks = [item.image for item in drawn], [item.mask for item in drawn]
    return figures.sheet([images, images], row_labels=["drawn", "mask"], outline_masks=[[None] * len(images), masks])


last = max(0, s.settings.sample.n_per_defect - 6)
ipywidgets.interactive(explore, method=list(s.methods), seed=list(s.seeds), defect=list(s.defects), first=(0, last))

# %%
explore(s.methods[0], s.seeds[0], s.defects[0], 0)

# %% [markdown]
# ## Table IV, inference
#
# Pairs per second. The published figures are for 256 px on an RTX 4090. This is the part of this category; the report
# writes the whole table: `table_4`, beside `report.html`.

# %%
layout.view(tables.build(stages.results(p, [s.category]), "table_4"))

# %% [markdown]
# ## What was found

# %%
bad = int(numbers["bad"].sum())
print(f"{len(report)} pairs drawn; {bad} of them have an empty mask, a full mask, or nothing drawn inside it.")
for (method, defect), row in numbers.iterrows():
    print(f"{method}, {defect}: mean area {row.mean_area:.3f}, change {row.change_inside:.0f} grey levels inside the mask, "
          f"at most {row.change_outside:.2g} outside.")  # fmt: skip
print(stages.stamp(s))
