"""Charts and image sheets as matplotlib Figures, and how they are saved: one stem, pdf + png + csv, byte-stable.

No function here touches pyplot: nothing opens a window, and nothing is closed behind the caller's back. Every function
draws in the package's own style (``style.mplstyle``), whatever the caller's settings.
"""

from __future__ import annotations

import functools
import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from defectlib import paths, published
from defectlib.report import layout
from defectlib.report import sheet as sheets
from defectlib.report.sheet import Picture
from defectlib.report.tables import scale

STYLE = Path(__file__).with_name("style.mplstyle")
REFERENCE = "shots_only"
# In the order of the style's colours: a system looks alike in every figure, whatever stands beside it.
SYSTEMS = ("crop_paste", "defectsynth", "dualanodiff", "symmetry_aware", "adabldm")
PNG_DPI = 200
LEARNING_AXES = {"samples": "samples of each defect (dashed: the shots alone)", "shots": "shots of each defect"}


def style() -> None:
    """Use the package's style for the caller's own plots too."""
    matplotlib.rcParams.update(matplotlib.rc_params_from_file(STYLE, use_default_template=False))


def _styled(draw: Callable) -> Callable:
    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with matplotlib.rc_context(fname=STYLE):
            return draw(*args, **kwargs)

    return wrapper


def _settled(figure: Figure) -> Figure:
    """Lay out once and keep it: a second pass of the layout engine moves things by fractions of a pixel."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


sheet = _styled(sheets.sheet)
overlay = _styled(sheets.overlay)


@_styled
def save(figure: Figure, folder: Path | str, stem: str, data: pd.DataFrame | None = None) -> list[Path]:
    """Write ``<stem>.pdf``, ``<stem>.png`` (200 dpi) and, with ``data``, ``<stem>.csv``; the same bytes each time.

    Args:
        figure: What to save.
        folder: Where; created if missing.
        stem: File name without suffix.
        data: The plotted numbers.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="pdf", metadata={"CreationDate": None, "ModDate": None}, dpi=PNG_DPI)
    written = [Path(folder) / f"{stem}.{suffix}" for suffix in ("pdf", "png")]
    for target, content in zip(written, (drawn.getvalue(), sheets.png(figure, PNG_DPI))):
        paths.write_bytes(target, content)
    return written if data is None else [*written, save_data(data, folder, stem)]


def save_data(frame: pd.DataFrame, folder: Path | str, stem: str) -> Path:
    """Write ``<stem>.csv``: the rows without the index, ten significant digits."""
    target = Path(folder) / f"{stem}.csv"
    paths.write_text(target, frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    return target


def _colours(names: Sequence[str]) -> dict[str, str]:
    """One colour a name: systems have their own, the reference is grey, others take what is left in the order given."""
    cycle = [entry["color"] for entry in matplotlib.rcParams["axes.prop_cycle"]]
    own = {name: colour for name, colour in zip(SYSTEMS, cycle) if name in names} | {REFERENCE: "#777777"}
    others = [name for name in names if name not in own]
    left = [colour for colour in cycle if colour not in own.values()] or cycle
    return own | {name: left[i % len(left)] for i, name in enumerate(others)}


def _ordered(values: pd.Series) -> list:
    return list(dict.fromkeys(values))


@_styled
def compare(frame: pd.DataFrame) -> Figure:
    """Methods side by side, a row a metric: mean and sd over seeds, the single seeds as dots, "shots_only" in grey.

    Args:
        frame: Either single results (columns method, metric, value, one row a seed) or a built table (columns method,
            metric, reproduced, sd), of one category.

    Raises:
        ValueError: No number to show.
    """
    table = "reproduced" in frame
    value = "reproduced" if table else "value"
    frame = frame[frame[value].notna()]
    if frame.empty:
        raise ValueError("there is no number to compare: run the stage first")
    metrics, methods = _ordered(frame["metric"]), _ordered(frame["method"])
    methods = sorted(methods, key=lambda name: (name != REFERENCE, methods.index(name)))
    colours = _colours(methods)
    figure = Picture(figsize=(6.4, 0.55 + len(metrics) * (0.2 + 0.16 * len(methods)) + 0.5), layout="constrained")
    axes = figure.add_subplot()
    step = 0.7 / max(1, len(methods))
    for i, method in enumerate(methods):
        shift = (i - (len(methods) - 1) / 2) * step
        for k, metric in enumerate(metrics):
            some = frame[(frame["method"] == method) & (frame["metric"] == metric)]
            if some.empty:
                continue
            mean = some[value].mean()
            sd = some["sd"].iloc[0] if table else (some[value].std() if len(some) > 1 else np.nan)
            if not table:
                axes.plot(some[value], [k + shift] * len(some), ".", color=colours[method], alpha=0.45, markersize=5)
            axes.errorbar(
                mean, k + shift, xerr=None if pd.isna(sd) else sd, fmt="o", color=colours[method], capsize=2.5,
                markersize=5, elinewidth=1.2, label=layout.method_title(method) if k == 0 else None,
            )  # fmt: skip
    axes.set_yticks(range(len(metrics)), [layout.metric_title(m).replace(", %", "") for m in metrics])
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    for k in range(len(metrics) - 1):
        axes.axhline(k + 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    alone = not table and not frame.duplicated(["metric", "method"]).any()
    axes.set_xlabel("one seed" if alone else "mean ± sd over seeds" + ("" if table else "; dots are single seeds"))
    handles, labels = _legend_entries(methods, colours)
    figure.legend(handles, labels, loc="outside upper left", ncols=min(4, len(methods)))
    return _settled(figure)


@_styled
def intervals(frame: pd.DataFrame, columns: int = 4) -> Figure:
    """A panel a metric, a row a defect, a colour a method: the value with its interval, a bar a seed.

    Args:
        frame: Columns metric, defect, method, value, low, high, as stored; one row a seed. NaN is left out.
        columns: Panels beside each other.

    Raises:
        ValueError: No number to show.
    """
    frame = frame[frame["value"].notna()]
    if frame.empty:
        raise ValueError("there is no number to show: run the stage first")
    metrics, defects, methods = (_ordered(frame[name]) for name in ("metric", "defect", "method"))
    colours, step = _colours(methods), 0.8 / len(methods)
    lines = -(-len(metrics) // columns)
    height = 0.55 + 0.13 * len(methods) * len(defects)
    figure = Picture(figsize=(7.2, 0.4 + lines * height), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, metric in zip(panels.flat, metrics):
        for (defect, method), some in frame[frame["metric"] == metric].groupby(["defect", "method"], sort=False):
            y = defects.index(defect) + (methods.index(method) - (len(methods) - 1) / 2) * step
            some = some[["value", "low", "high"]] * scale(published.kind(metric))
            for k, (value, low, high) in enumerate(some.to_numpy()):
                at = y + (k - (len(some) - 1) / 2) * 0.6 * step / len(some)
                axes.plot([low, high], [at, at], color=colours[method], linewidth=1.4 if len(some) == 1 else 0.9)
                axes.plot(value, at, "o", color=colours[method], markersize=3.5 if len(some) == 1 else 2.2)
        axes.set_title(layout.metric_title(metric), fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="y", visible=False)
    panels[0, 0].set_yticks(range(len(defects)), defects)
    panels[0, 0].set_ylim(len(defects) - 0.5, -0.5)
    for axes in panels.flat[len(metrics) :]:
        axes.set_visible(False)
    handles, labels = _legend_entries(methods, colours)
    figure.legend(handles, labels, loc="outside upper left", ncols=min(5, len(methods)))
    return _settled(figure)


def _legend_entries(methods: list[str], colours: dict[str, str]) -> tuple[list, list[str]]:
    marks = [Line2D([], [], color=colours[m], marker="o", linestyle="none") for m in methods]
    return marks, [layout.method_title(m) for m in methods]


@_styled
def confusion(
    matrices: Mapping[str, np.ndarray] | np.ndarray,
    labels: Sequence[str],
    rows: str = "true defect",
    columns: str = "classified as",
) -> Figure:
    """Confusion matrices: rows are the true defects, columns what the classifier said; shade is the share of the row.

    Args:
        matrices: Counts (C, C), or several by method.
        labels: The C defects in order.
        rows: What the rows are.
        columns: What the columns are.

    Raises:
        ValueError: A matrix that does not fit the labels.
    """
    named = matrices if isinstance(matrices, Mapping) else {"": matrices}
    counts = {name: np.asarray(matrix, dtype=float) for name, matrix in named.items()}
    _check_square(counts, labels)
    shares = {name: own / np.maximum(own.sum(axis=1, keepdims=True), 1) for name, own in counts.items()}
    figure, axes = _matrices(shares, {name: own.astype(int) for name, own in counts.items()}, labels, "Blues", (0, 1))
    axes[0].set_ylabel(rows)
    figure.supxlabel(columns, fontsize=9)
    return _settled(figure)


@_styled
def similarity(matrices: Mapping[str, np.ndarray], labels: Sequence[str]) -> Figure:
    """How alike classes are: cosines of all pairs, by method; blue is alike, red opposed.

    Args:
        matrices: Cosines (C, C) by method.
        labels: The C defects in order.

    Raises:
        ValueError: A matrix that does not fit the labels.
    """
    _check_square(matrices, labels)
    texts = {name: np.char.mod("%+.2f", np.round(matrix, 2) + 0.0) for name, matrix in matrices.items()}
    figure, _ = _matrices(matrices, texts, labels, "RdBu", (-1, 1))
    figure.supxlabel("cosine", fontsize=9)
    return _settled(figure)


def _check_square(matrices: Mapping[str, np.ndarray], labels: Sequence[str]) -> None:
    n = len(labels)
    for name, matrix in matrices.items():
        if np.shape(matrix) != (n, n):
            raise ValueError(f"the matrix of {name} is {np.shape(matrix)} but there are {n} labels")


def _matrices(
    shades: Mapping[str, np.ndarray],
    texts: Mapping[str, np.ndarray],
    labels: Sequence[str],
    colours: str,
    ends: tuple[float, float],
) -> tuple[Figure, np.ndarray]:
    """Square matrices, six a row at most, shaded between the ends of a colour map, with a text in every field."""
    n, longest = len(labels), max(map(len, labels)) * 0.07
    side = max(1.7, 0.52 * n + 0.4)
    upright = n > 3 or longest > 0.8
    below = longest if upright else 0.2
    lines = -(-len(shades) // 6)
    across = -(-len(shades) // lines)
    titles = {name: textwrap.wrap(layout.method_title(name), int(side / 0.105)) for name in shades}
    height = lines * (side + 0.2 + 0.2 * max(map(len, titles.values())) + below) + 0.15
    figure = Picture(figsize=(side * across + longest + 0.3, height), layout="constrained")
    grid = figure.subplots(lines, across, squeeze=False, sharex=True, sharey=True).ravel()
    for empty in range(len(shades), len(grid)):
        grid[empty].remove()
    for axes, (name, shade) in zip(grid, shades.items()):
        axes.imshow(shade, cmap=colours, vmin=ends[0], vmax=ends[1])
        for y, x in np.ndindex(n, n):
            ink = "white" if abs(shade[y, x]) > 0.55 * ends[1] else "#222222"
            axes.text(x, y, texts[name][y, x], ha="center", va="center", color=ink)
        axes.set_xticks(range(n), labels, rotation=90 if upright else 0)
        axes.set_yticks(range(n), labels)
        axes.set_title("\n".join(titles[name]))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelbottom=True)
    return figure, grid


@_styled
def gates(frame: pd.DataFrame) -> Figure:
    """Gates over tau, a row a method and a column a kind: a line a layer, coloured by depth, dotted if of text.

    Args:
        frame: Columns method, kind, block, layer, tau, gate, start; blocks in the order of a pass.
    """
    methods, kinds, blocks = (_ordered(frame[name]) for name in ("method", "kind", "block"))
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(blocks)))
    figure = Picture(figsize=(7.2, 0.7 + 1.5 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(kinds), sharex=True, sharey=True, squeeze=False)
    for (method, kind), own in frame.groupby(["method", "kind"], sort=False):
        axes = panels[methods.index(method), kinds.index(kind)]
        for (block, layer), line in own.groupby(["block", "layer"], sort=False):
            drawn = {"color": shades[blocks.index(block)], "linestyle": ":" if layer.endswith("attn2") else "-"}
            axes.plot(line["tau"], line["gate"], linewidth=1.2, **drawn)
        axes.plot(line["tau"], line["start"], color="#222222", linewidth=1, linestyle="--")
    for axes in (axes for axes in panels.flat if not axes.lines):  # without compensation no background is injected
        axes.set_axis_off()
    for axes, kind in zip(panels[0], kinds):
        axes.set_title(kind)
    for row, method in zip(panels[:, 0], methods):
        row.set_ylabel("\n".join(textwrap.wrap(layout.method_title(method), 22)), fontsize=8)
    figure.supylabel("gate", fontsize=9)
    figure.supxlabel("share of noise τ: drawing goes from right to left", fontsize=9)
    marks = [Line2D([], [], color=shade) for shade in shades]
    marks += [Line2D([], [], color="#222222", linestyle=kind) for kind in ("-", ":", "--")]
    said = [*blocks, "self-attention", "attention to text", "at the start"]
    figure.legend(marks, said, loc="outside upper left", ncols=min(5, len(marks)))
    return _settled(figure)


@_styled
def curves(
    frame: pd.DataFrame, x: str, y: str, hue: str | None = None, log: bool = False, panel: str | None = None
) -> Figure:
    """Lines of ``y`` over ``x``, one a value of ``hue``.

    Args:
        frame: Long, one row a point.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        hue: Column whose values are the lines; None for one line.
        log: Logarithmic vertical axis.
        panel: Column whose values have a panel each, with axes and a legend of its own; None for one panel.
    """
    names = _ordered(frame[panel]) if panel else [None]
    figure = Picture(figsize=(6.4, 3.2 if len(names) == 1 else 1.9 * len(names)), layout="constrained")
    for axes, title in zip(figure.subplots(len(names), 1, squeeze=False).flat, names):
        own = frame if title is None else frame[frame[panel] == title]
        for name in _ordered(own[hue]) if hue else [None]:
            some = own if name is None else own[own[hue] == name]
            axes.plot(some[x], some[y], label=name, marker="o" if len(some) < 13 else None)
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear", title=title)
        if hue:
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, title=hue)
    return _settled(figure)


@_styled
def strip(
    frame: pd.DataFrame, x: str, y: str, line: float | None = None, xlabel: str | None = None, log: bool = False
) -> Figure:
    """Every value as a dot, a row a group, with the group's mean as a bar; dots are spread evenly, not at random.

    Args:
        frame: Long, one row a value.
        x: Column of the values.
        y: Column of the groups.
        line: Draw a vertical line here.
        xlabel: Label of the axis; default ``x``.
        log: Logarithmic axis.
    """
    groups = _ordered(frame[y])
    figure = Picture(figsize=(6.4, 0.7 + 0.42 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for i, group in enumerate(groups):
        values = np.sort(frame.loc[frame[y] == group, x].to_numpy(dtype=float))
        offset = (np.arange(len(values)) % 3 - 1) * 0.13 if len(values) > 1 else np.zeros(len(values))
        (dots,) = axes.plot(values, i + offset, "o", markersize=4.5, alpha=0.7, markeredgewidth=0)
        axes.plot([values.mean()] * 2, [i - 0.3, i + 0.3], color=dots.get_color(), linewidth=2)
    if line is not None:
        axes.axvline(line, color="#222222", linestyle="--", linewidth=1)
        axes.annotate(
            f"{line:g}",
            (line, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(xlabel=xlabel or x, xscale="log" if log else "linear", ylim=(len(groups) - 0.5, -0.5))
    if log:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(range(len(groups)), groups)
    axes.grid(axis="y", visible=False)
    return _settled(figure)


@_styled
def spread(frame: pd.DataFrame, x: str, y: str, hue: str) -> Figure:
    """How much a measure moves with the number of samples: every repeat as a dot, mean and sd as a line with bars.

    Args:
        frame: Long, one row a repeat.
        x: Column of the set size.
        y: Column of the measure.
        hue: Column of what was compared.
    """
    figure = Picture(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    sizes, names = sorted(frame[x].unique()), _ordered(frame[hue])
    for i, name in enumerate(names):
        some = frame[frame[hue] == name]
        place = some[x].map(sizes.index) + (i - (len(names) - 1) / 2) * 0.18
        (dots,) = axes.plot(place, some[y], ".", alpha=0.35, markersize=5)
        grouped = some.groupby(x)[y]
        at = [sizes.index(n) + (i - (len(names) - 1) / 2) * 0.18 for n in grouped.mean().index]
        axes.errorbar(at, grouped.mean(), yerr=grouped.std(), fmt="-o", color=dots.get_color(), capsize=3, label=name)
    axes.axhline(0, color="#999999", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(xlabel=x, ylabel=y)
    figure.legend(loc="outside upper left", ncols=len(names))
    return _settled(figure)


@_styled
def chosen(frame: pd.DataFrame, x: str, y: str, hue: str, picks: Mapping[str, tuple[float, float]]) -> Figure:
    """Lines of ``y`` over ``x``, one a value of ``hue``, and which points were picked, each named at its ring.

    Args:
        frame: Long, one row a point.
        x: Column of the horizontal axis.
        y: Column of the vertical axis.
        hue: Column whose values are the lines.
        picks: Name -> (x, y); names of one point share its ring.
    """
    figure = Picture(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for name in _ordered(frame[hue]):
        some = frame[frame[hue] == name]
        axes.plot(some[x], some[y], marker="o", label=name)
    for point in dict.fromkeys(picks.values()):
        names = "\n".join(name for name, picked in picks.items() if picked == point)
        axes.plot(*point, "o", markersize=12, markerfacecolor="none", color="#222222")
        axes.annotate(names, point, xytext=(0, 9), textcoords="offset points", ha="center", fontsize=8)
    axes.margins(x=0.12, y=0.3)
    axes.set(xlabel=x, ylabel=y, xticks=sorted(frame[x].unique()))
    figure.legend(loc="outside upper left", ncols=2)
    return _settled(figure)


@_styled
def learning(frame: pd.DataFrame) -> Figure:
    """Learning curves, a row a metric, a column an axis: mean and sd over seeds as a line, the single seeds as dots.

    No samples is a dashed line across: localisers learn from samples in place of the shots, so it is no first point.

    Args:
        frame: Long, one row a seed; columns metric, axis ("samples" or "shots"), n, method, seed, value. Rows of
            "samples" with n = 0 are of the shots alone.

    Raises:
        ValueError: No number to show.
    """
    frame = frame[frame["value"].notna()]
    if frame.empty:
        raise ValueError("there is no number to show: run the learning curve first")
    metrics, methods = _ordered(frame["metric"]), _ordered(frame["method"])
    columns, colours = [axis for axis in LEARNING_AXES if axis in set(frame["axis"])], _colours(methods)
    figure = Picture(figsize=(0.4 + 3 * len(columns), 0.5 + 2.3 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), len(columns), squeeze=False, sharey="row", sharex="col")
    for (row, metric), (column, axis) in itertools.product(enumerate(metrics), enumerate(columns)):
        axes, part = grid[row, column], frame[(frame["metric"] == metric) & (frame["axis"] == axis)]
        alone, part = part[part["n"] == 0], part[part["n"] > 0]
        if len(alone):
            axes.axhline(alone["value"].mean(), color=colours[REFERENCE], linestyle="--")
        sizes = sorted(frame.loc[(frame["axis"] == axis) & (frame["n"] > 0), "n"].unique())
        present = [method for method in methods if method in set(part["method"])]
        for i, method in enumerate(present):
            shift = (i - (len(present) - 1) / 2) * (0.08 if part["seed"].nunique() > 1 else 0)
            _line(axes, part[part["method"] == method], sizes, shift, colours[method])
        axes.set_xticks(range(len(sizes)), sizes)
        axes.set_xlabel(LEARNING_AXES[axis] if row == len(metrics) - 1 else "")
        axes.set_ylabel(layout.metric_title(metric).removesuffix(" ↑") if column == 0 else "")
    figure.legend(*_legend_entries(methods, colours), loc="outside upper left", ncols=min(3, len(methods)))
    return _settled(figure)


def _line(axes: Axes, some: pd.DataFrame, sizes: list, shift: float, colour: str) -> None:
    """One method's curve over evenly spaced ``sizes``, moved aside by ``shift`` where bars would hide each other."""
    axes.plot(some["n"].map(sizes.index) + shift, some["value"], ".", color=colour, alpha=0.4, markersize=5)
    grouped = some.groupby("n")["value"]
    at = [sizes.index(n) + shift for n in grouped.mean().index]
    axes.errorbar(at, grouped.mean(), yerr=grouped.std(), fmt="-o", color=colour, capsize=2.5, markersize=4)
