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
# # 5. Training: what is learned from a few shots
#
# Fits every method on the shots of one category, for every seed, and reports what a fit costs. This is the training half
# of **Table IV**. A fit that is complete with the same parameters is read from its run folder, not repeated; a killed one
# is continued.
#
# Crop-Paste, the method of this release, learns nothing: its fit keeps the shots, and its cost is that of reading them.
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
import pandas as pd

from defectlib import params, stages
from defectlib.methods import base
from defectlib.report import layout, tables

p = params.read(globals())
s = stages.study(p)

# %% [markdown]
# ## What goes in

# %%
shots, normals = s.shots(s.seeds[0]), s.normals(s.seeds[0])
print(f"{s.category}: {len(normals)} normals of {s.size} px, shots per defect:")
pd.Series([shot.defect for shot in shots]).value_counts(sort=False).rename("shots").to_frame()

# %% [markdown]
# ## Configuration
#
# The defaults are the paper's; a profile may name other values, and unknown ones are refused.

# %%
configs = {name: base.configure(name, s.settings.methods.get(name, {})).model_dump() for name in s.methods}
pd.DataFrame(configs)

# %% [markdown]
# ## Fitting

# %%
records = {(method, seed): stages.fit(s, method, seed) for method in s.methods for seed in s.seeds}
rows = []
for (method, seed), record in records.items():
    files = [file for file in s.folder(method, seed).model.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 2**20
    rows.append([method, seed, record["metrics"][0]["value"], size, record["peak_memory_mb"], record["device"]])
cost = pd.DataFrame(rows, columns=["method", "seed", "fit seconds", "model MiB", "peak memory MiB", "device"])
cost.round(3)

# %% [markdown]
# ## Table IV, training
#
# The published times are for one defect of MVTec AD (wood/hole, 256 px, 50 epochs, batch 1) on an RTX 4090. What is
# measured here is another protocol, and the table says so. This is the part of this category; the report writes the
# whole table: `table_4`, beside `report.html`.

# %%
layout.view(tables.build(stages.results(p, [s.category]), "table_4"))

# %% [markdown]
# ## What was found

# %%
print(
    f"{len(records)} fits; the longest took {cost['fit seconds'].max():.2f} s and the largest model is {cost['model MiB'].max():.1f} MiB."
)
print(stages.stamp(s))
