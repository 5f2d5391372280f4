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
# # 9. Downstream: are the samples good for anything?
#
# The test that counts: a classifier and a localiser are trained on the samples and tested on real images that nobody has
# seen. Tables **VIII** (ResNet-34 classification), **IX** (U-Net localisation) and **X** (tires) of DefectSynth, and the
# headline numbers of the other papers, are of this kind.
#
# Two rows are always there: `shots_only`, the same model trained on the few real shots for as many steps (the papers'
# "w/o augmentation"), and `crop_paste`. The model of the last step is tested: no checkpoint is chosen by its test score,
# as the released evaluations do.
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
foregrounds = None
runs_root = None
figures_root = None

# %%
import numpy as np
import pandas as pd

from defectlib import evaluation, params, study
from defectlib.metrics import regions
from defectlib.report import claims, figures, layout, tables

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## Train and test

# %%
rows = [study.SHOTS_ONLY, *s.methods]
records = {(method, seed): evaluation.downstream(s, method, seed) for method in rows for seed in s.seeds}
scores = pd.DataFrame(
    [
        (method, seed, m["metric"], m.get("defect", ""), m["value"])
        for (method, seed), record in records.items() for m in record["metrics"]
    ],
    columns=["method", "seed", "metric", "defect", "value"],
)  # fmt: skip
scores = scores.astype({"value": float})
withheld = dict.fromkeys(
    f"{name}: {m['protocol']['why_withheld']}"
    for (name, _), record in records.items() for m in record["metrics"] if m["value"] is None
)  # fmt: skip
single = scores[scores["metric"].str.endswith(regions.BY_DEFECT)]  # of one defect each, further down
scores = scores.drop(single.index)
tested = bool(scores["value"].notna().any())
print(*withheld, sep="\n")
grouped = scores.groupby(["metric", "method"], sort=False)["value"]
mean, sd = grouped.mean().unstack()[rows], grouped.std().unstack()[rows]
print(f"mean over {len(s.seeds)} seed(s); the standard deviation follows")
pd.concat([mean, sd.add_suffix(" sd")], axis=1).round(3)

# %%
shown = scores[scores["metric"].isin(["accuracy", "f1_macro", "image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1_50"])]
figure = figures.compare(shown) if tested else None
if tested:
    figures.save(figure, folder, f"downstream_{s.category}", scores)
figure

# %% [markdown]
# ### Defect by defect
#
# The localiser on the images of one defect and all normals, and the share of a defect's images that the classifier names
# rightly; means over seeds. The average above can hide a defect that is never found. The claims below are paired on these.

# %%
of_one = single.assign(metric=single["metric"].str.removesuffix(regions.BY_DEFECT))
of_one = of_one[of_one["metric"].isin(["accuracy", "image_auroc", "pixel_ap", "pixel_f1_50", "pro"])]
averages = of_one.groupby(["metric", "defect", "method"], sort=False)["value"].mean().unstack()
averages.reindex(columns=rows).round(3)

# %% [markdown]
# ## Confusion
#
# Rows are the true defects, columns what the classifier said; summed over seeds.

# %%
matrices = {method: evaluation.confusion(s, method) for method in rows}
matrices = {method: matrix for method, matrix in matrices.items() if matrix is not None}
figure = figures.confusion(matrices, list(s.defects)) if matrices else None
if figure is not None:
    counts = [
        (m, a, b, int(n)) for m, c in matrices.items() for a, r in zip(s.defects, c) for b, n in zip(s.defects, r)
    ]
    table = pd.DataFrame(counts, columns=["method", "true", "predicted", "images"])
    figures.save(figure, folder, f"confusion_{s.category}", table)
figure

# %% [markdown]
# ## The worst misses
#
# The held-out defects whose pixels the localiser found least, for the last method that could be tested and the first seed:
# image, truth and the predicted probability of a defect.


# %%
def misses(method, seed):
    held_out = s.held_out(seed)
    maps = np.load(s.folder(method, seed).path / "predictions" / "localisation.npz")["maps"].astype(np.float32)
    found = [float(maps[i][m[0].numpy()].mean()) if m.any() else np.inf for i, (_, m, _, _) in enumerate(held_out)]
    worst = np.argsort(found)[:8]
    return figures.sheet(
        [[held_out[i][0] for i in worst], [held_out[i][1] for i in worst], [maps[i] for i in worst]],
        row_labels=["image", "truth", "prediction\nblack 0, white 1"], column_labels=[held_out[i][2] for i in worst],
    )  # fmt: skip


localised = scores[(scores["metric"] == "pixel_ap") & (scores["seed"] == s.seeds[0]) & scores["value"].notna()]
figure = misses(localised["method"].iloc[-1], s.seeds[0]) if len(localised) else None
if figure is not None:
    figures.save(figure, folder, f"worst_misses_{s.category}")
figure

# %% [markdown]
# ## Tables VIII and IX
#
# This is the part of this category; the report writes the whole tables, with averages, and with them Table X and the
# headline numbers: `table_8`, `table_9`, `table_10` and `headline`, beside `report.html`.

# %%
results = study.results(p, [s.category])
layout.view(tables.build(results, "table_8"))

# %%
layout.view(tables.build(results, "table_9"))

# %% [markdown]
# ## Which claims held?
#
# The papers' comparative claims, tested on this category's runs: paired differences with a bootstrap interval. A verdict needs
# four pairs of category and defect and three seeds, which `make claims` runs; its verdicts over the whole batch are in
# `figures/claims.md` and on the report's page.

# %%
judged = claims.judge(results)
print(judged.attrs["caption"])
layout.view(judged)

# %% [markdown]
# ## What was found

# %%
for metric in ("accuracy", "pixel_ap"):
    if metric in mean.index and mean.loc[metric].notna().any():
        text = ", ".join(f"{m} {mean.loc[metric, m]:.3f} (sd {sd.loc[metric, m]:.3f})" for m in rows)
        print(f"{metric}: {text}; {len(s.seeds)} seed(s), {s.category} only: too few to call a difference.")
print(s.stamp())
