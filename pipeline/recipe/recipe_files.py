"""Recipe files: a recipe, the recipes it extends and the `--set` overrides, merged into one tree."""

import os
from dataclasses import replace
from pathlib import Path

from pipeline.recipe.nodes import MAX_DEPTH, Key, Location, Node, NodeError, Problem, RecipeError, split_key
from pipeline.recipe.yaml_reader import NotYAMLError, parse
from pipeline.store.references import ENVIRONMENT
from stages.system.did_you_mean import explain_missing, similar
from stages.system.integrity import require_regular

_NO_YAML = "a recipe is a YAML file; recipes/ has examples"

MAX_SHOWN = 200
"""Characters of an override that a message repeats."""


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Node, list[Problem]]:
    """Read the values at `path`, merged over those that it extends, and their problems. Raises RecipeError.

    `seen` are the files that extend it.
    """
    try:
        if path.resolve() in seen:
            raise RecipeError([f"{path}: extends itself by way of {', '.join(map(str, seen))}"])
        if problem := _explain_unreadable(path):
            raise RecipeError([f"{path}: {problem}"])
        require_regular(path)
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError([f"{path}: cannot be read: it is not UTF-8 text; {_NO_YAML}"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError([f"{path}: cannot be read: {reason}"]) from None
    try:
        tree, problems = parse(text, str(path), path.parent)
    except NotYAMLError as error:
        hint = "" if path.suffix in (".yaml", ".yml", ".json") else f"; {_NO_YAML}"
        raise RecipeError([f"{error}{hint}"]) from None
    if not isinstance(tree.content, dict):
        raise RecipeError([f"{path}:1:1: a recipe is a mapping with the keys name, model and stages"], problems)
    parent = tree.content.pop("extends", None)
    if parent is None:
        return tree, problems
    try:
        if not isinstance(parent.content, str):
            raise NodeError("must be the path of one recipe file, relative to this one")
        extended = path.parent / os.path.expanduser(parent.content)  # noqa: PTH111 (never fails)
        try:
            problem = _explain_unreadable(extended)
        except OSError as error:  # a name that no file can have
            problem = f"cannot be read: {error.strerror}"
        if problem:
            raise NodeError(f"{extended}: {problem}")
        base, base_problems = read_file(extended, (*seen, path.resolve()))
        return tree.merged_over(base), base_problems + problems
    except NodeError as error:
        return tree, [*problems, Problem(parent.error_location, ("extends",), str(error))]


def apply_override(tree: Node, override: str, problems: list[Problem]) -> Node:
    """Merge one `--set KEY=VALUE` over the recipe, and add its errors to `problems`."""
    name, equals, text = override.partition("=")
    shown = override if len(override) <= MAX_SHOWN else f"{override[:MAX_SHOWN]}..."
    parts, location = split_key(name.strip()), Location(f"--set {shown}", None, None, Path.cwd())
    key = Key()
    try:
        if len(parts) > MAX_DEPTH:
            raise NodeError(f"the key is nested deeper than {MAX_DEPTH} levels")
        if not equals or not parts:
            raise NodeError("write --set KEY=VALUE, for example --set stages.wit.weights.prompt=0.4")
        value, value_problems = parse(text, location.file, location.folder, lines=False)
        key = parts
        problems += [replace(problem, key=key + problem.key) for problem in value_problems]
        return tree.with_value(key, value)
    except (NodeError, NotYAMLError) as error:
        problems.append(Problem(location, key, str(error).removeprefix(f"{location}: ")))
        return tree


def _explain_unreadable(path: Path) -> str | None:
    """Return why there is no recipe at `path`, and what to name instead; None if it is a file. Raises OSError."""
    if path.is_dir():
        names = ", ".join(sorted(file.name for file in path.glob("*.y*ml"))[:10])
        return f"is a folder; name a recipe in it: {names or 'it has no YAML file'}"
    if str(path) == "-" or path.parts[:2] in (("/", "dev"), ("/", "proc")) or (path.exists() and not path.is_file()):
        return "a recipe is a file, because relative paths start from its folder; write it to one, and name that"
    if path.exists():
        return None
    other = similar(path.name, [file.name for file in Path("recipes").glob("*.yaml")], 1)
    if other and not similar(path.name, os.listdir(path.parent) if path.parent.is_dir() else []):  # noqa: PTH208
        return f"no such file; did you mean 'recipes/{other[0]}'?"
    return explain_missing(path) + (ENVIRONMENT if "$" in str(path) else "")
