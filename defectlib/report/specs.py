"""What each table is about: its metrics, its protocol, whose results belong in it; and the reason codes.

A reason says why a reproduced number may not be read against the published one, or why one of the two is missing.
"""

from __future__ import annotations

from dataclasses import dataclass

REASONS = {
    "not_run": "not run here",
    "not_run_for_all": "run here for some of the categories only, so there is no average",
    "withheld": "run, but withheld: too few images, no mask to draw for, nothing to tell apart, or drawn in two goes",
    "partly_withheld": "defects with too few images, or without a mask to draw for, are left out of the mean",
    "other_extractor": "features of a small network of this package, not of Inception, AlexNet or VGG",
    "other_dataset": "the papers have no number for this data set",
    "other_split": "another split than the paper's protocol for this table",
    "other_crops": "the paper's weld crops are not published, these are ours",
    "other_machine": "time on another machine than the paper's",
    "other_steps": "another number of denoising steps than the paper's time was taken at",
    "reduced_scale": "a small profile, not the paper's model, resolution and training",
    "other_training": "the downstream model's layers, loss, decay, augmentation or image size are not the paper's",
    "undefined_in_paper": "the paper prints no such number, or does not say which variant of the measure it used",
    "other_n": "IS rises with the number of images, and the methods here have different ones",
    "chosen_checkpoint": "a checkpoint was chosen instead of the last step, by the rule that the protocol names",
    "dirty": "the code had uncommitted changes",
}


def explain(codes: list[str]) -> str:
    """Codes as they stand in a table's column ``why``: "code: words; code: words"."""
    return "; ".join(f"{code}: {REASONS[code]}" for code in codes)


def codes(why: str) -> list[str]:
    """The codes in a cell of the column ``why``."""
    return [part.split(":", 1)[0] for part in why.split("; ") if part]


ORACLE = "test_oracle"
"""The column of scores of models that were chosen by their test score."""
QUALITY = ("kid", "lpips", "is")
CLASSIFICATION = ("accuracy", "f1_macro")
LOCALISATION = (
    "image_auroc", "image_ap", "image_f1", "image_f1_50", "image_f1_max",
    "pixel_auroc", "pixel_ap", "pixel_f1", "pixel_f1_50", "pixel_f1_max",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One table.

    Attributes:
        title: What the paper's caption says, shortened.
        kinds: Metrics without their extractor, in the order shown.
        split: The rule of the paper's protocol; None where the paper leaves it open.
        profile: The profile that is the protocol; a run of any other is at reduced scale.
        datasets: Only results on these are shown; empty: all but ``elsewhere``.
        elsewhere: Data sets that have a table of their own.
        categories: Only results on these categories are shown; empty: all.
        methods_of_paper: Only results of the methods that the published table lists.
        rows: "category" (a row a category), "average" (a row a data set) or "both".
        selected: Its scores are of trained models, of which released evaluations choose the best by the test set.
        steps: Denoising steps that published times were taken at, where the table is of them.
        note: What a reader must know of the protocol.
    """

    title: str
    kinds: tuple[str, ...]
    split: str | None
    profile: str = "paper"
    datasets: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    methods_of_paper: bool = False
    rows: str = "both"
    selected: bool = False
    steps: int | None = None
    note: str = ""


_QUALITY_NOTE = (
    "KID is times 1,000 and unbiased, so it can be negative; a defect's number is a mean over its real images, a "
    "category's a mean over its defects, the sd is over seeds. The paper does not name LPIPS' network, so its LPIPS "
    "has no counterpart of ours. In demo DualAnoDiff and the symmetry-aware system start from a base model adapted to "
    "the category's normal images, the others do not."
)
ORACLE_NOTE = (
    "Best on test: the same trainings, each tested at the one of a few checkpoints that scores best on the test set "
    "(accuracy, pixel AP); the score it is chosen by can only rise by that. Released evaluations choose among all "
    "epochs, localisers by a sum of four scores, which flatters more."
)
"""Added to a table's note where it has the column."""
_ABLATION_NOTE = "DefectSynth on MVTec AD's wood, as in the paper; variants are rows of their own."

SPECS = {
    "table_1": Spec(
        "Real defect images used in the two stages, fewest and most over a category's defects",
        ("masks_stage1_min", "masks_stage1_max", "images_stage2_min", "images_stage2_max"),
        "all_shots",
        rows="category",
        note="Ours: shots in the split manifest; the same shots give the masks of stage 1 and the images of stage 2.",
    ),
    "table_2": Spec(
        "Generation quality on MVTec AD",
        QUALITY,
        "all_shots",
        elsewhere=("gdxray", "deepcrack"),
        note=_QUALITY_NOTE,
    ),
    "table_3": Spec(
        "Generation quality on GDXray and DeepCrack",
        QUALITY,
        "all_shots",
        datasets=("gdxray", "deepcrack"),
        note=_QUALITY_NOTE,
    ),
    "table_4": Spec(
        "Training time and speed of drawing",
        ("train_stage1_h", "train_stage2_h", "train_total_h", "fit_s", "pairs_per_second"),
        None,
        rows="category",
        note=(
            "Published: one defect (wood, hole), 256 px, 50 epochs, batch 1, 500 pairs, RTX 4090. The profile table_4 "
            "is this protocol; any other is a reduced form: its own fit and draw, on the machine named with each run, "
            "in seconds of the processor where one thread computes. A base model that is adapted to a category first, "
            "once for all that start from it, is not counted, nor are masks that are made before drawing begins: those "
            "of Crop-Paste, DefectSynth and AdaBLDM. The other two draw theirs, and what they draw again counts."
        ),
        profile="table_4",
    ),
    "table_5": Spec(
        "Ablation of DefectSynth's modules on wood",
        QUALITY,
        "all_shots",
        methods_of_paper=True,
        rows="category",
        note=_ABLATION_NOTE,
    ),
    "table_6": Spec(
        "Four mask strategies on wood",
        ("mask_iou", *QUALITY),
        "all_shots",
        methods_of_paper=True,
        rows="category",
        note=_ABLATION_NOTE,
    ),
    "table_7": Spec(
        "Time of an image with and without SAE",
        ("seconds_per_image",),
        None,
        methods_of_paper=True,
        rows="category",
        steps=50,
        note=(
            "Published: 50 steps on an RTX 4090. Ours: as many steps as the profile has, in seconds of the processor "
            "where one thread computes, else of the clock."
        ),
    ),
    "table_8": Spec(
        "Classification of defects by a ResNet-34 on MVTec AD",
        CLASSIFICATION,
        "random_thirds",
        selected=True,
        note=(
            "Percent on held-out real defects. The paper does not say how F1 is averaged over defects; ours is the "
            "macro mean. The paper has no row for Crop-Paste. Where a profile counts epochs, w/o augmentation trains "
            "fewer steps than the others: the learning curve's point at 0 samples trains as long as they do."
        ),
    ),
    "table_9": Spec(
        "Localisation of defects by a U-Net",
        LOCALISATION,
        "first_third",
        selected=True,
        note=(
            "Percent on held-out real images. Pixel F1 is at threshold 0.5, as the paper says; the paper names no "
            "threshold for the image F1, so ours stands in rows of its own: at 0.5 and the largest over all thresholds."
        ),
    ),
    "table_10": Spec(
        "Tire inspection: classification and localisation",
        (*CLASSIFICATION, *LOCALISATION),
        None,
        categories=("tire",),
        rows="category",
        selected=True,
        note=(
            "The paper's tire X-rays are private. MVTec 3D-AD's tire stands beside them under its own name, where "
            "it was run."
        ),
    ),
    "headline": Spec(
        "What the four abstracts state",
        (
            "is", "ic-lpips", "accuracy", "pixel_ap", "pixel_f1", "pixel_f1_50", "pixel_f1_max",
            "pro", "iap", "iap90", "ap_gain", "iap_gain", "iap90_gain",
        ),  # fmt: skip
        None,
        rows="average",
        note=(
            "Means over all categories of a data set. The abstracts name neither IC-LPIPS' network and clusters nor "
            "the threshold of F1-P; AdaBLDM's gains are percentage points over a best earlier system that is not named "
            "there: ours are over Crop-Paste. The detector behind AP, PRO and IAP is the localiser of downstream, "
            "AdaBLDM's was DeSTSeg. PRO is the per-region overlap up to a false positive rate of 0.3; IAP and IAP90 "
            "are instance average precision and precision at 90 % of the instances, as defined in metrics/regions."
        ),
    ),
}  # fmt: skip
