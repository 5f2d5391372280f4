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
# # 8. Ablation: every part on and off
#
# The papers' ablations are Tables **V** (modules), **VI** (mask strategies) and **VII** (time of SAE), all about
# DefectSynth, which is not part of this release: their cells stay empty below. What can be taken apart today is
# Crop-Paste: its turns, its foreground rule and its edge. Every variant is a field of the method's configuration, not a
# branch in this notebook.
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
import time

import pandas as pd

from defectlib import params, sampling, stages
from defectlib.methods import base
from defectlib.metrics import quality
from defectlib.report import figures, layout, tables

p = params.read(globals())
s = stages.study(p)
folder = stages.figures_folder(p)
figures.style()

# %% [markdown]
# ## The variants

# %%
variants = {
    "paper": {},
    "no turns": {"rotate": 0.0, "scale_low": 1.0, "scale_high": 1.0, "flip": False},
    "anywhere": {"inside_foreground": False},
    "feather 2 px": {"feather": 2.0},
}
pd.DataFrame({name: base.configure("crop_paste", values).model_dump() for name, values in variants.items()})

# %% [markdown]
# ## Quality and time of each
#
# Same shots, same requests, same seeds; only the field changes. Averages over the category's defects.

# %%
shots, normals, quick = s.shots(), s.normals(), s.settings.quality
requests = sampling.plan(shots, normals, s.settings.sample.n_per_defect, None, s.seeds[0], s.prompts(), s.all_defects)
rows, drawn, cost = [], {}, {}
for name, values in variants.items():
    method = base.get("crop_paste")(base.configure("crop_paste", values))
    method.fit(shots, normals, prompts=s.prompts(), seed=s.seeds[0], workdir=p.dataset_folder())
    clock = time.perf_counter()
    drawn[name] = method.sample(requests)
    cost[name] = (time.perf_counter() - clock) / len(requests) * 1000
    for defect in s.defects:
        refs = [shot.image for shot in shots if shot.defect == defect]
        samples = [item.image for item in drawn[name] if item.defect == defect]
        for row in quality.evaluate(samples, s.real(defect), refs, **s.quality_arguments()):
            rows.append([name, defect, row["metric"], row["value"]])
results = pd.DataFrame(rows, columns=["variant", "defect", "metric", "value"])
summary = results.pivot_table(index="variant", columns="metric", values="value", sort=False)
summary["ms a sample"] = pd.Series(cost)
summary.round(4)

# %%
n = min(4, s.settings.sample.n_per_defect)
picked = [i for d in s.defects for i in [k for k, r in enumerate(requests) if r.defect == d][:n]]
figure = figures.sheet(
    [[samples[i].image for i in picked] for samples in drawn.values()],
    row_labels=list(drawn), column_labels=[requests[i].defect for i in picked],
)  # fmt: skip
figures.save(figure, folder, f"ablation_crop_paste_{s.category}", results)
figure

# %% [markdown]
# ## Tables V, VI and VII
#
# Published only, until DefectSynth runs here. Table V is shown; the report writes all three: `table_5`, `table_6` and
# `table_7`, beside `report.html`.

# %%
layout.view(tables.build(stages.results(p, [s.category]), "table_5"))

# %% [markdown]
# ## What was found

# %%
kid = f"{quick.extractor}-kid"
for name, row in summary.iterrows():
    print(f"{name}: {kid} {row[kid]:.4f}, {row['ms a sample']:.1f} ms a sample.")
print(stages.stamp(s))
