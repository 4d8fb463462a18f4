"""Text of others on a terminal: what would steer it is shown, not obeyed."""

from __future__ import annotations


def safe(text: str) -> str:
    """`text` with control and other invisible characters by their number, `<U+001B>`, but for line ends and tabs."""
    return "".join(one if one.isprintable() or one in "\n\t" else f"<U+{ord(one):04X}>" for one in text)
