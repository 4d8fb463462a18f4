"""Hints for messages about a wrong name: the closest valid name, or all valid names if there are few."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_LISTED = 20
"""Longer lists of valid names are left out of a message."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `; did you mean ...?`, or an empty text if no choice is similar. `lr` also matches learning_rate."""
    names = list(choices)
    match = difflib.get_close_matches(word[:100], names, n=1, cutoff=0.6)
    match = match or [name for name in names if "_" in name and word == "".join(part[:1] for part in name.split("_"))]
    return f"; did you mean {match[0]!r}?" if match else ""


def list_choices(introduction: str, choices: Iterable[str]) -> str:
    """Return `; allowed are a, b`, or an empty text if there are no choices or more than MAX_LISTED."""
    names = list(choices)
    return f"; {introduction} {', '.join(names)}" if 0 < len(names) <= MAX_LISTED else ""
