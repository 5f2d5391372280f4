"""What is known about each data set: licence, citation, source, expected counts, and how it is read.

A data set is added by one entry in :data:`DATASETS`; a new layout also needs a reader (:mod:`~defectlib.data.readers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from defectlib import images
from defectlib.data import exposures, readers
from defectlib.data.readers import GOOD, Scan

CHOSEN_CRACKS = 21
CHOSEN_SEED = 0

Completion = Callable[[pd.DataFrame, Path, int], pd.DataFrame]


def as_found(table: pd.DataFrame, root: Path, threshold: int) -> pd.DataFrame:
    """The table as the reader made it."""
    return table


def by_mask(table: pd.DataFrame, root: Path, threshold: int) -> pd.DataFrame:
    """KolektorSDD2: an image whose mask is empty is normal; one without a mask may show anything, and is left out."""
    empty = [bool(mask) and not (images.mask_values(root / mask) > threshold).any() for mask in table["mask"]]
    return table.assign(defect=np.where(empty, GOOD, "defect"))


def by_exposure(table: pd.DataFrame, root: Path, threshold: int) -> pd.DataFrame:
    """Magnetic tile: repeated exposures of one tile share a group (:mod:`defectlib.data.exposures`)."""
    masks = [
        images.mask_values(root / row.mask) > threshold if row.mask and row.defect != GOOD else None
        for row in table.itertuples()
    ]
    return exposures.regroup(table, masks, (images.open_pil(root / name) for name in table["image"]))


def chosen_cracks(table: pd.DataFrame, root: Path, threshold: int) -> pd.DataFrame:
    """DeepCrack: 21 cracks and their 21 painted-over counterparts.

    DefectSynth uses 21 images (7 shots, 14 test) and names none. Ours: the photographs are put in an order drawn with
    seed 0, and the first image is taken from each in turn until there are 21; fewer photographs give a second round.
    The counterpart of a crack is a normal of the same group (``derive="inpaint"``), so it follows its crack's side.
    """
    usable = table[table["mask"] != ""]
    by_photo = {group: list(rows.index) for group, rows in usable.groupby("group", sort=True)}
    order = [sorted(by_photo)[i] for i in np.random.default_rng(CHOSEN_SEED).permutation(len(by_photo))]
    rounds = range(max(map(len, by_photo.values()), default=0))
    chosen = [by_photo[group][turn] for turn in rounds for group in order if turn < len(by_photo[group])]
    cracks = usable.loc[sorted(chosen[:CHOSEN_CRACKS])].assign(role="")
    return pd.concat([cracks, cracks.assign(defect=GOOD, derive="inpaint")], ignore_index=True)


@dataclass(frozen=True)
class Dataset:
    """What is known about a data set.

    Attributes:
        name: The name in parameters and folders.
        title: The name in tables.
        licence: Under which terms it may be used.
        citation: Whom to cite.
        page: The source's web page.
        obtain: The command or the manual step that obtains it, in one sentence.
        reader: Folder -> :class:`~defectlib.data.readers.Scan`.
        mask_threshold: A mask pixel is defect above this: 127 for 0/255 and antialiased masks, 0 for class ids and
            bilevel files.
        unit: "image"; "tiles" where images are too large for their defects and are read as crops; "auto" where that
            depends on the images.
        counts: Expected counts of the release: "train", "test" (images by role), "good", "good/train", "good/test",
            "defect" (all defect images that have a mask), "each defect" (images of every type).
        counts_per: Whether ``counts`` hold for the whole "dataset" or for each "category".
        normals: Where normals come from: "images", "crops" of the defect images, or "inpaint".
        redistributable: Whether pixels may be committed or shipped.
        complete: Fills in what only file contents tell.
    """

    name: str
    title: str
    licence: str
    citation: str
    page: str
    obtain: str
    reader: Callable[[Path], Scan]
    mask_threshold: int = 127
    unit: str = "image"
    counts: Mapping[str, int] = field(default_factory=dict)
    counts_per: str = "dataset"
    normals: str = "images"
    redistributable: bool = False
    complete: Completion = as_found


_NC_SA = "CC BY-NC-SA 4.0: non-commercial; images drawn from it are adapted material under the same terms"

_ALL = [
    Dataset(
        name="mini",
        title="mini (built in)",
        licence="MIT, with the project; its textures start from CC0 photographs bundled with scikit-image",
        citation="this project",
        page="defectlib/data/MINI_CARD.md",
        obtain="it is drawn on first use; python -m defectlib.data.mini draws it into data/mini",
        reader=readers.mvtec,
        counts={"good/train": 60, "good/test": 20, "each defect": 24},
        counts_per="category",
        redistributable=True,
    ),
    Dataset(
        name="mvtec_ad",
        title="MVTec AD",
        licence=_NC_SA,
        citation="P. Bergmann, M. Fauser, D. Sattlegger, C. Steger: MVTec AD - A comprehensive real-world dataset for "
        "unsupervised anomaly detection. CVPR 2019",
        page="https://www.mvtec.com/company/research/datasets/mvtec-ad",
        obtain="register at https://www.mvtec.com/company/research/datasets/mvtec-ad, download "
        "mvtec_anomaly_detection.tar.xz, then: mkdir -p data/mvtec_ad && "
        "tar -xJf mvtec_anomaly_detection.tar.xz -C data/mvtec_ad",
        reader=readers.mvtec,
        counts={"good/train": 3629, "good/test": 467, "defect": 1258},
    ),
    Dataset(
        name="mvtec_3d",
        title="MVTec 3D-AD (rgb)",
        licence=_NC_SA,
        citation="P. Bergmann, X. Jin, D. Sattlegger, C. Steger: The MVTec 3D-AD dataset for unsupervised 3D anomaly "
        "detection and localization. VISAPP 2022",
        page="https://www.mvtec.com/company/research/datasets/mvtec-3d-ad",
        obtain="register at https://www.mvtec.com/company/research/datasets/mvtec-3d-ad, download "
        "mvtec_3d_anomaly_detection.tar.xz, then: mkdir -p data/mvtec_3d && "
        "tar -xJf mvtec_3d_anomaly_detection.tar.xz -C data/mvtec_3d",
        reader=readers.mvtec,
        mask_threshold=0,
        unit="tiles",
        counts={"good/train": 2950, "good/test": 249, "defect": 948},
    ),
    Dataset(
        name="gdxray",
        title="GDXray welds",
        licence="education and research only; the radiographs are property of BAM Berlin, no commercial use",
        citation="D. Mery et al.: GDXray: The database of X-ray images for nondestructive testing. Journal of "
        "Nondestructive Evaluation 34(4), 2015",
        page="https://domingomery.ing.puc.cl/material/gdxray/",
        obtain="download the group Welds from https://domingomery.ing.puc.cl/material/gdxray/ and put its folders "
        "W0001 and W0002 into data/gdxray",
        reader=readers.gdxray,
        mask_threshold=0,
        unit="tiles",
        counts={"defect": 10},
        normals="crops",
    ),
    Dataset(
        name="deepcrack",
        title="DeepCrack",
        licence="non-commercial research and education only",
        citation="Y. Liu, J. Yao, X. Lu, R. Xie, L. Li: DeepCrack: A deep hierarchical feature learning architecture "
        "for crack segmentation. Neurocomputing 338, 2019",
        page="https://github.com/yhlleo/DeepCrack",
        obtain="clone https://github.com/yhlleo/DeepCrack and unzip its dataset/DeepCrack.zip into data/deepcrack, so "
        "that data/deepcrack/train_img exists",
        reader=readers.deepcrack,
        counts={"train": 300, "test": 237, "defect": 537},
        normals="inpaint",
        complete=chosen_cracks,
    ),
    Dataset(
        name="btad",
        title="BTAD",
        licence=_NC_SA + " (as anomalib states it; the archive carries no licence file: confirm with the authors)",
        citation="P. Mishra, R. Verk, D. Fornasier, C. Piciarelli, G. L. Foresti: VT-ADL: A vision transformer network "
        "for image anomaly detection and localization. ISIE 2021",
        page="https://avires.dimi.uniud.it/papers/btad/",
        obtain="download https://avires.dimi.uniud.it/papers/btad/btad.zip and unzip it so that data/btad/01/train/ok "
        "exists",
        reader=readers.btad,
        counts={"good/train": 1799, "good/test": 451, "defect": 290},
    ),
    Dataset(
        name="ksdd2",
        title="KolektorSDD2",
        licence=_NC_SA,
        citation="J. Bozic, D. Tabernik, D. Skocaj: Mixed supervision for surface-defect detection: from weakly to "
        "fully supervised learning. Computers in Industry 129, 2021",
        page="https://www.vicos.si/resources/kolektorsdd2/",
        obtain="download KolektorSDD2.zip from https://www.vicos.si/resources/kolektorsdd2/ and unzip it so that "
        "data/ksdd2/train exists",
        reader=readers.ksdd2,
        counts={"good/train": 2085, "good/test": 894, "defect": 356},
        complete=by_mask,
    ),
    Dataset(
        name="magnetic_tile",
        title="Magnetic tile",
        licence="no licence file; the authors welcome use with citation",
        citation="Y. Huang, C. Qiu, K. Yuan: Surface defect saliency of magnetic tile. The Visual Computer 36, 2020",
        page="https://github.com/abin24/Magnetic-tile-defect-datasets.",
        obtain='git clone "https://github.com/abin24/Magnetic-tile-defect-datasets." data/magnetic_tile',
        reader=readers.magnetic_tile,
        unit="tiles",
        counts={"good": 952, "defect": 392},
        complete=by_exposure,
    ),
    Dataset(
        name="folder",
        title="your folder",
        licence="yours",
        citation="yours",
        page="",
        obtain="lay the folder out as <category>/train/good/*.png, <category>/test/<defect>/*.png and "
        "<category>/ground_truth/<defect>/<same name>_mask.png (0 surface, 255 defect)",
        reader=readers.mvtec,
        unit="auto",
    ),
]

DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in _ALL}


def dataset(name: str) -> Dataset:
    """The entry of a data set.

    Raises:
        ValueError: No such data set; the sentence lists those that exist.
    """
    if name not in DATASETS:
        raise ValueError(f"there is no data set '{name}'; known: {', '.join(DATASETS)}")
    return DATASETS[name]
