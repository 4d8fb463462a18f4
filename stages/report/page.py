"""A report as one HTML page, as Markdown and as LaTeX tables, which all escape what came from a recipe or a file."""

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
    """A figure; its name is its file's, and what it shows is also said in words."""

    name: str
    alt: str
    forms: dict[str, bytes]
    """`svg` and `png`."""

    @property
    def embedded(self) -> str:
        """The SVG for the page itself, in which no script can run."""
        return base64.b64encode(self.forms["svg"]).decode("ascii")


@dataclass(frozen=True)
class Section:
    """One part of a report: its pictures, tables and notes, in this order."""

    title: str
    tables: list[tuple[str, Table]] = field(default_factory=list)
    """Caption, which may be empty, and table."""
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.pictures or any(table.rows for _, table in self.tables))


@dataclass(frozen=True)
class Page:
    """All that a report says."""

    title: str
    summary: str
    sections: list[Section]


def html(page: Page) -> str:
    """One self-contained page that loads nothing; its only script sorts tables."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(vars(page))


def markdown(page: Page) -> str:
    """The same for a terminal or a code host."""
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
    """Markdown that shows `text` as it is: no markup, no HTML, no end of a table cell or of a line."""
    text = safe(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~$!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word is no emphasis


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "\u2013": "--",
    "-": "{-}",
    **{character: "\\" + character for character in "&%$#_{}"},
}
"""What LaTeX would take for markup, or its usual fonts lack; two hyphens would become a dash."""


def latex(page: Page) -> str:
    """The tables of the page for \\input, in the manner of the package booktabs, which they need (and T1 fonts)."""
    parts = [r"% \usepackage[T1]{fontenc} \usepackage{booktabs}"]
    for section in page.sections:
        for caption, table in section.tables:
            if table.rows:
                title = " -- ".join(latex_text(text) for text in (section.title, caption) if text)
                lines = [latex_text(head) for head in table.columns]
                body = [[_latex_cell(cell) for cell in row] for row in table.rows]
                parts.append(
                    "\n".join(
                        [
                            r"\begin{table}",
                            r"  \centering",
                            rf"  \caption{{{title}}}",
                            rf"  \begin{{tabular}}{{l{'r' * (len(lines) - 1)}}}",
                            r"    \toprule",
                            rf"    {' & '.join(lines)} \\",
                            r"    \midrule",
                            *(rf"    {' & '.join(row)} \\" for row in body),
                            r"    \bottomrule",
                            r"  \end{tabular}",
                            r"\end{table}",
                        ]
                    )
                )
    return "\n\n".join(parts) + "\n"


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    return (rf"\textbf{{{text}}}" if cell.best else text) + (r" $\approx$" if cell.tie else "")


def latex_text(text: str) -> str:
    """LaTeX that shows `text` as it is."""
    return "".join(LATEX.get(character, character) for character in " ".join(safe(text).split()))
