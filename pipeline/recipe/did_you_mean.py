"""Hints for messages about a wrong name: the closest valid name, or all valid names if there are few."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def did_you_mean(word: str, choices: Collection[str]) -> str:
    """Return `; did you mean ...?`, or an empty text if no choice is similar. `lr` also matches learning_rate."""
    match = difflib.get_close_matches(word[:100], choices, n=1, cutoff=0.6)
    match = match or [name for name in choices if "_" in name and word == "".join(part[:1] for part in name.split("_"))]
    return f"; did you mean {match[0]!r}?" if match else ""


def list_choices(introduction: str, choices: Collection[str]) -> str:
    """Return `; allowed are a, b`, or an empty text if there are no choices or more than 20."""
    return f"; {introduction} {', '.join(choices)}" if 0 < len(choices) <= 20 else ""
