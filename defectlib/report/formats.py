"""A built table as a file for readers: GitHub Markdown, and LaTeX with booktabs."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from defectlib.report.layout import CLAIM, WHY, Block, blocks, labelled_once, legend

# In letters of this size: a line that is wider than a page, a column whose text is broken, and the space of a column.
WIDE, BROKEN, SPACE = 90, 37, 1.6
LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "³": r"$^3$",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$", "<": "$<$", ">": "$>$",
}  # fmt: skip


def markdown(table: pd.DataFrame) -> str:
    """The whole table as GitHub Markdown."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"

    parts = [f"**{_markdown_text(table.attrs['caption'])}**", _markdown_text(table.attrs["note"])]
    for block in blocks(table):
        names = list(block.cells.columns)
        numeric = [i >= block.labels and not name.startswith(WHY) for i, name in enumerate(names)]
        rule = "| " + " | ".join("---:" if right else "---" for right in numeric) + " |"
        rows = [line(list(row)) for row in labelled_once(block).itertuples(index=False, name=None)]
        parts += [f"**{_markdown_text(block.title)}**", "\n".join([line(names), rule, *rows])]
        if block.reproduced and legend(table):
            parts.append("\n".join(f"* `{code}`: {words}" for code, words in legend(table).items()))
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_text(text: str) -> str:
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(mark, safe)
    return text


def latex(table: pd.DataFrame) -> str:
    """The whole table as booktabs floats, one a block; what is wider than a page is scaled to it, by graphicx."""
    floats = [f"% {table.attrs['name']}: needs \\usepackage{{booktabs,graphicx}}; UTF-8"]
    pieces = [piece for block in blocks(table) for piece in _pages(block)]
    for i, block in enumerate(pieces):
        cells = labelled_once(block).map(latex_text)
        cells.columns = [latex_text(name) for name in block.cells.columns]
        broken = [name == CLAIM or name.startswith(WHY) for name in block.cells.columns]
        columns = "".join(r"p{48mm}" if long else "l" if j < block.labels else "r" for j, long in enumerate(broken))
        letters = [max(map(len, [name, *block.cells[name]])) for name in block.cells.columns]
        body = cells.style.hide(axis="index").to_latex(hrules=True, column_format=columns)
        if sum(SPACE + (BROKEN if long else n) for long, n in zip(broken, letters)) > WIDE:
            body = rf"\resizebox{{\textwidth}}{{!}}{{%{chr(10)}{body.strip()}}}"
        words = "; ".join(f"{code}: {text}" for code, text in legend(table).items()) if block.reproduced else ""
        head = table.attrs["caption"] if block.reproduced or i == 0 else table.attrs["title"]
        caption = [head, block.title + ".", table.attrs["note"] if i == 0 else ""]
        floats.append("\n".join([
            r"\begin{table}[p]", r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
            rf"\caption{{{latex_text(' '.join(part for part in caption if part))}}}",
            rf"\label{{tab:{table.attrs['name'].replace('_', '-')}-{i + 1}}}", body.strip(),
            *([rf"\par\smallskip {latex_text(words)}"] if words else []), r"\end{table}",
        ]))  # fmt: skip
    return "\n\n".join(floats) + "\n"


def _pages(block: Block, rows: int = 36) -> list[Block]:
    """A long block in pieces that fit a page each."""
    parts = [block.cells.iloc[start : start + rows] for start in range(0, len(block.cells), rows)]
    if len(parts) < 2:
        return [block]
    titles = [f"{block.title}, part {i + 1} of {len(parts)}" for i in range(len(parts))]
    return [replace(block, title=title, cells=cells) for title, cells in zip(titles, parts)]


def latex_text(text: str) -> str:
    """Plain text with LaTeX's special characters escaped and the signs used here as mathematics."""
    return "".join(LATEX.get(letter, letter) for letter in text)
