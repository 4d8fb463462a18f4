"""The report as one HTML page, as Markdown and as LaTeX tables. Each escapes names from recipes and files."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.report.tables import Cell, Table
from stages.system.terminal_text import safe


@dataclass(frozen=True)
class Picture:
    """A figure."""

    name: str
    """The name of its files."""
    alt: str
    forms: dict[str, bytes]
    """`svg` and `png`."""

    @property
    def embedded(self) -> str:
        """The SVG in base64: scripts do not run in an embedded image."""
        return base64.b64encode(self.forms["svg"]).decode("ascii")


@dataclass(frozen=True)
class Section:
    """One section of a report; the page shows pictures, tables and notes in this order."""

    title: str
    tables: list[tuple[str, Table]] = field(default_factory=list)
    """Pairs of caption (possibly empty) and table. The page leaves out tables without rows."""
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.pictures or any(table.rows for _, table in self.tables))


@dataclass(frozen=True)
class Page:
    """The content of a report."""

    title: str
    summary: str
    sections: list[Section]


def html(page: Page) -> str:
    """Write one self-contained page; its only script sorts tables."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(vars(page))


def markdown(page: Page) -> str:
    """Write the page as Markdown."""
    parts = [f"# {escape(page.title)}", escape(page.summary)]
    for section in page.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [f"![{escape(picture.alt)}](figures/{picture.name}.svg)" for picture in section.pictures]
        for caption, table in section.tables:
            if table.rows:
                parts += [f"### {escape(caption)}"] if caption else []
                parts.append(_markdown_table(table))
        parts += [escape(note) for note in section.notes]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [[escape(head) for head in table.columns], ["---", *["---:"] * (len(table.columns) - 1)]]
    lines += [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(cell: Cell) -> str:
    text = escape(cell.text)
    return (f"**{text}**" if cell.best else text) + (" ≈" if cell.tie else "")


def escape(text: str) -> str:
    """Return Markdown that shows `text` literally, inside a table cell, too."""
    text = safe(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~$!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word is no emphasis


LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "\u2013": "--",
    "-": "{-}",
    **{character: "\\" + character for character in "&%$#_{}"},
}
"""Escapes of LaTeX's markup and of characters outside its usual fonts; it would join two hyphens to a dash."""


def latex(page: Page) -> str:
    """Write the page's tables for \\input; they need the package booktabs and T1 fonts."""
    tables = [
        _latex_table(" -- ".join(latex_text(text) for text in (section.title, caption) if text), table)
        for section in page.sections
        for caption, table in section.tables
        if table.rows
    ]
    return "\n\n".join([r"% \usepackage[T1]{fontenc} \usepackage{booktabs}", *tables]) + "\n"


def _latex_table(caption: str, table: Table) -> str:
    head, *rows = [[latex_text(text) for text in table.columns], *(map(_latex_cell, row) for row in table.rows)]
    body = "\n".join(rf"    {' & '.join(row)} \\" for row in rows)
    return rf"""\begin{{table}}
  \centering
  \caption{{{caption}}}
  \begin{{tabular}}{{l{"r" * (len(table.columns) - 1)}}}
    \toprule
    {" & ".join(head)} \\
    \midrule
{body}
    \bottomrule
  \end{{tabular}}
\end{{table}}"""


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    return (rf"\textbf{{{text}}}" if cell.best else text) + (r" $\approx$" if cell.tie else "")


def latex_text(text: str) -> str:
    """Return LaTeX that shows `text` literally."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(safe(text).split()))
