"""Untrusted text on a terminal, in a table of a spreadsheet or in Markdown: shown, never carried out."""

import re


def safe(text: str) -> str:
    """Replace invisible characters, except line ends and tabs, by their code point: `<U+001B>`."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"<U+{ord(char):04X}>" for char in text)


def first_line(error: object) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def csv_cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula: `=1+1` gets an apostrophe before it."""
    text = safe(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def markdown_text(text: str) -> str:
    """Return Markdown that shows `text` literally, inside a table cell, too."""
    text = safe(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|#~$!])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # an underscore inside a word is no emphasis


def code_span(text: str) -> str:
    """Return Markdown that shows one line of `text` as code, in a cell of a table, too."""
    text = " ".join(safe(text).split()).replace("|", "\\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"
