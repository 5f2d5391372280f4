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
# # 1. Data: what there is to learn from
#
# Inspection lines have thousands of good images and a handful of defective ones. This notebook shows the data sets of the
# four papers and the one that is used here: its categories, how few defects there are, how they are split into *shots*
# (the few real pairs a method may learn from) and held-out test images, and what an audit of the files found.
#
# It reproduces **Table I** (how many real images each stage of DefectSynth saw) and **Figure 1** (the starting point:
# many normal images, few defective ones).
#
# One unit of this notebook is a data set.

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

# %% [markdown]
# The next cell checks the parameters. papermill only warns about a misspelt name and then runs the default; here it is
# an error.

# %%
import pandas as pd
from IPython.display import display

from defectlib import params, prepare, study
from defectlib.data import audit, layouts, splits
from defectlib.metrics import symmetry
from defectlib.report import figures, layout, tables

p = params.read(globals())
s = study.open_category(p)
folder = p.figures_folder()
figures.style()

# %% [markdown]
# ## The data sets
#
# None of them is shipped, except `mini`, the procedural benchmark of this project: their licences do not allow it.
# `python -m defectlib doctor` prints how to get each. What a name in this table means for the code is one small reader
# in `defectlib/data/readers.py`.

# %% tags=["nbval-check-output"]
pd.DataFrame(
    [
        [d.name, d.title, d.licence.split(":")[0], d.unit, "yes" if d.redistributable else "no"]
        for d in layouts.DATASETS.values()
    ],
    columns=["name", "data set", "licence", "read as", "shipped"],
)

# %% [markdown]
# ## The index
#
# A reader turns a folder into one table: a row an image, with its category, its defect (`good` for normals) and its
# mask. Everything later starts from this table, never from a folder listing.

# %%
index = prepare.read_index(p, s.root)
faulty = index[index["defect"] != "good"]
counts = index.groupby("category").agg(images=("id", "size"), parents=("image", "nunique"))
counts["normals"] = index[index["defect"] == "good"].groupby("category").size()
counts["defects"] = faulty.groupby("category")["defect"].agg(lambda names: ", ".join(dict.fromkeys(names)))
kind = "tiles" if (index["box"] != "").any() else "images"
print(f"{p.dataset}: {len(index)} {kind} in {len(counts)} categories")
counts

# %% [markdown]
# ## What the audit found
#
# Corrupt files, masks that are empty or belong to no image, duplicates that would leak into the test set, odd file
# formats: `python -m defectlib audit` lists them and never changes a file. An error would have stopped this notebook
# before it began.

# %%
found = audit.audit(p.dataset, s.root)
print(
    f"{len(found)} findings" if len(found) else "nothing to report: every file can be read and every pair is complete"
)
found.groupby(["severity", "problem"]).size().rename("files").reset_index() if len(found) else None

# %% [markdown]
# ## The split
#
# Four rules are in use in these papers, and the released codes implement none of them exactly: AnomalyDiffusion trains
# on one test image of each defect type, DualAnoDiff rounds the wrong number, DefectSynth's list holds all 1,258 images.
# Here the split is a file: it is written once, every row carries the sha256 of its image, and a leak is an error.
#
# * `first_third`: the lowest floor(n/3) images by number are shots, the rest is held out (the localisation protocol);
# * `random_thirds`: the same number, drawn at random in three partitions (the classification protocol);
# * `ten_shots`: the ten lowest, of fewer than twenty the lower half (AdaBLDM fixes ten by a list of its released code);
# * `all_shots`: every image, at most 30 (the generation protocol; nothing is held out).
#
# The rules can be checked without the images, because the counts of MVTec AD's 73 defect types are public:

# %% tags=["nbval-check-output"]
rows = []
for rule in splits.RULES:
    published = splits.published_split(rule, seed=0)
    side = published["side"].value_counts()
    rows.append([rule, len(published), int(side.get("shot", 0)), int(side.get("test", 0))])
pd.DataFrame(rows, columns=["rule", "defect images of MVTec AD", "shots", "held out"])

# %% [markdown]
# And the split of the data set at hand:

# %%
manifest = prepare.manifest(p)
splits.check(manifest)
print(f"rule {s.settings.data.split}, profile {p.profile_name}; no image or copy of one is on both sides")
table = manifest.pivot_table(index=["category", "defect"], columns="side", values="id", aggfunc="count", fill_value=0)
table

# %% [markdown]
# ## Table I
#
# The published row gives the range over a category's defect types of real masks (stage 1) and real images (stage 2);
# ours is counted from the split manifest above. The report writes the table for the categories of a batch: `table_1`,
# beside `report.html`.

# %%
layout.view(tables.build(None, "table_1", manifests=manifest))

# %% [markdown]
# ## Figure 1: many normal images, few defects
#
# The first row shows normal images of one category; below, all that a method may see of each defect. Red outlines are the
# masks.

# %%
normals = s.normals()[:8]
shots = {defect: [shot for shot in s.shots() if shot.defect == defect][:8] for defect in s.defects}
figure = figures.sheet(
    [normals] + [[shot.image for shot in few] for few in shots.values()],
    row_labels=["normal"] + list(shots),
    outline_masks=[[None] * len(normals)] + [[shot.mask for shot in few] for few in shots.values()],
)
figures.save(figure, folder, f"fig_1_starting_point_{s.category}", counts.reset_index())
figure

# %% [markdown]
# ## How large the defects are
#
# DefectSynth interpolates masks in image space where a defect's mean area ratio is below tau = 0.053, and in latent space
# above. So it matters which defects are small. Each dot is one real mask.

# %%
tau = 0.053
areas = pd.DataFrame(
    [(defect, shot.id, shot.mask.float().mean().item()) for defect, few in shots.items() for shot in few],
    columns=["defect", "shot", "area"],
)
figure = figures.strip(areas, x="area", y="defect", line=tau, xlabel="mask area / image area (log scale)", log=True)
figures.save(figure, folder, f"mask_area_{s.category}", areas)
figure

# %%
mean_area = areas.groupby("defect")["area"].mean()
for defect, value in mean_area.items():
    print(f"{defect}: mean area ratio {value:.4f}, {'below' if value < tau else 'above'} tau = {tau}")

# %% [markdown]
# ## What a defect breaks
#
# The symmetry-aware system rests on a premise: defects are local and asymmetric, on a globally regular structure. Here it is a
# number, which is our reading: the paper gives none. Every shot (eight of each defect, of every category) is compared with itself
# under its own best symmetry: mirrored about any axis, turned, or moved by a period, whichever correlates most; what differs is
# its residual, in grey levels of 255.
#
# * `ratio`: inside the mask over outside of it. On an object that alone says little: any mask there stands out from even ground.
# * `on_normals`: the ratio of the same masks on eight normal images.
# * `beyond`: one over the other, with a 95 % interval over the shots (`low`, `high`). **Where the premise holds it is above 1.**
#
# Medians over the shots. A correlation far below 1 says that there is hardly a symmetry to break. In the pictures white is a
# difference of 128 grey levels or more, and plain grey is where an image has no copy.

# %%
by_category = manifest[manifest["side"] == "shot"].groupby("category", sort=False)["defect"].unique()
broken, pictures = [], {}
for c, names in by_category.items():
    normals_of = splits.normals(manifest, s.root, c, "train", s.size, 8)
    usual = [symmetry.best_symmetry(image) for image in normals_of]
    for d in names:
        few = splits.shots(manifest, s.root, c, [d], s.size)[:8]
        found = symmetry.asymmetry([x.image for x in few], [x.mask for x in few], usual)
        broken.append(found.assign(category=c, defect=d))
        pictures.setdefault(c, []).append((few[0].image, few[0].mask))
broken = pd.concat(broken, ignore_index=True)
premise = symmetry.summary(broken, ["category", "defect"])
premise.round(2)

# %%
for c, few in pictures.items():
    figure = figures.sheet(
        [[image for image, _ in few], [symmetry.best_symmetry(image).picture() for image, _ in few]],
        row_labels=[f"{c}\nshot", "residual"], column_labels=list(by_category[c]), outline_masks=[[m for _, m in few]] * 2,
    )  # fmt: skip
    figures.save(figure, folder, f"symmetry_{c}", broken[broken["category"] == c])
    display(figure)

# %% [markdown]
# ## What was found

# %%
shots_total = int((manifest["side"] == "shot").sum())
print(f"{p.dataset}: {index['category'].nunique()} categories, {len(index)} images, {shots_total} of them shots.")
print(f"Small defects (below tau) in {s.category}: {', '.join(mean_area.index[mean_area < tau]) or 'none'};",
      f"large: {', '.join(mean_area.index[mean_area >= tau]) or 'none'}.")  # fmt: skip
above, below = premise["low"] > 1, premise["high"] < 1
print(f"Of {len(premise)} defects {above.sum()} differ from their own symmetry more than normal images do under the same masks, "
      f"{below.sum()} less; of the others eight shots do not tell.")  # fmt: skip
print(s.stamp())
