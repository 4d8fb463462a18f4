"""The nearest right name, for messages about a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 20
"""A longer list of what is allowed helps nobody."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no known word is near; `lr` is near to learning_rate."""
    names = list(known)
    match = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)
    match = match or [name for name in names if "_" in name and word == "".join(part[:1] for part in name.split("_"))]
    return f"; did you mean {match[0]!r}?" if match else ""


def listed(introduction: str, known: Iterable[str]) -> str:
    """`; allowed are a, b`, or nothing where there are too many to be of help, or none."""
    names = list(known)
    return f"; {introduction} {', '.join(names)}" if 0 < len(names) <= SHOWN else ""
