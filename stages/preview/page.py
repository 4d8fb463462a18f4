"""Show a preview as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from stages.preview.terminal import TerminalPreview
from stages.preview.token_display import WHITE_SPACE_SYMBOLS, Preview


def show(preview: Preview) -> tuple[dict[str, Any], str, TerminalPreview]:
    """Return a preview as JSON, as an HTML page and as a rich renderable: what a stage's `preview` returns."""
    return preview.as_json(), html_page(preview), TerminalPreview(preview)


def html_page(preview: Preview) -> str:
    """Render one self-contained page: no scripts, nothing to download."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"fade_symbols": _fade_symbols, "repr": repr}
    return environment.get_template("page.html.jinja").render(preview=preview)


def _fade_symbols(text: str) -> Markup:
    """Escape text, and wrap white space symbols in <i> so that they can be less prominent."""
    html = str(escape(text))
    for symbol in WHITE_SPACE_SYMBOLS.values():
        html = html.replace(symbol, f"<i>{symbol}</i>")
    return Markup(html.replace("↵</i>", "↵</i><br>"))
