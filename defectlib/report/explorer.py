"""A view of one sample, a sheet of a run's worst, and widgets over both: everything that is drawn, nothing that is not.

Everything here reads: no widget draws a sample or fits a model. None of them is ipywidgets' Output, which its own
``interactive`` has: nbclient answers it while a cell runs, now and then misses the cell's end for it, and then waits
for ever (jupyter/nbclient, issue 312).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ipywidgets
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from defectlib import images, sampling
from defectlib.report import figures, layout
from defectlib.report.scores import DRAWN, MEASURED, SCORES, ranked, scores, title, written
from defectlib.report.sheet import Picture
from defectlib.study import Study

TILES_A_ROW = 6
# Unlike an outline's red, it stands out on brick and rust too.
TINT = "#00C8FF"


def tinted(image: Tensor, mask: Tensor, opacity: float) -> Tensor:
    """An image (3, H, W) in [-1, 1] with its mask, bool (1, H, W), laid over it; opacity 0 leaves it as it is.

    Raises:
        ValueError: An opacity outside [0, 1].
    """
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must lie in [0, 1], got {opacity}")
    colour = torch.tensor(to_rgb(TINT))[:, None, None] * 2 - 1
    return torch.where(mask, image.lerp(colour.expand_as(image), opacity), image)


def view(
    s: Study, method: str, seed: int, defect: str, number: int = 0, opacity: float = 0.5, scale: float | None = None
) -> Figure:
    """One sample: the nearest shot outlined, the drawn image under its mask, the image alone, and its mask.

    Where the method draws an anomaly part, the part stands in the mask's place, the mask outlined on it.

    Args:
        s: Of the category.
        method: A method or a variant whose samples are drawn.
        seed: Of the run.
        defect: Of the sample.
        number: Its place among the run's samples of the defect, from 0.
        opacity: Of the mask, in [0, 1].
        scale: As for :func:`defectlib.report.figures.sheet`.

    Raises:
        FileNotFoundError: The samples are not drawn.
        ValueError: There is no such sample.
    """
    own = scores(s, method, seed, defect)
    if not 0 <= number < len(own):
        raise ValueError(f"{method} has {len(own)} samples of '{defect}', numbered from 0: there is no sample {number}")
    row, folder = own.iloc[number], s.folder(method, seed).path
    image, mask = sampling.read_pair(folder, row["seed"])
    shot = next(shot for shot in s.shots(seed) if (shot.defect, shot.id) == (defect, row["shot"]))
    part = sampling.part_file(folder, row["seed"])
    last = images.read_image(part) if part.is_file() else mask
    return figures.sheet(
        [[shot.image, tinted(image, mask, opacity), image, last]],
        column_labels=["nearest shot", "drawn, with its mask", "drawn", "part" if part.is_file() else "mask"],
        outline_masks=[[shot.mask, None, None, mask if part.is_file() else None]],
        title="\n".join([f"{_named(s, method, seed, defect)}: {part.name}, nearest shot {shot.id}", *_told(s, row)]),
        scale=scale,
    )


def _named(s: Study, method: str, seed: int, defect: str) -> str:
    return f"{layout.method_title(method)} on {s.category}, {defect}, seed {seed}"


def _told(s: Study, row: pd.Series) -> list[str]:
    """Two lines: the scores of the drawing, and those against real images that there are."""
    lines = [[f"{title(s, name)} {written(row, name)}" for name in names if pd.notna(row[name])]
             for names in (DRAWN, MEASURED)]  # fmt: skip
    return [" · ".join(line) for line in lines]


def contact_sheet(
    s: Study,
    method: str,
    seed: int,
    defect: str,
    score: str = "lpips",
    worst_first: bool = True,
    outlines: bool = False,
    n: int = 12,
    scale: float | None = None,
) -> Figure:
    """The first ``n`` samples of a defect by a score, each with its seed and score beneath.

    Args:
        s: Of the category.
        method: A method or a variant whose samples are drawn.
        seed: Of the run.
        defect: Of the samples.
        score: One of :data:`SCORES`.
        worst_first: False starts with the best.
        outlines: Outline the masks.
        n: The most samples to show.
        scale: As for :func:`defectlib.report.figures.sheet`.

    Raises:
        FileNotFoundError: The samples are not drawn.
        ValueError: There is no such score, or no sample of the defect.
    """
    table = ranked(s, method, seed, defect, score, worst_first)
    folder, few = s.folder(method, seed).path, table.head(n)
    pairs = [sampling.read_pair(folder, own) for own in few["seed"]]
    captions = [f"{row['seed']:06d} · {written(row, score)}" for _, row in few.iterrows()]
    order = f"{'worst' if worst_first else 'best'} first, {len(few)} of {len(table)}"
    if table[score].isna().all():
        order = "not measured yet, or withheld"
    return figures.sheet(
        _rows([image for image, _ in pairs]),
        outline_masks=_rows([mask if outlines else None for _, mask in pairs]),
        captions=_rows(captions),
        title=f"{_named(s, method, seed, defect)}\n{title(s, score)} ({SCORES[score].worse} is worse): {order}",
        scale=scale,
    )


def _rows(items: Sequence[Any]) -> list[Sequence[Any]]:
    return [items[i : i + TILES_A_ROW] for i in range(0, len(items), TILES_A_ROW)]


class DrawnRun(NamedTuple):
    """A run whose samples are drawn: the study of its category, and how many pairs there are of each defect."""

    study: Study
    pairs: dict[str, int]


def drawn_runs(s: Study) -> dict[tuple[str, str, int], DrawnRun]:
    """Every run of the data set that has samples, by (category, method, seed).

    In a category the study's own methods come first, in their order, then its variants, then others by name.

    Raises:
        FileNotFoundError: There is none.
    """
    found = {}
    for file in s.parameters.dataset_folder().glob("*/*/s[0-9]*/sample.json"):
        record = json.loads(file.read_text())
        areas = [row for row in record["metrics"] if row["metric"] == "mask_area" and row["value"] is not None]
        asked = {"defects": tuple(record["parameters"]["prompts"]), "all_defects": tuple(record["parameters"]["order"])}
        of = dataclasses.replace(s, category=record["category"], **asked)
        if areas:
            pairs = {row["defect"]: row["protocol"]["n_generated"] for row in areas}
            found[record["category"], record["method"], record["seed"]] = DrawnRun(of, pairs)
    if not found:
        raise FileNotFoundError(
            f"{s.parameters.dataset_folder()} holds no samples to explore: draw some first (notebook 06_generation)"
        )
    order = {name: i for i, name in enumerate([*s.methods, *s.variants])}
    return dict(sorted(found.items(), key=lambda run: (run[0][0], order.get(run[0][1], len(order)), run[0][1:])))


def interactive(draw: Callable[..., Picture], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Controls over what ``draw`` gives of their values, drawn anew when one of them changes."""
    picture = ipywidgets.Image(format="png")

    def changed(_: Any = None) -> None:
        picture.value = draw(**{name: control.value for name, control in controls.items()})._repr_png_()

    for control in controls.values():
        control.observe(changed, "value")
    changed()
    return ipywidgets.VBox([*controls.values(), picture])


def explore_samples(s: Study) -> ipywidgets.VBox:
    """A widget over :func:`view`: any sample that is drawn, its mask laid over it as strongly as one likes."""
    controls = {
        "number": ipywidgets.SelectionSlider(description="sample", options=[("0", 0)], continuous_update=False),
        "opacity": ipywidgets.FloatSlider(0.5, min=0, max=1, step=0.1, description="mask", continuous_update=False),
    }
    return _Panel(s, view, controls).box


def explore_sheet(s: Study) -> ipywidgets.VBox:
    """A widget over :func:`contact_sheet`: any run that is drawn, sorted by any score."""
    named, order = {title(s, name): name for name in SCORES}, {"worst first": True, "best first": False}
    controls = {
        "score": ipywidgets.Dropdown(description="score", options=named, value="lpips", layout={"width": "25em"}),
        "worst_first": ipywidgets.Dropdown(description="order", options=order, value=True),
        "outlines": ipywidgets.Checkbox(False, description="outline the masks"),
    }
    return _Panel(s, contact_sheet, controls).box


class _Panel:
    """Menus over the runs that are drawn, more controls, and one picture that is drawn anew where it stands.

    A choice narrows the menus after it. It starts at the study's own category, its last method and its first seed.
    """

    def __init__(self, s: Study, draw: Callable[..., Picture], controls: Mapping[str, ipywidgets.Widget]):
        self.draw, self.controls, self.runs = draw, controls, drawn_runs(s)
        self.menus = {name: ipywidgets.Dropdown(description=name) for name in ("category", "defect", "method", "seed")}
        self.picture, self.narrowing = ipywidgets.Image(format="png"), False
        self._narrow({"category": s.category, "method": s.methods[-1], "seed": s.seeds[0], "defect": s.defects[0]})
        for control in [*self.menus.values(), *controls.values()]:
            control.observe(self._changed, "value")
        self._changed()
        rows = [ipywidgets.HBox(list(some.values())) for some in (self.menus, controls)]
        self.box = ipywidgets.VBox([*rows, self.picture])

    def _narrow(self, choice: Mapping[str, Any]) -> None:
        """Offer in each menu what goes with the choices before it."""
        menus = self.menus
        category = _offer(menus["category"], {c: c for c, _, _ in self.runs}, choice["category"])
        methods = {layout.method_title(m): m for c, m, _ in self.runs if c == category}
        method = _offer(menus["method"], methods, choice["method"])
        seeds = {str(n): n for c, m, n in self.runs if (c, m) == (category, method)}
        self.run = self.runs[category, method, _offer(menus["seed"], seeds, choice["seed"])]
        defect = _offer(menus["defect"], {name: name for name in self.run.pairs}, choice["defect"])
        if "number" in self.controls:
            number = self.controls["number"]
            _offer(number, {str(i): i for i in range(self.run.pairs[defect])}, number.value)

    def _changed(self, _: Any = None) -> None:
        if self.narrowing:  # a menu that is narrowed calls back like one that was chosen from
            return
        self.narrowing = True
        try:
            self._narrow({name: menu.value for name, menu in self.menus.items()})
        finally:
            self.narrowing = False
        asked = {name: self.menus[name].value for name in ("method", "seed", "defect")}
        drawn = self.draw(self.run.study, **asked, **{name: c.value for name, c in self.controls.items()})
        self.picture.value = drawn._repr_png_()


def _offer(menu: ipywidgets.Widget, options: Mapping[str, Any], choice: Any) -> Any:
    """Fill a menu; the choice is kept where it is among what is offered, else the first is taken. Returns it."""
    if dict(menu.options) != options:
        menu.options = list(options.items())
    menu.value = choice if choice in options.values() else next(iter(options.values()))
    return menu.value
