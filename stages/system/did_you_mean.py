"""Hints for messages about a wrong name: the closest valid names, or all of them if there are few."""

import difflib
import re
from collections.abc import Collection
from pathlib import Path


def similar(word: str, choices: Collection[str], most: int = 3) -> list[str]:
    """Return the choices that `word` probably stands for, the best first; none rather than an unrelated one.

    Case and separators do not count, and numbers have to be equal. Other words have to share four fifths of their
    letters, in order: less if the first letter is the same, which people seldom mistype.
    """
    plain_word = plain(word[:100])
    names = {plain(choice): choice for choice in reversed(list(choices))}
    if plain_word in names:
        return [names[plain_word]]
    close = [] if plain_word.replace("_", "").isdigit() else difflib.get_close_matches(plain_word, names, 20)
    return [names[name] for name in close if _is_close(plain_word, name)][:most]


def did_you_mean(word: str, choices: Collection[str]) -> str:
    """Return `; did you mean ...?`, or an empty text if no choice is similar."""
    matches = similar(word, choices, 1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def list_choices(introduction: str, choices: Collection[str]) -> str:
    """Return `; allowed are a, b`, or an empty text if there are no choices or more than 20."""
    return f"; {introduction} {', '.join(choices)}" if 0 < len(choices) <= 20 else ""


def similar_names(name: str, names: Collection[str]) -> str:
    """List the names most similar to `name`, else all if they are few, for a message about a missing file."""
    few = list(names) if len(names) <= 10 else ["nothing of a similar name"]
    return ", ".join(similar(name, names) or few) or "no file at all"


def explain_missing(path: Path) -> str:
    """Say that there is nothing at `path`, and what its closest existing folder has instead."""
    if any(sign in path.name for sign in "*?[") and path.parent.is_dir():
        return f"no such file or folder, and patterns are not expanded; name the folder {path.parent} to read all of it"
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(folder).parts[0]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return f"no such file or folder; {folder} has {similar_names(missing, names)}"


def plain(word: str) -> str:
    """Return `word` in lower case, with `_` for every separator."""
    return re.sub(r"[\W_]+", "_", word.lower()).strip("_")


def _is_close(word: str, name: str) -> bool:
    ratio = difflib.SequenceMatcher(None, name, word).ratio()
    least = 0.6 if len(word) < 5 or sorted(word) == sorted(name) else 0.75
    return ratio >= (least if word[:1] == name[:1] else 0.8)
