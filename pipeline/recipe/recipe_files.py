"""Recipe files: a recipe, the recipes it extends and the `--set` overrides, merged into one tree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.recipe.nodes import Location, Node, Problem, RecipeError, TooLargeError, split_key
from pipeline.recipe.yaml_reader import NotYAMLError, parse
from stages.system.did_you_mean import did_you_mean


def read_file(path: Path, seen: tuple[Path, ...] = ()) -> tuple[Node, list[Problem]]:
    """Read the values at `path`, merged over those that it extends, and their problems. Raises RecipeError.

    `seen` are the files that extend it.
    """
    try:
        if path.resolve() in seen:
            raise RecipeError([f"{path}: extends itself by way of {', '.join(map(str, seen))}"])
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError([f"{path}: cannot be read: it is not UTF-8 text"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = _similar_file(path) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError([f"{path}: cannot be read: {reason}{hint}"]) from None
    try:
        tree, problems = parse(text, str(path), path.parent)
    except NotYAMLError as error:
        raise RecipeError([str(error)]) from None
    if not isinstance(tree.content, dict):
        raise RecipeError([f"{path}:1:1: a recipe is a mapping with the keys name, model and stages"], problems)
    parent = tree.content.pop("extends", None)
    if parent is None:
        return tree, problems
    if isinstance(parent.content, str):
        extended = path.parent / parent.content
        try:
            exists, reason = extended.is_file(), "there is no such file"
        except OSError as error:  # a name that no file can have
            exists, reason = False, f"cannot be read: {error.strerror}"
        if exists:
            base, base_problems = read_file(extended, (*seen, path.resolve()))
            return tree.merged_over(base), base_problems + problems
        nearby = (file for pattern in ("*.yaml", "*/*.yaml") for file in path.parent.glob(pattern))
        files = [str(file.relative_to(path.parent)) for file in nearby]
        text = f"{extended}: {reason}{did_you_mean(parent.content, files)}"
    else:
        text = "must be the path of one recipe file, relative to this one"
    return tree, [*problems, Problem(parent.error_location, ("extends",), text)]


def apply_override(tree: Node, override: str, problems: list[Problem]) -> Node:
    """Merge one `--set KEY=VALUE` over the recipe, and add its errors to `problems`."""
    name, equals, text = override.partition("=")
    key, location = split_key(name.strip()), Location(f"--set {override}", None, None, Path.cwd())
    if not equals or not key:
        text = "write --set KEY=VALUE, for example --set stages.wit.weights.prompt=0.4"
        problems.append(Problem(location, (), text))
        return tree
    try:
        value, value_problems = parse(text, location.file, location.folder, lines=False)
        problems += [replace(problem, key=key + problem.key) for problem in value_problems]
        return tree.with_value(key, value)
    except NotYAMLError as error:
        problems.append(Problem(location, (), str(error).removeprefix(f"{location}: ")))
    except (ValueError, TooLargeError) as error:
        problems.append(Problem(location, key, str(error)))
    return tree


def _similar_file(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    return did_you_mean(str(path), sorted(map(str, folder.glob("*.yaml"))))
