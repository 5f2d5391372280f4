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
# Fits every method on the shots of one category, for every seed, and reports what is trained, how the loss falls, and what
# a fit costs. This is the training half of **Table IV**. A fit that is complete with the same parameters is read from its
# run folder, not repeated; a killed one is continued.
#
# The methods differ in what a fit is. DefectSynth trains a ControlNet on (mask, prompt, real image) beside a base model
# that stays as it is; with `adapt_steps` an adapter of that model is trained first, on the category's normals, which the
# paper does not do. Crop-Paste learns nothing: its fit keeps the shots, and its cost is that of reading them.
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
from IPython.display import display
from safetensors.torch import load_file

from defectlib import adaptation, backbone, diffusion, params, sampling, stages, study
from defectlib.masks import trimap
from defectlib.report import figures, layout, tables

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## What goes in

# %%
shots, normals = s.shots(s.seeds[0]), s.normals(s.seeds[0])
print(f"{s.category}: {len(normals)} normals of {s.size} px, shots per defect:")
pd.Series([shot.defect for shot in shots]).value_counts(sort=False).rename("shots").to_frame()

# %% [markdown]
# ## Composites
#
# AdaBLDM does not learn from the shots themselves: a shot's defect is cut out, turned, scaled and pasted inside the object of
# a normal image, and the trimap says where. A composite is a function of the fit's seed and its number; none is kept as a
# file. The first ones of each defect, with the trimaps that the ControlNet reads:

# %%
pasting = s.method_of("adabldm")(s.config("adabldm"), s.backbone("adabldm", s.seeds[0]))
objects = [trimap.foreground(image) for image in normals]
rows, labels = [], []
for defect in s.defects:
    own = [shot for shot in shots if shot.defect == defect]
    made = [pasting.composite(number, own, normals, objects, s.seeds[0]) for number in range(6)]
    rows += [[image for image, _, _ in made], [trimap.trimap(mask, objects[k]) for _, mask, k in made]]
    labels += [defect, "trimap"]
figure = figures.sheet(rows, row_labels=labels)
figures.save(figure, folder, f"adabldm_composites_{s.category}")
figure

# %% [markdown]
# ## Configuration
#
# The defaults are the papers' where they state a value; of the symmetry-aware system, whose abstract states none, they are
# DualAnoDiff's and our reading. A profile may name other values, and unknown ones are refused. A field is read while a
# method is fitted, or while it draws: a change of the second kind leaves a fit valid.

# %%
rows = []
for name in s.methods:
    config = s.config(name)
    for field, value in config.model_dump().items():
        default = type(config).model_fields[field].default
        stage = "drawing" if field in config.DRAWING else "fit"
        rows.append([layout.method_title(name), stage, field, str(value), str(default) if value != default else ""])
config = pd.DataFrame(rows, columns=["method", "read while", "field", "value", "default, where it differs"])
config.sort_values(["method", "read while"], ascending=[True, False], kind="stable").set_index(["method", "read while"])

# %% [markdown]
# ## Fitting
#
# DualAnoDiff and the symmetry-aware system read masks off the drawn parts, by their departure from grey. A shot whose mask covers
# most of the border, where that grey is looked for, or whose defect is as grey itself, teaches no such part, and is left out:
# counted here, if there is any.

# %%
records = {(method, seed): stages.fit(s, method, seed) for method in s.methods for seed in s.seeds}
models = {(method, seed): s.folder(s.fitted_as(method), seed).model for method, seed in records}
described = {run: json.loads((model / "method.json").read_text()) for run, model in models.items()}
for (method, seed), record in records.items():
    for row in record["metrics"]:
        if row["metric"] == "shots_left_out" and row["value"]:
            print(f"{layout.method_title(method)}, seed {seed}: {row['value']:.0f} shots of {row['defect']} left out")

# %% [markdown]
# ## The base model, adapted first
#
# DualAnoDiff and the symmetry-aware system draw whole images, and their papers start from Stable Diffusion, which has seen most
# objects. `tiny` has seen none of these, so where the profile says so (`adapt`) all of its UNet is first trained on the category's
# normal images, as "a vfx", and on the grey part of an image without a defect, as "sks". The papers do not do that. The first fit that
# asks for it makes it, for all that start from it, and its time is in no fit's seconds. Samples of both from the same noise:

# %%
adapting = [method for method in s.methods if s.adapts(method)]
if adapting:
    rows = [normals[:8]]
    for base in (backbone.load(s.settings.backbone), s.backbone(adapting[0], s.seeds[0])):
        start = diffusion.noise_like(range(len(rows[0])), base.latent_shape(s.size)).to(base.device)
        drawn = diffusion.denoise(diffusion.prompted(base, [adaptation.OBJECT]), start, base.scheduler, 20)
        rows.append(list(base.decode(drawn)))
    figure = figures.sheet(rows, row_labels=["normal", "as it ships", "adapted"])
    figures.save(figure, folder, f"adapted_base_{s.category}")
    display(figure)
else:
    print(f"{', '.join(s.methods)}: the base model is taken as it is.")

# %% [markdown]
# ## What is trained, and what stays as it is
#
# Parameters of the parts. What is trained is counted in the files of the fit, what a fit leaves as it is in the base model, whose
# UNet may have been adapted before. A ControlNet
# starts as a copy of the UNet's first half, with layers of zeros where it joins the UNet, so that training starts from the
# base model's own predictions. DualAnoDiff and AdaBLDM have a model for every defect, and DualAnoDiff's trained layers start
# without effect too.

# %%
rows = []
for method in s.methods:
    model, base, title = models[method, s.seeds[0]], s.backbone(method, s.seeds[0]), layout.method_title(method)
    learned = [file for file in sorted(model.rglob("*.safetensors")) if file.stem != "shots"]
    if not learned:
        rows.append([title, "nothing: the shots are kept", 0, "trained"])
    for file in learned:
        count = sum(tensor.numel() for tensor in load_file(file).values())
        rows.append([title, " ".join(file.relative_to(model).parts[:-1]) or file.stem, count, "trained"])
    frozen = {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoder} if base else {}
    states = {"unet": "adapted before"} if s.adapts(method) else {}
    rows += [
        [title, part, sum(w.numel() for w in net.parameters()), states.get(part, "frozen")]
        for part, net in frozen.items()
    ]
parts = pd.DataFrame(rows, columns=["method", "part", "parameters", "state"])
parts.style.format({"parameters": "{:,}"}).hide().set_uuid("parts")

# %% [markdown]
# ## The loss on the way
#
# The mean over the last ten points of a curve, for every model that is fitted; a point is the mean since the one before it. The
# loss is the squared error of what the base model predicts, noise or velocity, at random timesteps, some of which are far
# harder than others, so a curve is rough, and a flat one does not say that what is drawn has stopped changing. Where the
# configuration gives the mask a weight, the loss is larger by it: levels are comparable within a method only.

# %%
curves = {run: about.get("curves", {"": about.get("curve", [])}) for run, about in described.items()}
points = [
    [layout.method_title(method), ", ".join(filter(None, [defect, f"seed {seed}"])), step, loss]
    for (method, seed), own in curves.items() for defect, curve in own.items() for step, loss in curve
]  # fmt: skip
curve = pd.DataFrame(points, columns=["method", "fit", "step", "loss"])
own = curve.groupby(["method", "fit"], sort=False)["loss"]
smooth = curve.assign(loss=own.transform(lambda x: x.rolling(10, 1).mean()))
if len(curve):
    figure = figures.curves(smooth, x="step", y="loss", hue="fit", panel="method")
    figures.save(figure, folder, f"loss_curves_{s.category}", curve)
    display(figure)
else:
    print(f"{', '.join(s.methods)}: there is no loss, because nothing is learned.")

# %% [markdown]
# ## Trained while drawing: AdaBLDM's decoder
#
# Outside the mask the normal image is known, yet the decoder gives its own reconstruction of it. AdaBLDM's last stage trains a
# copy of the decoder for each image that is drawn, all of it and for 200 steps; the profile here may train less of it, see the
# configuration above. The error against the normal image outside the mask (white is 32 grey levels or more) before and after,
# and what became of the defect, where AdaBLDM is among the methods:

# %%
name, seed, rows, numbers, placed = "adabldm", s.seeds[0], [], [], []
if name in s.methods:
    drawing = s.load(name, seed)
    placed = sampling.plan(shots, normals, 1, s.mask_source(name), seed, s.prompts(), s.all_defects)
for r in placed:
    both = []
    for values in ({"decoder": None}, {}):
        drawing.config = s.config(name).model_copy(update=values)
        both.append(drawing.sample([r])[0].image)
    errors = [(image - r.normal).abs() * 127.5 for image in both]
    moved = (both[1] - both[0]).abs()[:, r.mask[0]].mean() * 127.5
    rows.append([r.normal, *both, *[(e * ~r.mask / 32).amax(0, keepdim=True).clamp(max=1) for e in errors]])
    numbers.append([r.defect, *[e[:, ~r.mask[0]].mean().item() for e in errors], moved.item()])
titles = ["normal", "as decoded", "adapted", "error, as decoded", "error, adapted"]
columns = ["defect", "outside, as decoded", "outside, adapted", "inside, moved by"]
decoder = pd.DataFrame(numbers, columns=columns).set_index("defect")
if placed:
    figure = figures.sheet(rows, row_labels=[r.defect for r in placed], column_labels=titles, scale=128 / s.size)
    figures.save(figure, folder, f"adabldm_decoder_{s.category}", decoder.reset_index())
    display(figure)

# %%
decoder.round(2) if placed else "AdaBLDM was not asked for."

# %% [markdown]
# ## What it costs
#
# *Items* are the shots, with `flips` also their mirror images and half turns, with `crops` also windows of them, and for AdaBLDM its composites; *passes* is how often each was seen.
# *Seconds* are the fit's own, without those of adapting its base model; the peak memory is this process's, or the GPU's where there is one.

# %%
rows = []
for (method, seed), record in records.items():
    config = s.config(method).model_dump()
    steps = sum(curve[-1][0] for curve in curves[method, seed].values() if curve)
    items = len(s.shots(seed)) * (4 if config.get("flips") else 1) * (1 + config.get("crops", 0))
    items = config.get("composites", 0) * len(s.defects) or items
    seconds = next(row["value"] for row in record["metrics"] if row["metric"] == "fit_s")
    size = sum(file.stat().st_size for file in models[method, seed].rglob("*") if file.is_file()) / 2**20
    passes = steps * config.get("train_batch_size", 0) / items
    rows.append([method, seed, items, steps, passes, seconds, size, record["peak_memory_mb"], record["device"]])
columns = ["method", "seed", "items", "steps", "passes", "seconds", "model MiB", "peak memory MiB", "device"]
cost = pd.DataFrame(rows, columns=columns)
cost.round(3)

# %% [markdown]
# ## Table IV, training
#
# The published times are for one defect of MVTec AD (wood/hole, 256 px, 50 epochs, batch 1) on an RTX 4090. What is
# measured here is another protocol, and the table says so. This is the part of this category; the report writes the
# whole table: `table_4`, beside `report.html`.

# %%
layout.view(tables.build(study.results(p, [s.category]), "table_4"))

# %% [markdown]
# ## What was found

# %%
longest = cost.loc[cost["seconds"].idxmax()]
print(f"{len(records)} fits; the longest, {longest['method']}, took {longest['seconds']:.1f} s.")
for title, own in parts.groupby("method", sort=False):
    trained = own.loc[own["state"] == "trained", "parameters"].sum()
    if trained:
        print(f"{title}: {trained:,} of {own['parameters'].sum():,} parameters are trained.")
for fit, own in smooth.groupby("fit", sort=False):
    print(
        f"{fit}: loss {own['loss'].iloc[0]:.3f} at step {own['step'].iloc[0]}, {own['loss'].iloc[-1]:.3f} at the end."
    )
for defect, own in decoder.iterrows():
    print(
        f"AdaBLDM, {defect}: adapting the decoder brings the error outside from {own.iloc[0]:.2f} to {own.iloc[1]:.2f} grey levels."
    )
print(s.stamp())
