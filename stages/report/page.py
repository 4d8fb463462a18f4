"""The report as one HTML page, as Markdown and as LaTeX tables. Each escapes names from recipes and files."""

import base64
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from stages.report.improvements import mean_improvement, pair_text, percent
from stages.report.sampling_errors import rounded
from stages.report.tables import Table
from stages.system.terminal_text import markdown_text, safe


@dataclass(frozen=True)
class Picture:
    name: str
    alt: str
    forms: dict[str, bytes]
    """`svg` and `png`."""


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


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=select_autoescape(["html.jinja"]),
    undefined=StrictUndefined,
)
_TEMPLATES.filters.update(
    rounded=rounded,
    points=lambda share: f"{100 * share:.1f}",
    pair=pair_text,
    percent=percent,
    mean_improvement=mean_improvement,
    markdown=markdown_text,
    latex=latex_text,
    base64=lambda data: base64.b64encode(data).decode(),
    source_hash=lambda text: f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}",
)


def render(template: str, **values: Any) -> str:
    """Write the report, or its summary, with one of the templates in this folder, such as report.html.jinja."""
    return _TEMPLATES.get_template(template).render(values)
