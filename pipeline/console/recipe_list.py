"""`run-recipe` without arguments: the recipes in the current folder, one line each."""

import re
from pathlib import Path

from pipeline.recipe.yaml_reader import NotYAMLError, parse


def list_recipes(folder: Path) -> dict[Path, str]:
    """Describe the readable files in `folder` and its folder `recipes` that have `stages` or `extends`."""
    patterns = ("*.y*ml", "recipes/*.y*ml", "recipes/*/*.y*ml")
    files = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder): about for path in files if (about := _describe(path)) is not None}


def _describe(path: Path) -> str | None:
    """Return the first sentence of the opening comment, else name and stages; None if the file is not a recipe."""
    try:
        text = path.read_text(encoding="utf-8")
        tree, _ = parse(text, str(path), path.parent)
    except (OSError, UnicodeDecodeError, NotYAMLError):
        return None
    top = tree.to_plain()
    if not isinstance(top, dict) or not {"stages", "extends"} & set(top):
        return None
    if sentence := _first_sentence(text):
        return sentence
    stages = ", ".join(map(str, top["stages"])) if isinstance(top.get("stages"), dict) else ""
    parts = [f"{key} {top[key]}" for key in ("name", "extends") if isinstance(top.get(key), str)]
    return "; ".join([*parts, *([f"stages {stages}"] if stages else [])])


def _first_sentence(text: str) -> str:
    """Return the first sentence of the opening comment, without the command that runs the recipe."""
    words: list[str] = []
    for line in text.splitlines():
        comment = line.removeprefix("#").strip()
        if not line.startswith("#") or (words and not comment):
            break
        if not comment.startswith(("run-recipe ", "yaml-language-server:")):
            words += comment.split()
    return re.split(r"(?<=[.!?]) (?=[A-Z0-9(])", " ".join(words), maxsplit=1)[0].removesuffix(".")
