"""The report as one HTML page, as Markdown and as LaTeX tables. Each escapes names from recipes and files."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from stages.report.tables import Cell, Table
from stages.system.terminal_text import safe


@dataclass(frozen=True)
class Picture:
    name: str
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
    title: str
    summary: str
    sections: list[Section]


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


def latex_text(text: str) -> str:
    """Return LaTeX that shows `text` literally."""
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(safe(text).split()))


def _markdown_cell(cell: Cell) -> str:
    text = escape(cell.text)
    return (f"**{text}**" if cell.best else text) + (" ≈" if cell.tie else "")


def _latex_cell(cell: Cell) -> str:
    text = latex_text(cell.text)
    return (rf"\textbf{{{text}}}" if cell.best else text) + (r" $\approx$" if cell.tie else "")


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.jinja"]),
    undefined=StrictUndefined,
)
_TEMPLATES.filters |= {
    "markdown": escape,
    "markdown_cell": _markdown_cell,
    "latex": latex_text,
    "latex_cell": _latex_cell,
}


def render(page: Page, template: str) -> str:
    """Write the page with one of the templates in this folder: report.html.jinja, report.md.jinja, tables.tex.jinja."""
    return _TEMPLATES.get_template(template).render(vars(page))
