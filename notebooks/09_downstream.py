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
# Two rows are always there: `shots_only`, the same model trained on the few real shots with the same settings (the papers'
# "w/o augmentation"), and `crop_paste`. A filtered row learns from the better part of its method's samples (notebook 8). The
# model of the last step is tested. Released evaluations choose a checkpoint by its test score instead: what that would have
# shown of the same trainings stands beside it, in Tables VIII and IX below. So does what one sample more is worth.
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
import numpy as np
import pandas as pd

from defectlib import evaluation, learning, params, sampling, study
from defectlib.metrics import regions
from defectlib.report import ablation, claims, figures, layout, tables

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## Train and test

# %%
whole, rows = s.compared(), s.learned_with()
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
chosen = scores[scores["metric"].str.endswith(regions.ORACLE)]  # by their test score, further down too
scores = scores.drop([*single.index, *chosen.index])
tested = bool(scores["value"].notna().any())
print(*withheld, sep="\n")
grouped = scores.groupby(["metric", "method"], sort=False)["value"]
mean, sd = grouped.mean().unstack()[rows], grouped.std().unstack()[rows]
print(f"mean over {len(s.seeds)} seed(s); the standard deviation follows where there are several")
pd.concat([mean, sd.add_suffix(" sd").dropna(axis=1, how="all")], axis=1).round(3)

# %%
shown = scores[scores["metric"].isin(["accuracy", "f1_macro", "image_auroc", "pixel_auroc", "pixel_ap", "pixel_f1_50"])]
shown = shown[
    shown["method"].isin([*whole, *filter(s.keep, s.variants)])
]  # an ablation's rows stand in the table alone
figure = figures.compare(shown) if tested else None
if tested:
    figures.save(figure, folder, f"downstream_{s.category}", scores)
figure

# %% [markdown]
# ### What the localiser learned from
#
# A pair whose mask is empty, full, or of a size that no real one has is left out: it would teach a defect that is none. How many
# were used of those drawn, summed over the seeds. A localiser that had none of a defect is scored on it all the same.

# %%
drawn = pd.DataFrame(
    [(m, item.defect, sampling.teaches(item)) for m in rows if m != study.SHOTS_ONLY for seed in s.seeds
     for item in sampling.load(s.folder(m, seed).path, limit=s.n_used(m))],
    columns=["method", "defect", "used"],
)  # fmt: skip
used = drawn.groupby(["method", "defect"], sort=False)["used"].agg(lambda own: f"{own.sum()} of {len(own)}")
used.unstack("defect").reindex(rows[1:])

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
matrices = {method: evaluation.confusion(s, method) for method in whole}
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
    worst = [i for i in np.argsort(found)[:8] if np.isfinite(found[i])]  # normals have nothing to be found
    return figures.sheet(
        [[held_out[i][0] for i in worst], [held_out[i][1] for i in worst], [maps[i] for i in worst]],
        row_labels=["image", "truth", "prediction\nblack 0, white 1"], column_labels=[held_out[i][2] for i in worst],
        title=f"learned with {layout.method_title(method)}, seed {seed}",
    )  # fmt: skip


localised = scores[(scores["metric"] == "pixel_ap") & (scores["seed"] == s.seeds[0]) & scores["value"].notna()]
localised = localised[localised["method"].isin(whole)]
figure = misses(localised["method"].iloc[-1], s.seeds[0]) if len(localised) else None
if figure is not None:
    figures.save(figure, folder, f"worst_misses_{s.category}")
figure

# %% [markdown]
# ## Which checkpoint is tested?
#
# A training must end somewhere, and a rule says which of its models is tested (`downstream.selection` in the profile).
# Ours is `last`. The released evaluations choose on the test set, as `test_oracle` does: its score is the largest there is by
# construction, and tests nothing. They choose among all epochs, by a sum of four scores; here it is the pixel AP of a few
# checkpoints, which flatters less. `val_generated` chooses on samples that are held back from training.
#
# Here is one training of the localiser, of the last method that could be tested and the first seed. Checkpoints are scored
# on the test set and on a tenth of the samples; these are left out of the training, so its last step is not the model above.

# %%
looked = evaluation.checkpoints(s, localised["method"].iloc[-1], s.seeds[0])["metrics"] if len(localised) else []
by_step = pd.DataFrame([m["protocol"] | {"pixel AP, %": 100 * m["value"]} for m in looked if m["value"] is not None])
figure, picked = None, pd.DataFrame()
if len(by_step):
    wide = by_step.pivot(index="step", columns="on", values="pixel AP, %")
    known, test = wide["held-back items"], wide["test set"]
    best = {
        "last": wide.index[-1],
        "val_generated": known.idxmax(),
        "test_oracle": test.idxmax(),
    }  # the first of equals
    picked = wide.loc[list(best.values())].rename_axis(columns=None).reset_index().set_axis(list(best))
    picked["test set, against last"] = picked["test set"] - test.iloc[-1]
    rings = {rule: (step, test[step]) for rule, step in best.items()}
    titled = f"pixel AP, %, {layout.method_title(localised['method'].iloc[-1])}"
    figure = figures.chosen(by_step.rename(columns={"pixel AP, %": titled}), "step", titled, "on", rings)
    figures.save(figure, folder, f"checkpoints_{s.category}", by_step)
figure

# %%
print(*(m["protocol"]["why_withheld"] for m in looked if m["value"] is None), end="")
if len(picked):
    print(f"{localised['method'].iloc[-1]}, seed {s.seeds[0]}; one training: no rule is better than another by it")
picked.round(1)

# %% [markdown]
# Of all methods and seeds: the score that each rule is chosen by, of the last step and of the best checkpoint on the test set.
# The difference is what looking at the test set adds, and it need not be the same for all methods.

# %%
of_rule = {"last": scores, "test_oracle": chosen.assign(metric=chosen["metric"].str.removesuffix(regions.ORACLE))}
both = pd.concat(of_rule, names=["rule"]).query("metric in ('accuracy', 'pixel_ap')")
averages = 100 * both.groupby(["metric", "method", "rule"], sort=False)["value"].mean().unstack()
averages.assign(difference=averages["test_oracle"] - averages["last"]).round(1) if len(
    chosen
) else "No rule but the profile's."

# %% [markdown]
# ## How many samples, how many shots?
#
# Scores over the number of samples of each defect (the dashed line, 0 in the table: the shots alone), and over the number of shots, for the shots alone
# and for what is fitted on them anew at no cost. Subsets are nested. All points are trained for as many optimiser steps,
# whatever the number of images: more images mean fewer passes over each, not a longer training. The last points are the
# scores above. The localiser learns from samples in place of the shots, the classifier from both.

# %%
points = [
    (method, seed, m)
    for method in whole
    for seed in learning.seeds(s)
    for m in learning.curve(s, method, seed)["metrics"]
]
learned = pd.DataFrame(
    [(*m["metric"].rsplit("_by_", 1), m["protocol"]["n"], name, seed, m["value"]) for name, seed, m in points],
    columns=["metric", "axis", "n", "method", "seed", "value"],
)
learned["value"] = 100 * learned["value"].astype(float)
figure = figures.learning(learned) if learned["value"].notna().any() else None
if figure is not None:
    figures.save(figure, folder, f"learning_curve_{s.category}", learned)
figure

# %%
trained = sorted({m["protocol"]["optimiser_steps"] for *_, m in points if "optimiser_steps" in m["protocol"]})
if points:
    seeds_of = ", ".join(map(str, learning.seeds(s)))
    print(f"percent, of seed(s) {seeds_of}; optimiser steps of a point: {', '.join(map(str, trained))}")
else:
    print("The profile asks for no curve of these seeds (`downstream.curve`).")
by_n = learned.groupby(["metric", "axis", "n", "method"], sort=True)["value"]
averages, sds = by_n.mean().unstack(), by_n.std().unstack()
order = [name for name in whole if name in averages]
pd.concat([averages[order], sds[order].add_suffix(" sd").dropna(axis=1, how="all")], axis=1).round(1)

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
# ## Method by method, part by part
#
# How samples look, where their masks lie, and what they are good for, of every method and variant of this category: the ablations
# of notebook 8 beside the scores above. The profiles `symmetry` and `multiclass` train downstream models on every variant;
# elsewhere those cells are empty. The report has it as `ablation`.

# %%
beside = ablation.build(results)
layout.view(beside) if len(beside) else "Every measure was withheld."

# %% [markdown]
# ## Which claims held?
#
# The papers' comparative claims, tested on this category's runs: paired differences with a bootstrap interval. A verdict needs
# four pairs of category and defect and three seeds, which `make claims` runs; the verdicts over a whole batch are on its report's
# page.

# %%
judged = claims.judge(results)
print(judged.attrs["caption"])
layout.view(judged)

# %% [markdown]
# ## What was found

# %%
for metric in ("accuracy", "pixel_ap"):
    if metric in mean.index and mean.loc[metric].notna().any():
        spreads = {m: f" (sd {sd.loc[metric, m]:.3f})" if len(s.seeds) > 1 else "" for m in rows}
        text = ", ".join(f"{m} {mean.loc[metric, m]:.3f}{spreads[m]}" for m in rows)
        print(f"{metric}: {text}; {len(s.seeds)} seed(s), {s.category} only: too few to call a difference.")
print(s.stamp())
