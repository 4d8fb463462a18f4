"""Untrusted text on a terminal: control characters are shown instead of sent."""

from __future__ import annotations


def safe(text: str) -> str:
    """Replace invisible characters, except line ends and tabs, by their code point: `<U+001B>`."""
    return "".join(char if char.isprintable() or char in "\n\t" else f"<U+{ord(char):04X}>" for char in text)
