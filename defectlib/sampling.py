"""Writes requests, and drives any fitted method over them, skipping what is done.

The unit of resume is a group of requests: a group is complete when all its images and masks are on disk. File names are
seeds (``000137.png``), so a sample is found again whatever the batch or the restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from defectlib import images, paths
from defectlib.masks import shape
from defectlib.masks.interpolation import NoMask
from defectlib.masks.sources import MaskSource
from defectlib.methods.base import Method
from defectlib.types import Request, Sample, Shot

SEED_STRIDE_RUN, SEED_STRIDE_DEFECT = 1_000_000, 10_000
COLUMNS = ["seed", "group", "category", "defect", "prompt", "area", "components", "change_inside", "change_outside"]


def plan(
    shots: Sequence[Shot],
    normals: Sequence[Tensor],
    n: int,
    mask_source: MaskSource | None,
    seed: int,
    prompts: dict[str, str],
    defects: Sequence[str] | None = None,
    group_size: int = 1,
    one_normal_a_group: bool = False,
    without: list[NoMask] | None = None,
) -> list[Request]:
    """Write ``n`` requests for each defect of the shots.

    Args:
        shots: The real pairs; their defects are what is asked for.
        normals: float32 (3, H, W) images to draw on; chosen by the request's seed.
        n: Requests a defect, at most 9,999.
        mask_source: Draws a mask from (generator, shots of the defect, normal), see ``masks.sources``; None where the
            method makes its own.
        seed: The run's seed. Request i of defect d has the seed ``seed * 1e6 + d * 1e4 + i``.
        prompts: Defect -> text prompt.
        defects: All defects of the category in order; a defect's index d does not move when fewer are asked for.
        group_size: Consecutive requests of one defect that form a group.
        one_normal_a_group: The normal is chosen by the group's seed instead.
        without: A request that the source drew no mask for is left out, and why is appended here.

    Raises:
        ValueError: There is no normal, or ``n`` is out of range.
        NoMask: The source drew no mask for a request, and ``without`` is None.
    """
    if not normals:
        raise ValueError("there is no normal image to draw on: give at least one in train/good")
    if not 1 <= n < SEED_STRIDE_DEFECT:
        raise ValueError(f"n_per_defect must be between 1 and {SEED_STRIDE_DEFECT - 1}, got {n}")
    present = list(dict.fromkeys(shot.defect for shot in shots))
    order = list(defects or present)
    requests = []
    for defect in present:
        own = [shot for shot in shots if shot.defect == defect]
        base = seed * SEED_STRIDE_RUN + order.index(defect) * SEED_STRIDE_DEFECT
        for i in range(n):
            # A child stream: what a method draws from the request's seed is independent of what was drawn here.
            rng = np.random.default_rng([base + i, 1])
            group = (base + i // group_size * group_size) if group_size > 1 else base + i
            chooser = np.random.default_rng([group, 1]) if one_normal_a_group else rng
            normal = normals[chooser.integers(len(normals))]
            try:
                mask = None if mask_source is None else mask_source(rng, own, normal)
            except NoMask as error:
                if without is None:
                    raise
                without.append(error)
                continue
            requests.append(Request(normal, mask, own[0].category, defect, prompts[defect], base + i, group))
    return requests


def image_file(folder: Path, seed: int) -> Path:
    """Where the image of a seed lies."""
    return folder / "images" / f"{seed:06d}.png"


def mask_file(folder: Path, seed: int) -> Path:
    """Where the mask of a seed lies."""
    return folder / "masks" / f"{seed:06d}.png"


def part_file(folder: Path, seed: int) -> Path:
    """Where the anomaly part of a seed lies, if the method draws one."""
    return folder / "parts" / f"{seed:06d}.png"


def draw(method: Method, requests: Sequence[Request], folder: Path, progress: bool = False) -> pd.DataFrame:
    """Draw all requests into ``folder``, group by group; what lies there already is kept.

    An image for a grey normal is written grey, its channels' mean: a sensor of one channel has no tinge, which a
    classifier would learn. This companion's; the released codes write what the autoencoder gives.

    Returns:
        The report of :func:`describe`, also written to ``samples.csv`` when all are drawn.

    Raises:
        ValueError: The method returned another number of samples than was asked for.
    """
    groups: dict[int, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.group, []).append(request)
    for group in tqdm(groups.values(), disable=not progress, desc="drawing"):
        # The mask is written last, so a pair is complete when its mask is there.
        if all(mask_file(folder, request.seed).is_file() for request in group):
            continue
        samples = method.sample(group)
        if [sample.seed for sample in samples] != [request.seed for request in group]:
            raise ValueError(f"{type(method).__name__} returned {len(samples)} samples for {len(group)} requests")
        for sample, request in zip(samples, group):
            image = images.to_grey(sample.image) if images.is_grey(request.normal) else sample.image
            images.write_image(image_file(folder, sample.seed), image)
            if sample.part is not None:
                images.write_image(part_file(folder, sample.seed), sample.part)
            images.write_mask(mask_file(folder, sample.seed), sample.mask, sample.notes)
    report = describe(requests, folder)
    paths.write_text(folder / "samples.csv", report.to_csv(index=False))
    return report


def describe(requests: Sequence[Request], folder: Path) -> pd.DataFrame:
    """One row a drawn sample: mask area (share of the image), components, mean absolute change against the normal.

    Changes are in 8-bit grey levels, inside and outside the mask; an unchanged inside means that nothing was drawn.
    What a method noted of its masks follows, a column a note.
    """
    rows, notes = [], []
    for request in requests:
        image, mask = read_pair(folder, request.seed)
        grey = [images.to_uint8(picture).astype(np.int16) for picture in (image, request.normal)]
        change = torch.from_numpy(np.abs(grey[0] - grey[1]).mean(-1))[None]
        outside = ~mask
        rows.append([
            request.seed, request.group, request.category, request.defect, request.prompt,
            round(mask.float().mean().item(), 5), shape.describe(mask).components,
            round(change[mask].mean().item(), 2) if mask.any() else 0.0,
            round(change[outside].mean().item(), 2) if outside.any() else 0.0,
        ])  # fmt: skip
        notes.append(images.read_notes(mask_file(folder, request.seed)))
    return pd.concat([pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame(notes)], axis=1)


def read_pair(folder: Path, seed: int) -> tuple[Tensor, Tensor]:
    """The image and mask of one drawn sample, as they were written."""
    return images.read_image(image_file(folder, seed)), images.read_mask(mask_file(folder, seed))


def read_report(folder: Path) -> pd.DataFrame:
    """What :func:`describe` told of a run folder's samples; names stay text, also where they are numbers.

    Raises:
        FileNotFoundError: Nothing has been drawn there.
    """
    table = folder / "samples.csv"
    if not table.is_file():
        raise FileNotFoundError(f"{table} is missing: draw the samples first (notebook 06_generation)")
    return pd.read_csv(table, keep_default_na=False, dtype=dict.fromkeys(("category", "defect", "prompt"), str))


def load(folder: Path, defect: str | None = None, limit: int | None = None) -> list[Sample]:
    """The drawn samples of a run folder in the order of their seeds, parts left out; ``limit`` counts per defect."""
    report = read_report(folder).sort_values("seed")
    if defect is not None:
        report = report[report["defect"] == defect]
    if limit is not None:
        report = report.groupby("defect", sort=False).head(limit)
    return [
        Sample(
            *read_pair(folder, row.seed), row.category, row.defect, row.seed, row.group,
            images.read_notes(mask_file(folder, row.seed)),
        )
        for row in report.itertuples()
    ]  # fmt: skip


def first(folder: Path, defect: str) -> Sample | None:
    """The first drawn sample of a defect; None where no mask could be drawn for it."""
    return next(iter(load(folder, defect, limit=1)), None)


def copy(source: Path, target: Path, seeds: Sequence[int]) -> None:
    """Copy the samples of these seeds from one run folder to another, whose ``samples.csv`` is written last."""
    for file_of in (image_file, mask_file, part_file):
        for seed in seeds:
            if (file := file_of(source, seed)).is_file():
                paths.write_bytes(file_of(target, seed), file.read_bytes())
    report = read_report(source)
    paths.write_text(target / "samples.csv", report[report["seed"].isin(seeds)].to_csv(index=False))


def problems(report: pd.DataFrame) -> pd.DataFrame:
    """The samples that must not reach training unseen: a mask that is empty, full or flawed, or an unchanged inside."""
    bad = (report["area"] == 0) | (report["area"] == 1) | (report["change_inside"] == 0)
    return report[bad | (report["flaw"].fillna("") != "") if "flaw" in report else bad]


def teaches(sample: Sample) -> bool:
    """Whether a localiser may learn from a sample: its mask is neither empty nor full, and has no noted flaw."""
    return shape.usable(sample.mask) and not sample.notes.get("flaw")


def stack(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and masks (N, 1, H, W) of samples of one size."""
    return torch.stack([s.image for s in samples]), torch.stack([s.mask for s in samples])
