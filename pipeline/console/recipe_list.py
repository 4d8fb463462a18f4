"""`run-recipe` alone: the recipes near by, one line each. Reads no more of them than that takes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.recipe.yaml_reader import NotYAMLError, parse

PLACES = ("*.y*ml", "recipes/*.y*ml", "recipes/*/*.y*ml")
"""Where it is looked, from the current folder."""


@dataclass(frozen=True)
class Found:
    """A recipe near by."""

    path: Path
    about: str
    """What it does, in a line."""


def list_recipes(folder: Path) -> list[Found]:
    """The files at PLACES that have `stages` or `extends`; what cannot be read is none of them."""
    files = [path for pattern in PLACES for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [Found(path.relative_to(folder), about) for path in files if (about := _about(path)) is not None]


def _about(path: Path) -> str | None:
    """The first sentence of the recipe's opening comment, else its name and stages; None where it is no recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        tree, _ = parse(text, str(path), path.parent)
    except (OSError, UnicodeDecodeError, NotYAMLError):
        return None
    top = tree.plain()
    if not isinstance(top, dict) or not {"stages", "extends"} & set(top):
        return None
    if sentence := _sentence(text):
        return sentence
    stages = ", ".join(map(str, top["stages"])) if isinstance(top.get("stages"), dict) else ""
    parts = [f"{key} {top[key]}" for key in ("name", "extends") if isinstance(top.get(key), str)]
    return "; ".join([*parts, *([f"stages {stages}"] if stages else [])])


def _sentence(text: str) -> str:
    """The first sentence of the comment that `text` opens with, without the command that runs it."""
    words: list[str] = []
    for line in text.splitlines():
        said = line.removeprefix("#").strip()
        if not line.startswith("#") or (words and not said):
            break
        if not said.startswith(("run-recipe ", "yaml-language-server:")):
            words += said.split()
    return re.split(r"(?<=[.!?]) (?=[A-Z0-9(])", " ".join(words), maxsplit=1)[0].removesuffix(".")
