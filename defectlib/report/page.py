"""``report.html``: one self-contained page of what was run, its tables, pictures and run stamps.

The first picture opens the page. Inline style, pictures as data URIs, no script, nothing fetched. The page holds no
date of its own: the same inputs give the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd
from PIL import Image

from defectlib import paths, profiles, published
from defectlib.report import layout
from defectlib.report.layout import Block
from defectlib.report.page_parts import READING, STYLE
from defectlib.runs import STAGES

TITLE = "Few-shot industrial defect image generation, reproduced"
# Longer blocks show their averages first and fold the rest.
LONG = 24
WIDE_PX = 900


def write_page(
    folder: Path | str,
    tables: Mapping[str, pd.DataFrame],
    results: pd.DataFrame,
    figures: Mapping[str, str],
    runs_root: Path | str | None = None,
    claims: pd.DataFrame | None = None,
    others: Sequence[pd.DataFrame] = (),
) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        folder: Where the page goes, and where the pictures lie.
        tables: Name -> built table, in order.
        results: Rows of ``runs.collect()`` that the page is about; may be empty.
        figures: Stem -> caption of the PNG files in ``folder`` to show, in order; others that lie there are not shown.
        runs_root: The runs folder; given, the run stamps also show the package versions from the stage files.
        claims: What ``claims.judge`` said of the results.
        others: Tables without published numbers, as ``ablation.build`` and ``costs.build`` give them.

    Raises:
        FileNotFoundError: A picture or a stage file that is named does not exist.
    """
    folder = Path(folder)
    pictures = _pictures(folder, figures)
    parts = [
        "<header>",
        f"<h1>{escape(TITLE)}</h1>",
        f'<p class="lead">{escape(summary(results))}</p>',
        _state(results),
        *[f'<p class="note">{escape(note)}</p>' for note in _notes(results)],
        "</header><main>",
        *[_picture(path, text) for path, text in pictures[:1]],
        _contents(tables, pictures, claims, others),
        f'<p class="note">{READING}</p>',
        '<h2 id="tables">Tables</h2>',
        *[_table(table) for table in tables.values()],
        *([_claims(claims)] if claims is not None else []),
        *map(_other, others),
    ]
    if pictures[1:]:
        parts += ['<h2 id="pictures">Pictures</h2>', *[_picture(path, text) for path, text in pictures[1:]]]
    parts += ['<h2 id="runs">Runs</h2>', _stamps(results, runs_root), "</main>"]
    parts.append(
        "<footer>Made by <code>python -m defectlib report</code> from the stage files of the runs above.</footer>"
    )
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(TITLE)}</title>\n<style>\n{STYLE}</style></head><body>\n"
    )
    target = folder / "report.html"
    paths.write_text(target, head + "\n".join(parts) + "\n</body></html>\n")
    return target


def summary(results: pd.DataFrame) -> str:
    """One short paragraph: what was run, on what, and how many numbers came of it."""
    if results.empty:
        return "Nothing has been run yet: every number below is a published one."
    runs = results[["profile", "split", "dataset", "category", "method", "seed"]].drop_duplicates()
    defects = results.loc[results["defect"] != "", ["dataset", "category", "defect"]].drop_duplicates()
    datasets = ", ".join(layout.dataset_title(name) for name in sorted(runs["dataset"].unique()))
    methods = [layout.method_title(name) for name in _known_order(runs["method"].unique())]
    numbers = int(results["value"].notna().sum())
    withheld = int(results["value"].isna().sum())
    text = (
        f"{_count(len(runs), 'run')} of profile {_listed(runs['profile'])} on {datasets}: "
        f"{_count(len(runs[['dataset', 'category']].drop_duplicates()), 'category', 'categories')}, "
        f"{_count(len(defects), 'defect')}, {_count(runs['seed'].nunique(), 'seed')}; {', '.join(methods)}. "
        f"They gave {_count(numbers, 'number')}"
    )
    if withheld:
        text += f"; {_count(withheld, 'more was', 'more were')} withheld, each with its reason"
    return text + "."


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _listed(values: pd.Series) -> str:
    return ", ".join(map(str, sorted(values.unique())))


def _known_order(names) -> list[str]:
    order = list(published.METHODS.values())
    return sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name))


def _state(results: pd.DataFrame) -> str:
    """The state line: profile, data set, split, runs, code."""
    if results.empty:
        return '<ul class="state"><li>no runs</li></ul>'
    items = [(name, _listed(results[key])) for name, key in (("profile", "profile"), ("data set", "dataset"))]
    items += [("split", _listed(results["split"])), ("categories", _listed(results["category"]))]
    items += [("seeds", _listed(results["seed"])), ("device", _listed(results["device"]))]
    items += [("code", ", ".join(sorted({sha[:12] for sha in results["git_sha"]})))]
    cells = [f"<li>{escape(name)} <b>{escape(value)}</b></li>" for name, value in items]
    if results["dirty"].astype(bool).any():
        cells.append('<li class="dirty">code had uncommitted changes</li>')
    return f'<ul class="state">{"".join(cells)}</ul>'


def _notes(results: pd.DataFrame) -> list[str]:
    """What readers of these profiles' results must know."""
    named = [] if results.empty else [name for name in results["profile"].unique() if name in profiles.names()]
    return [note for name in named if (note := profiles.load(name).note)]


def _contents(
    tables: Mapping[str, pd.DataFrame], pictures: list, claims: pd.DataFrame | None, others: Sequence[pd.DataFrame]
) -> str:
    rows = []
    for table in tables.values():
        made = int(table["reproduced"].notna().sum())
        count = _count(made, "cell run here", "cells run here") if made else "published only"
        rows.append((table.attrs["name"], table.attrs["title"].rstrip("."), count))
    if claims is not None:
        tested = _count(int((claims["cells"] > 0).sum()), "comparison", "comparisons")
        rows.append((claims.attrs["name"], claims.attrs["title"].rstrip("."), f"{tested} tested here"))
    rows += [(table.attrs["name"], table.attrs["title"].rstrip("."), "") for table in others]
    if pictures[1:]:
        rows.append(("pictures", "Pictures", str(len(pictures) - 1)))
    rows.append(("runs", "Runs: device, code, time", ""))
    items = [
        f'<li><a href="#{escape(anchor)}">{escape(text)}</a><span class="count">{escape(count)}</span></li>'
        for anchor, text, count in rows
    ]
    return f'<nav aria-label="Contents"><strong>Contents</strong><ol>{"".join(items)}</ol></nav>'


def _table(table: pd.DataFrame) -> str:
    name = table.attrs["name"]
    made = table["reproduced"].notna().any()
    tag = '<span class="tag ran">run here</span>' if made else '<span class="tag published">published only</span>'
    parts = [
        f'<section><h3 id="{escape(name)}">{escape(table.attrs["title"].rstrip("."))}{tag}</h3>',
        f'<p class="note">{escape(table.attrs["caption"].removeprefix(table.attrs["title"]).strip())} '
        f"{escape(table.attrs['note'])}</p>",
    ]
    pieces = layout.blocks(table)
    for block in [b for b in pieces if b.reproduced]:
        parts.append(_run_block(block))
        items = [f"<li>{_code(code)} {escape(words)}</li>" for code, words in layout.legend(table).items()]
        parts.append(f'<ul class="legend">{"".join(items)}</ul>')
    rest = "".join(f"<h4>{escape(b.title)}</h4>{_html(b)}" for b in pieces if not b.reproduced)
    parts.append(
        f"<details{'' if made else _open(table)}><summary>The published table</summary>{rest}</details></section>"
    )
    return "\n".join(parts)


def _claims(table: pd.DataFrame) -> str:
    """The claims that were run here; the others are folded."""
    run, rest = (table["cells"] > 0).any(), (table["cells"] == 0).any()
    tag = '<span class="tag ran">run here</span>' if run else '<span class="tag published">published only</span>'
    said = f"{table.attrs['caption']} {table.attrs['note']}"
    parts = [
        f'<section><h3 id="{escape(table.attrs["name"])}">{escape(table.attrs["title"].rstrip("."))}{tag}</h3>',
        f'<p class="note">{escape(said)}</p>',
    ]
    pieces = layout.blocks(table)
    parts += [f"<h4>{escape(b.title)}</h4>{_html(b)}" for b in pieces[: int(run)]]
    if rest:
        parts.append(f"<details><summary>Claims not tested here</summary>{_html(pieces[-1])}</details>")
    return "\n".join([*parts, "</section>"])


def _other(table: pd.DataFrame) -> str:
    blocks = "".join(f"<h4>{escape(block.title)}</h4>{_html(block)}" for block in layout.blocks(table))
    title, name = escape(table.attrs["title"].rstrip(".")), escape(table.attrs["name"])
    return f'<section><h3 id="{name}">{title}</h3><p class="note">{escape(table.attrs["note"])}</p>{blocks}</section>'


def _open(table: pd.DataFrame) -> str:
    """A short table that is published only stands open: it is all there is to see."""
    return " open" if len(table) <= 30 else ""


def _run_block(block: Block) -> str:
    average = block.cells["Category"] == published.AVERAGE
    if len(block.cells) <= LONG or not average.any():
        return f"<h4>{escape(block.title)}</h4>{_html(block)}"
    short = Block(f"{block.title}, average over categories", block.cells[average], block.labels, True)
    whole = f"<details><summary>All {len(block.cells)} rows, by category</summary>{_html(block)}</details>"
    return f"<h4>{escape(short.title)}</h4>{_html(short)}{whole}"


def _code(code: str) -> str:
    return f'<span class="code {escape(code)}">{escape(code.replace("_", " "))}</span>'


def _html(block: Block) -> str:
    """A block as a table; a label that repeats the row above is faint, and a new first label starts a group."""
    names = list(block.cells.columns)
    head = "".join(f'<th scope="col"{_numeric(block, i)}>{escape(name)}</th>' for i, name in enumerate(names))
    rows, above = [], None
    for row in block.cells.itertuples(index=False, name=None):
        cells = []
        same = above is not None
        for i, text in enumerate(row):
            same = same and i < block.labels and text == above[i]
            if names[i] == layout.WHY + "comparable":
                cells.append(f'<td class="why">{"".join(_code(c) for c in text.split(", ") if c)}</td>')
            elif same:
                cells.append(f'<td class="again">{"" if names[i] == layout.CLAIM else escape(text)}</td>')
            elif names[i] in layout.TEXTS:
                cells.append(f'<td class="{layout.TEXTS[names[i]]}">{escape(text)}</td>')
            else:
                ours = ' class="n ours"' if names[i].startswith("Reproduced") else _numeric(block, i)
                cells.append(f"<td{ours}>{escape(text)}</td>")
        new_group = block.labels > 1 and above is not None and row[0] != above[0]
        rows.append(f"<tr{' class=first' if new_group else ''}>{''.join(cells)}</tr>")
        above = row
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _numeric(block: Block, i: int) -> str:
    return ' class="n"' if i >= block.labels and not block.cells.columns[i].startswith(layout.WHY) else ""


def _pictures(folder: Path, figures: Mapping[str, str]) -> list[tuple[Path, str]]:
    """PNG files and captions in page order."""
    missing = [stem for stem in figures if not (folder / f"{stem}.png").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]}.png does not exist: save the figure before the page")
    return [(folder / f"{stem}.png", text) for stem, text in figures.items()]


def _picture(path: Path, caption: str) -> str:
    with Image.open(path) as image:
        width, height = (round(side / 2) for side in image.size)
    content = base64.b64encode(path.read_bytes()).decode()
    wide = ' class="wide"' if width >= WIDE_PX else ""
    text = escape(caption)
    return (
        f'<figure id="{escape(path.stem)}"><div class="frame"><img{wide} width="{width}" height="{height}" '
        f'alt="{text}" src="data:image/png;base64,{content}"></div>'
        f"<figcaption>{text} <code>{escape(path.stem)}</code></figcaption></figure>"
    )


def _stamps(results: pd.DataFrame, runs_root: Path | str | None) -> str:
    """One row a run: device, code, wall time of each stage, and versions where the stage files are at hand."""
    if results.empty:
        return '<p class="note">No runs.</p>'
    files = results.drop_duplicates("path")
    stages = [name for name in STAGES if name in set(files["stage"])]
    rows, versions = [], {}
    for (dataset, category, method, seed), some in files.groupby(["dataset", "category", "method", "seed"], sort=True):
        wall = some.groupby("stage")["wall_s"].sum()
        dirty = some["dirty"].astype(bool).any()
        shas = ", ".join(sorted({sha[:12] for sha in some["git_sha"]}))
        rows.append({
            "Data set": layout.dataset_title(dataset), "Category": category, "Method": layout.method_title(method),
            "Seed": str(seed), **{f"{name}, s": f"{wall[name]:.1f}" if name in wall else "" for name in stages},
            "Split": _listed(some["split"]), "Device": _listed(some["device"]),
            "Code": shas + (" + changes" if dirty else ""),
        })  # fmt: skip
        for path in some["path"] if runs_root is not None else []:
            record = json.loads((Path(runs_root) / path).read_text())
            used = {"python": record["python"], **record["versions"]}
            versions.setdefault(json.dumps(used, sort_keys=True), []).append(path)
    cells = pd.DataFrame(rows)
    parts = [_html(Block("Runs", cells, 4, False))]
    for text, found in versions.items():
        listed = ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
        parts.append(f'<p class="note"><b>{_count(len(found), "stage")}</b> ran with {escape(listed)}.</p>')
    return "\n".join(parts)
