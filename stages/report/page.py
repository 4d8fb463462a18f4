"""The tables as one HTML page and as Markdown. Both escape whatever came from a recipe or a task."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.report.tables import Cell, Table
from stages.terminal import safe


@dataclass(frozen=True)
class Page:
    """All that a report says."""

    title: str
    summary: str
    notes: list[str]
    main: Table
    further: Table
    making: Table
    settings: Table
    grids: list[tuple[str, Table]]
    """Title and cells of every grid of weights."""
    figure: bytes | None
    """The scores as bars, an SVG."""
    heatmap: bytes | None
    """The grids, an SVG."""


def html(page: Page) -> str:
    """One self-contained page; the figure is an embedded picture, in which no script can run."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    figures = {"figure": page.figure, "heatmap": page.heatmap}
    embedded = {name: base64.b64encode(svg).decode("ascii") if svg else None for name, svg in figures.items()}
    return environment.get_template("page.html.jinja").render(vars(page) | embedded)


def markdown(page: Page) -> str:
    """The same for a terminal or a code host."""
    parts = [f"# {escape(page.title)}", escape(page.summary), "## Scores", _table(page.main)]
    parts += [escape(note) for note in page.notes]
    if page.figure:
        parts.append("![The scores above as bars, with standard errors](figures/scores.svg)")
    if page.heatmap:
        parts += ["## Grid of weights", "![The tables below as heatmaps, laid out alike](figures/heatmap.svg)"]
    parts += [f"### {escape(title)}\n\n{_table(table)}" for title, table in page.grids]
    named = [("Further metrics", page.further), ("How each model was made", page.making)]
    for head, table in [*named, ("Settings that move a score", page.settings)]:
        if table.rows:
            parts += [f"## {head}", _table(table)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = [[escape(head) for head in table.columns], ["---", *["---:"] * (len(table.columns) - 1)]]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    return (f"**{text}**" if cell.best else text) + (" ≈" if cell.tie else "")


def escape(text: str) -> str:
    """Markdown that shows `text` as it is: no markup, no HTML, no end of a table cell or of a line."""
    text = safe(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~$!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word is no emphasis
