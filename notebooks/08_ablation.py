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
# A variant is a method with one thing changed: a field of its configuration, its source of masks, or all that the
# paper's released code does differently. The profile lists them; none is a branch in this notebook. Most of what is
# changed is read while drawing: such a variant draws with its method's fit. All draw for the same normals, from the same seeds.
# Groups are those of the profile for all of them; DefectSynth's released code draws in twos, where its fusion does nothing.
#
# The papers' ablations are Tables **V** (modules), **VI** (sources of masks) and **VII** (time of SAE), all about
# DefectSynth on one category, wood. Ours stand beside them for the category of this run.
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
import json
import textwrap

import pandas as pd
import torch
from IPython.display import display
from torch.nn.functional import interpolate

from defectlib import judges, params, published, sampling, stages, study
from defectlib.augmentation import background
from defectlib.metrics import quality
from defectlib.report import ablation, figures, layout, multiclass, tables

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## The variants

# %%
rows = []
for name in s.variants:
    v = s.settings.variants[name]
    changed = s.config(name).model_dump().items() - s.config(v.of).model_dump().items()
    masks = {} if s.method_of(name).makes_masks else {"masks": s.mask_source_name(name)}
    kept = {part: getattr(v, part).model_dump() for part in ("shots", "keep") if getattr(v, part)}
    told = dict(sorted(changed)) | (masks if v.mask_source else {}) | kept
    rows.append([layout.method_title(v.of), name, json.dumps(told)])
described = pd.DataFrame(rows, columns=["method", "variant", "what is changed"])
described.style.hide().set_uuid("variants")

# %% [markdown]
# ## Quality and time of each
#
# Averages over the category's defects and over the seeds; the sd is over the seeds, and `NaN` where there is one. A defect whose number
# is withheld for some seed is left out for all, so that seeds differ by what was drawn and not by which defects they are of.
# KID is times 1,000. A mask's IoU is its largest overlap with a real mask of the defect after the best turn and shift;
# `NaN`: the method makes its own masks. `mask_seen` is how far the masks lie on what a localiser of the real shots finds in the
# samples (notebook 7). `class_seen` is the share of a defect's samples that a classifier of the real shots takes for that defect;
# where the classifier does not know the real, held-out ones either, it is withheld, and where it takes other real defects for
# this one too, which its protocol says, it means little. Where a source gave no mask for a defect, the row is the mean of the
# others', and the sentence below the table says so. A filtered variant draws nothing: it keeps the better part of what its
# method drew, and the sentence says by what; a distance counts as minus itself, so that more is better. It is bound to look better
# by that; notebook 9 trains on both.

# %%
families = [[m, *(v for v in s.variants if s.settings.variants[v].of == m)] for m in s.methods]
names = [name for family in families for name in family]
records = {(name, seed): stages.quality(s, name, seed) for name in names for seed in s.seeds}
results = study.results(p, [s.category])
asked = results[results["method"].isin(names)]
seeds = ablation.known(asked).groupby(["method", "metric", "seed"])["value"].mean()
mean, sd = seeds.groupby(level=[0, 1]).mean().unstack(), seeds.groupby(level=[0, 1]).std().unstack()
q = s.settings.quality
measures = [m for m in quality.names(q.extractor, q.perceptual) if published.kind(m) not in ("precision", "recall")]
kid, *shown = *measures, "mask_iou", judges.MASK_SEEN, judges.CLASS_SEEN, "seconds_per_image"
summary = pd.DataFrame(
    {"KID x 1000": mean[kid] * 1000, "sd": sd[kid] * 1000} | {m: mean[m] for m in shown if m in mean}
)
summary.reindex(names).rename(index=layout.method_title).round(3)

# %%
for name in names:
    for row in stages.sample(s, name, s.seeds[0])["metrics"]:
        if row["metric"] == "samples_kept":
            told = row["protocol"]
            print(f"{layout.method_title(name)}, {row['defect']}: {row['value']:.0f} of {told['n_generated']} kept by {told['by']}, "
                  f"mean {told['mean_of_all']:.2f} of all, {told['mean_of_kept']:.2f} of those kept")  # fmt: skip
        if why := row.get("protocol", {}).get("why_withheld"):
            print(f"{layout.method_title(name)}, {row['defect']}: {why}")
for row in records[names[0], s.seeds[0]]["metrics"]:  # what the judges do not know, they know of no row
    if row["metric"] in (judges.MASK_SEEN, judges.CLASS_SEEN) and (why := row["protocol"].get("why_withheld")):
        print(f"{row['metric']} of {row['defect']}, seed {s.seeds[0]}: {why}")

# %% [markdown]
# ## Few shots, and unequal ones
#
# Variants that learn from fewer shots, beside their method on all: two of each defect, or two of the first defect beside up to 20
# of each of the others, which are as many as the split has (`table_1`; eight on mini). What a model of all defects has learned of
# one may help another. And one that learns the last defect after them: only
# the new defect's coefficients are trained then, and the others are drawn as before. By defect, means over the seeds with the sd:
# `mask_seen` and, where it is asked, `class_seen`, as above. `PROFILE=multiclass` has them, and trains on them in notebook 9, whose
# classifiers learn from the same few shots besides; what these are worth alone is the learning curve over shots there.

# %%
few = [name for name in names if s.shot_rule(name)]
beside = [name for name in names if name in few or name in {s.settings.variants[v].of for v in few}]
if few:
    told = asked[asked["method"].isin(beside) & asked["metric"].isin([judges.MASK_SEEN, judges.CLASS_SEEN])]
    cells = told.groupby(["metric", "defect", "method"], sort=False)["value"].agg(["mean", "std"]).unstack()
    display(cells.swaplevel(axis=1)[beside].rename(columns=layout.method_title).round(2))
else:
    print("No variant here learns from fewer shots.")

# %% [markdown]
# ## The same requests, drawn by each
#
# Columns are the same seeds, hence the same normals; where the source of masks is the one that changed, the masks differ, and
# a method that draws its masks itself may have drawn a pair again, from other noise.

# %%
drawn = {
    name: [sampling.first(s.folder(name, s.seeds[0]).path, d) for d in s.defects]
    for name in names if not s.keep(name)
}  # fmt: skip
figure = figures.sheet(
    [[part for item in samples for part in ((item.image, item.mask) if item else (None, None))] for samples in drawn.values()],
    row_labels=[textwrap.fill(layout.method_title(name), 20) for name in drawn],
    column_labels=[title for defect in s.defects for title in (defect.replace("_", " "), "mask")],
    scale=80 / s.size, fold=1, missing="none",
)  # fmt: skip
figures.save(figure, folder, f"fig_5_ablation_{s.category}")
figure

# %% [markdown]
# ## AdaBLDM, stage by stage
#
# What every stage is for: the background. The mean absolute change against the normal image, inside the masks and outside, in
# grey levels of 255, of the whole and with one stage left out.

# %%
stages_of = [name for name in names if s.method_of(name).name == "adabldm"]
reports = {name: pd.concat([sampling.read_report(s.folder(name, seed).path) for seed in s.seeds]) for name in stages_of}
changes = pd.DataFrame({name: own[["change_inside", "change_outside"]].mean() for name, own in reports.items()}).T
changes.rename(index=layout.method_title).round(2) if stages_of else "AdaBLDM was not asked for."

# %% [markdown]
# ## With and without background compensation (DualAnoDiff Fig. 4)
#
# Only where the category's images have a background. The background that is read, and what the models without and with
# compensation, each trained by itself, draw from the same noise (their first drawings, whether they were kept or not). How much of
# the background is injected is learned: $\gamma$ of every layer, from 0.1.

# %%
compensated = "dualanodiff_compensated"
if compensated in s.variants:
    seed, group = s.seeds[0], s.settings.sample.group_size
    n = min(2 * group, s.n_per_defect(compensated))
    plan = sampling.plan(
        s.shots(seed), s.normals(seed), n, None, seed, s.prompts(), s.all_defects, group, one_normal_a_group=True
    )
    own = [r for r in plan if r.defect in s.defects and r.seed == r.group]
    rows = [[r.normal for r in own], [background(r.normal) for r in own]]
    for m in ("dualanodiff", compensated):
        fitted = s.load(m, seed)
        rows.append([fitted.denoised([r])[0][0] for r in own])
        for defect in s.defects if m == compensated else ():
            gammas = [one.compensation.gamma.item() for one in fitted.dual(defect).branches.injected().values()]
            print(f"gamma of {defect}: {min(gammas):.3f} to {max(gammas):.3f} in {len(gammas)} layers")
    names_of = ["normal", "background", "without", "with compensation"]
    figure = figures.sheet(rows, row_labels=names_of, column_labels=[r.defect for r in own])
    figures.save(figure, folder, f"dualanodiff_fig_4_{s.category}")
    display(figure)
else:
    print(
        f"{s.category}: no variant with background compensation here (some image shows no background, or the profile has none)."
    )

# %% [markdown]
# ## One model for all defects: the symmetry-aware system
#
# Only the abstract is at hand. **Stated by the paper**: "cross-class shared low-rank bases with class-dependent
# coefficients" (CSB-LoRA); branch interaction, background injection and residual fusion adjusted "according to the denoising
# stage", "from global structure restoration to local defect refinement" (TDAM); "stronger spatial constraints to defect regions and
# boundary neighborhoods" (SGRL). **Our reading**: one diagonal of coefficients a class between the two bases of every LoRA,
# $\Delta W_c = \tfrac{\alpha}{r} B\,\mathrm{diag}(1 + d_c)\,A$, with $d_c$ shrunk by weight decay, or tied in $K$ blocks of rows, which is
# $\sum_k a_{c,k} B_k A_k$; gates $2\,\sigma(a + b(\tau - \tfrac12))$ a layer, $\tau$ the share of noise, which multiply what is added by
# background, interaction and attention, never a layer's own input; and the squared error in latent space weighted by $1 + \lambda_m M +
# \lambda_b R$ at a mean of one: $M$ the cells that hold any pixel of the mask, so that a thin crack survives, $R$ a band around their
# boundary, and at most half of all weight on the mask; it weighs the base's own target (of $x_0$ with min-SNR as an option), and a soft
# edge of $M$, the name's saliency, is off. Ranks, weights, widths and steps are not stated either: what they are here is printed next.
#
# Only where it is among the methods; its parts, one off or changed at a time, are the variants of `PROFILE=symmetry`.
# DualAnoDiff trains a model for every defect. Here one model draws all of them, by LoRA with bases that all share and
# coefficients of each class (CSB-LoRA), and sees every defect equally often. To compare with: `one LoRA for all`, `a LoRA a class`
# (all else shared), `tied` with few coefficients a LoRA, and `VeRA`, frozen random bases and two vectors a class (peft's rule, held to
# peft's own layer by a test, at the same rank; VeRA's paper takes far larger ones).
# How many numbers that makes, as trained on this category: in the adapters of the UNet, in the rest (interaction, gates and the
# text encoder's LoRA, which are of the model), and in all.

# %%
several = [name for name in names if s.method_of(name).name == "symmetry_aware" and not s.keep(name)]
if several:
    print(*(f"{key}: {value}" for key, value in s.config(several[0]).model_dump().items()), sep="; ")
pairs = [name for name in names if name == "dualanodiff" or name in several] if several else []
seed, sizes, moves, curves, alike = s.seeds[0], {}, {}, {}, {}
for name in pairs:
    fitted = s.load(name, seed)
    sizes[layout.method_title(name)] = fitted.sizes()
    if name in several:
        curves[name] = multiclass.gates(fitted, seed)
        if not s.learns_later(name):  # its start is not that of all classes at once
            moves[name] = multiclass.moved(fitted, seed)
    if name in several and s.config(name).adapters == "csb":
        alike[name] = multiclass.similarity(fitted), list(fitted.areas)
pd.DataFrame(sizes).T.style.format("{:,}").set_uuid(
    "sizes"
) if several else "The symmetry-aware system was not asked for."

# %% [markdown]
# ### What samples are taken for
#
# Rows are the defects that were asked for, columns what a classifier of the real shots takes the samples for; summed over seeds.
# How far it is to be trusted is told below: what it says of real, held-out images of the same defects. Only where the profile asks
# for it.

# %%
compared = [name for name in names if s.method_of(name).name in ("dualanodiff", "symmetry_aware")] if several else []
taken = {name: multiclass.taken_for([records[name, seed] for seed in s.seeds], s.defects) for name in compared}
if taken := {name: counts for name, counts in taken.items() if counts.any()}:
    figure = figures.confusion(taken, list(s.defects), "asked for", "taken for")
    figures.save(figure, folder, f"symmetry_aware_taken_for_{s.category}")
    display(figure)
trust = [
    (row["defect"], seed, row["protocol"]["on_real"], row["protocol"]["on_others"])
    for seed in s.seeds for row in (records[several[0], seed]["metrics"] if taken else [])
    if row["metric"] == judges.CLASS_SEEN and None not in (row["protocol"]["on_real"], row["protocol"]["on_others"])
]  # fmt: skip
for name, seed, on_real, on_others in sorted(trust, key=lambda row: list(s.defects).index(row[0])):
    print(f"{name}, seed {seed}: real ones are taken for it by {on_real:.0%}, real ones of others by {on_others:.0%}")

# %% [markdown]
# ### How alike classes are
#
# Cosines of $d_c$, how the coefficients of a class depart from what all share, over all layers: 1 for classes that use the bases
# alike, about 0 at the random start. What is common to all classes can go to the bases, and departures then cancel: $K$ classes
# that are equally unlike have $-1/(K-1)$, which two classes that use the bases alike exceed.

# %%
if some := {name: alike[name] for name in ("symmetry_aware", "symmetry_aware_tied") if name in alike}:
    _, classes = next(iter(some.values()))
    figure = figures.similarity({name: cosines for name, (cosines, _) in some.items()}, classes)
    figures.save(figure, folder, f"symmetry_aware_similarity_{s.category}")
    display(figure)

# %% [markdown]
# ### Between two classes
#
# Coefficients can be mixed: one pair, from the same noise, on its way from the first defect to the second.

# %%
own = s.config("symmetry_aware") if "symmetry_aware" in several and len(s.defects) > 1 else None
if own and own.adapters != "shared" and own.scope == "category":
    to, shares = s.defects[1], [0.0, 0.25, 0.5, 0.75, 1.0]
    plan = sampling.plan(s.shots(seed), s.normals(seed), 1, None, seed, s.prompts(), s.all_defects, 1)
    start = next(request for request in plan if request.defect == s.defects[0])
    images, parts = s.load("symmetry_aware", seed).between(start, to, shares)
    labels = [f"{share:.0%} {to}" for share in shares]
    figure = figures.sheet(
        [list(images), list(parts)], row_labels=["image", "part"], column_labels=labels, scale=96 / s.size
    )
    figures.save(figure, folder, f"symmetry_aware_between_{s.category}")
    display(figure)

# %% [markdown]
# ### Gates over the denoising
#
# TDAM's three gates of every layer over the share of noise: how strongly a background is read, how strongly the branches
# interact, and how strongly an attention layer's output is added. At 1 everywhere they are DualAnoDiff; drawing goes from right
# to left. The first is there with background compensation alone, in self-attention. "From global structure restoration to local
# defect refinement" would have interaction and fusion rise to the left, as the prior has it; the lines below the picture count what was learned.

# %%
gated = {name: own for name, own in curves.items() if s.config(name).gates in ("neutral", "prior")}
shown = ("symmetry_aware", "symmetry_aware_prior", "symmetry_aware_compensated")
lines = [own.assign(method=name) for name, own in gated.items() if name in shown]
if lines:
    lines = pd.concat(lines)
    figure = figures.gates(lines)
    figures.save(figure, folder, f"symmetry_aware_gates_{s.category}", lines)
    display(figure)
for name, own in gated.items():
    for row in multiclass.leaning(own).itertuples():
        print(f"{layout.method_title(name)}, {row.kind}: of {row.layers} layers {row.higher} are higher at the noisy end, "
              f"{row.lower} at the clean one, by {multiclass.STAYED} or more")  # fmt: skip

# %% [markdown]
# ### Where the loss looks
#
# SGRL's weights of the first shots of each defect, in latent cells: the defect, and a band around its boundary. Their mean is 1,
# and a defect that covers less than half takes half of all weight at most; white is the largest weight of a map, black would be none:
# below each stand its smallest and largest.

# %%
if "symmetry_aware" in several:
    looking = s.load("symmetry_aware", seed)
    own = {d: [shot for shot in s.shots(seed) if shot.defect == d][:3] for d in s.defects}
    weights = {d: looking.spatial(torch.stack([shot.mask for shot in few])) for d, few in own.items()}
    maps = {d: interpolate(w / w.amax((1, 2, 3), keepdim=True), s.size, mode="nearest") for d, w in weights.items()}
    rows = [[cell for shot, seen in zip(own[d], maps[d]) for cell in (shot.image, seen)] for d in s.defects]
    masks = [[shot.mask for shot in own[d] for _ in range(2)] for d in s.defects]
    ends = {d: [f"{one.min():.2f} to {one.max():.2f}" for one in w] for d, w in weights.items()}
    figure = figures.sheet(
        rows, row_labels=list(s.defects), column_labels=["shot", "weights"] * (max(map(len, rows)) // 2), outline_masks=masks,
        scale=128 / s.size, captions=[[text for end in ends[d] for text in ("", end)] for d in s.defects],
    )  # fmt: skip
    figures.save(figure, folder, f"symmetry_aware_weights_{s.category}")
    display(figure)

# %% [markdown]
# ### What moved
#
# Root mean squares over all layers, of what was learned at its start and of how far training moved it; of gates, of their values
# over $\tau$. What moved by less than 0.01 at most has stayed where it was, and does nothing that the start did not.

# %%
for name, table in moves.items():
    for row in table.itertuples(index=False):
        stayed = f"stayed where it was ({row.most:.1g} at most)" if row.most < multiclass.STAYED else ""
        told = stayed or f"{row.start:.3f} at the start, moved by {row.moved:.3f}, by {row.most:.2f} at most"
        print(f"{layout.method_title(name)}, {row.part}: {told}")

# %% [markdown]
# ## Tables V, VI and VII
#
# Published numbers and ours, this category's. The report writes the whole tables: `table_5`, `table_6` and `table_7`,
# beside `report.html`.

# %%
layout.view(tables.build(results, "table_5"))

# %%
layout.view(tables.build(results, "table_6"))

# %%
layout.view(tables.build(results, "table_7"))

# %% [markdown]
# ## What was found
#
# Whether a difference has the same sign for every seed. Three seeds all have by chance one time in four, so this is no test.

# %%
for name in s.variants:
    v = s.settings.variants[name]
    apart = ((seeds[name][kid] - seeds[v.of][kid]) * 1000).dropna()
    alike = apart.gt(0).all() or apart.lt(0).all()
    told = "every seed alike" if alike else "seeds disagree"
    print(f"{name}: KID x 1000 {apart.mean():+.1f} against {v.of} ({', '.join(f'{x:+.1f}' for x in apart)}): "
          f"{told if len(apart) > 1 else f'{len(apart)} seed'}.")  # fmt: skip
    on_defect = mean.get(judges.MASK_SEEN, pd.Series(dtype=float)).reindex([name, v.of])
    if on_defect.notna().all():
        print("  masks on what a localiser of the shots finds: IoU {:.2f} against {:.2f}.".format(*on_defect))
print(s.stamp())
