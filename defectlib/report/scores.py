"""Scores of single samples: what was drawn, how far it is from real images, and whether its mask lies on a defect.

Nothing here draws a sample or fits a model: a score that needs a model which is not there is empty.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor

from defectlib import judges, paths, sampling, training
from defectlib.metrics import features, nearest, perceptual
from defectlib.study import Study
from defectlib.types import Sample


class Score(NamedTuple):
    """How a score is written, and at which end of it the worse samples are."""

    title: str
    worse: str
    digits: int


# What is worse is where to look first, not a verdict: a good new defect is far from every shot too.
SCORES = {
    "area": Score("mask area", "low", 3),  # next to nothing to learn from
    "components": Score("pieces of the mask", "high", 0),  # crumbs
    "change_inside": Score("change inside", "low", 0),  # grey levels; 0: nothing was drawn
    "change_outside": Score("change outside", "high", 1),  # grey levels; 0: the background is kept
    "distance": Score("distance to nearest shot ({extractor})", "high", 2),  # drawn like no real defect
    "lpips": Score("LPIPS to nearest real ({perceptual})", "high", 3),  # looks like no real image
    "mask_seen": Score("mask on defect, IoU", "low", 2),  # the mask lies beside what is seen
}
DRAWN = ("area", "components", "change_inside", "change_outside")
MEASURED = ("distance", "lpips", "mask_seen")


@dataclass(frozen=True)
class _Run:
    """A drawn run, equal to another where all that its scores are read from is the same."""

    folder: Path
    seed: int
    drawn: str  # sha256 of the stage file, which says when it was drawn
    data: str
    reader: str  # sha256 of the localiser of the shots; empty where it is not trained
    networks: str  # the settings that say which extractors are asked
    study: Study = field(compare=False)


def _run(s: Study, method: str, seed: int) -> _Run:
    folder = s.folder(method, seed)
    if folder.record("sample") is None:
        raise FileNotFoundError(f"{folder.stage_file('sample')} is missing: draw the samples first (06_generation)")
    reader, asked = judges.kept_reader(s, seed)
    kept = training.kept_curve(reader, asked) is not None
    drawn = paths.sha256(folder.stage_file("sample"))
    return _Run(
        folder.path,
        seed,
        drawn,
        s.data_key(seed),
        paths.sha256(reader) if kept else "",
        s.settings.quality.model_dump_json(),
        s,
    )


def scores(s: Study, method: str, seed: int, defect: str) -> pd.DataFrame:
    """The scores of the samples of a defect, computed once as long as run, data, reader and extractors stay the same.

    Args:
        s: Of the category.
        method: A method or a variant whose samples are drawn.
        seed: Of the run.
        defect: Of the samples.

    Returns:
        One row a sample in the order of their seeds: ``seed``, ``defect``, the columns of :data:`SCORES`, and ``shot``,
        the id of the nearest shot. ``mask_seen`` is empty where the localiser of the shots has not been trained
        (07_quality does) or does not see real, held-out defects either.

    Raises:
        FileNotFoundError: The samples are not drawn.
        ValueError: There is none of the defect.
    """
    return _scored(_run(s, method, seed), defect).copy()


@functools.lru_cache(maxsize=256)
def _scored(run: _Run, defect: str) -> pd.DataFrame:
    report = sampling.read_report(run.folder)
    table = report[report["defect"] == defect].sort_values("seed", ignore_index=True)[["seed", "defect", *DRAWN]]
    if table.empty:
        there = ", ".join(report["defect"].unique()) or "none"
        raise ValueError(f"{run.folder} has no sample of '{defect}'; it has: {there}")
    return _measured(run, table, sampling.load(run.folder, defect))


def _measured(run: _Run, rows: pd.DataFrame, drawn: Sequence[Sample]) -> pd.DataFrame:
    """The rows of one defect with what is measured against real images."""
    s, defect = run.study, drawn[0].defect
    shots = [shot for shot in s.shots(run.seed) if shot.defect == defect]
    extract = features.load(s.settings.quality.extractor)
    found = nearest.nearest_shots(drawn, shots, extract).sort_values("sample")
    return rows.assign(
        distance=found["distance"].to_numpy(),
        lpips=_lpips(s, [item.image for item in drawn], s.real(defect, run.seed)),
        mask_seen=_mask_seen(run, defect, drawn) if run.reader else np.nan,
        shot=[shots[i].id for i in found["shot"]],
    )


def _lpips(s: Study, drawn: Sequence[Tensor], real: Sequence[Tensor]) -> np.ndarray:
    """LPIPS of each image to its nearest real one, as :func:`defectlib.metrics.quality.evaluate` embeds them."""
    trunk = features.load_perceptual(s.settings.quality.perceptual)
    size = trunk.size or perceptual.PROTOCOLS[s.settings.quality.ic_lpips].size
    return perceptual.lpips_to_nearest(trunk.embed(drawn, size), trunk.embed(real, size))[0].double().numpy()


def _mask_seen(run: _Run, defect: str, drawn: Sequence[Sample]) -> list[float] | float:
    """See :func:`defectlib.judges.seen`; withheld, as in the tables, where the reader misses real defects too."""
    _, known = judges.sees(run.study, run.seed, defect, run.study.held_out(run.seed))
    if known is not None and known < judges.SEEN_LEAST:
        return np.nan
    return judges.seen(run.study, run.seed, *sampling.stack(drawn))


def title(s: Study, score: str) -> str:
    """A score as it is written, with the network it comes from."""
    return SCORES[score].title.format(**s.settings.quality.model_dump())


def ranked(s: Study, method: str, seed: int, defect: str, score: str, worst_first: bool = True) -> pd.DataFrame:
    """The rows of :func:`scores` of one defect, sorted by a score; those without one come last.

    Raises:
        ValueError: There is no such score, or no sample of the defect.
    """
    if score not in SCORES:
        raise ValueError(f"there is no score '{score}'; there are: {', '.join(SCORES)}")
    rising = (SCORES[score].worse == "low") == worst_first
    return scores(s, method, seed, defect).sort_values(score, ascending=rising, kind="stable", ignore_index=True)


def written(row: pd.Series, score: str) -> str:
    """A score of a row of :func:`scores` as text; a dash where there is none."""
    return "–" if pd.isna(row[score]) else f"{row[score]:.{SCORES[score].digits}f}"
