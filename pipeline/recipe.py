"""Text -> Recipe: YAML read, merged, interpolated and validated; every error says file, line, key and remedy.

What the keys of a stage mean is said by the stage's own config model; how a stage runs is no concern of this file.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.document import NotYAMLError, parse
from pipeline.explain import explain, locations
from pipeline.interpolation import resolve
from pipeline.near import near
from pipeline.places import BROKEN, Key, Node, Place, Places, Problem, TooLargeError, split_key, told
from pipeline.secret import masked, secrets
from stages import KINDS
from stages.base import BASE, Config, StageConfig

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
"""Names of recipes and stages become folder names: no slash, no leading dot, and short enough for any file system."""
_RULE = "use a letter, then letters, digits, _ . -, at most 100 in all"

TAKEN = ("store", "cache")
"""Folders beside those of the recipes."""
TAKEN_STAGES = ("base", "logs", "preview", "run.json")
"""The recipe's own model, and what lies beside the links to the stages' results."""


class RecipeError(Exception):
    """One or more things wrong with a recipe or the command line; `str` is the message, a line per error."""

    def __init__(self, errors: Sequence[str], problems: Sequence[Problem] = ()) -> None:
        super().__init__("\n".join([*told(problems), *errors]))
        self.problems = list(problems)
        """Those of `errors` that have a place in the recipe."""


class RecipeHead(Config):
    """The keys at the top of a recipe; the stages are read one by one by the models of their kinds."""

    name: str
    """Names the folder of the run's results: letters, digits, '_', '.', '-'."""
    stages: dict[str, Any]
    """Stage name -> section with `kind` and that kind's own keys."""
    seed: int = Field(default=23, ge=0, lt=2**32)
    """Of every stage that draws random numbers and names no seed of its own. 23 is the paper's."""
    model: str | None = None
    """The base model: a hub id, a path relative to the recipe, or pypi:PACKAGE==VERSION#MEMBER@sha256:HEX."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as written: validated section by section, its references not yet looked up."""

    name: str
    seed: int
    model: str | None
    stages: dict[str, StageConfig]
    places: Places
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with it as far as it was read. Planning finds more, and raises all together."""
    broken: frozenset[str] = frozenset()
    """Stages that are written but could not be read, and `base` where the model could not: what refers to them may
    be right."""

    def problem(self, key: Key, text: str) -> Problem:
        """A problem at the place where the value of `key` stands."""
        return Problem(self.places.at(key), key, text)

    def error(self, key: Key, text: str) -> RecipeError:
        """An error at the place where the value of `key` stands."""
        return RecipeError([], [self.problem(key, text)])


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, with `KEY=VALUE` overrides laid over it.

    Raises RecipeError where it cannot be read at all; problems of single keys are noted in the recipe.
    """
    tree, problems = _read(path, seen=())
    for override in overrides:
        tree = _override(tree, override, problems)
    tree, unresolved = resolve(tree)
    if tree.content is BROKEN:
        raise RecipeError([], problems + unresolved)
    values, places = tree.plain(), Places(tree)
    if held := list(_secrets_in(values, (), places)):
        raise RecipeError(held)
    return _validate(values, places, problems + unresolved)


def _secrets_in(value: Any, key: Key, places: Places) -> Iterator[str]:
    """An error for each text of the recipe with a secret of the environment in it, which results would record."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _secrets_in(inner, (*key, name), places)
    elif isinstance(value, str):
        for name, secret in secrets().items():
            if secret in value:
                where = f"{masked(str(places.at(key)))}: {'.'.join(map(str, key))}"
                yield f"{where}: holds the secret of the environment variable {name}; a recipe holds none, so remove it"


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[Node, list[Problem]]:
    """The values at `path` laid over those that it extends."""
    try:
        if path.resolve() in seen:
            raise RecipeError([f"{path}: extends itself by way of {', '.join(map(str, seen))}"])
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        near_file = _near_file(path) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError([f"{path}: cannot be read: {_reason(error)}{near_file}"]) from None
    try:
        tree, problems = parse(text, str(path), path.parent)
    except NotYAMLError as error:
        raise RecipeError([str(error)]) from None
    if not isinstance(tree.content, dict):
        raise RecipeError([f"{path}:1:1: a recipe is a mapping with the keys name, model and stages"], problems)
    parent = tree.content.pop("extends", None)
    if parent is None:
        return tree, problems
    if not isinstance(parent.content, str):
        text = "names one recipe file, relative to this one"
        return tree, [*problems, Problem(parent.told_at, ("extends",), text)]
    below, more = _read(path.parent / parent.content, (*seen, path.resolve()))
    return tree.laid_over(below), more + problems


def _override(tree: Node, override: str, problems: list[Problem]) -> Node:
    """Lay one `--set KEY=VALUE` over the recipe."""
    name, equals, text = override.partition("=")
    key, place = split_key(name.strip()), Place(f"--set {override}", None, None, Path.cwd())
    if not equals or not key:
        example = "write --set KEY=VALUE, for example --set stages.wit.weights.prompt=0.4"
        problems.append(Problem(place, (), example))
        return tree
    try:
        value, found = parse(text, place.file, place.folder, lines=False)
        problems += [replace(problem, key=key + problem.key) for problem in found]
        return tree.with_value(key, value)
    except NotYAMLError as error:
        problems.append(Problem(place, (), str(error).removeprefix(f"{place}: ")))
    except (ValueError, TooLargeError) as error:
        problems.append(Problem(place, key, str(error)))
    return tree


def _validate(values: dict[str, Any], places: Places, problems: list[Problem]) -> Recipe:
    name, seed, model = values.get("name"), values.get("seed", 23), values.get("model")
    try:
        head = RecipeHead.model_validate(values)
        seed = head.seed
        if not NAME.fullmatch(head.name) or head.name in TAKEN:
            text = f"{head.name!r} is no folder name; {_RULE}"
            problems.append(Problem(places.at(("name",)), ("name",), text))
    except ValidationError as error:
        problems += explain(error, RecipeHead, (), places)
        seed = 23  # a wrong one is told once, not by every stage
    sections = values.get("stages")
    stages: dict[str, StageConfig] = {}
    if isinstance(sections, dict):
        if not sections:
            text = f"names no stage; the kinds are {', '.join(KINDS)}"
            problems.append(Problem(places.at(("stages",)), ("stages",), text))
        for stage, section in sections.items():
            stages |= _stage(stage, section, seed, places, problems)
    broken = frozenset(sections if isinstance(sections, dict) else ()) - stages.keys()
    if model is not None and not isinstance(model, str):
        broken |= {BASE}
    return Recipe(str(name), seed, str(model) if model is not None else None, stages, places, problems, broken)


def _stage(name: str, section: Any, seed: int, places: Places, problems: list[Problem]) -> dict[str, StageConfig]:
    """The one stage of `section`, or none and a problem."""
    key: Key = ("stages", name)
    if section is BROKEN:
        return {}
    if not NAME.fullmatch(name) or name in TAKEN_STAGES:
        taken = ", ".join(TAKEN_STAGES)
        text = f"is no stage name; {_RULE}; {taken} mean something else"
        problems.append(Problem(places.of_key(key), key, text))
    if not isinstance(section, dict):
        text = "a stage is a mapping with the key 'kind' and that kind's own keys"
        problems.append(Problem(places.at(key), key, text))
        return {}
    kind = section.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        if "kind" not in section:
            problems.append(_no_kind(key, section, places))
        elif kind is not BROKEN:
            text = f"{kind!r} is unknown{near(str(kind), KINDS)}; the kinds are {', '.join(KINDS)}"
            problems.append(Problem(places.at((*key, "kind")), (*key, "kind"), text))
        return {}
    fields = {k: v for k, v in section.items() if k != "kind"}
    if "seed" in KINDS[kind].model_fields:
        fields.setdefault("seed", seed)
    try:
        return {name: KINDS[kind].model_validate(fields)}
    except ValidationError as error:
        problems += explain(error, KINDS[kind], key, places)
        return {name: rest} if (rest := _readable(KINDS[kind], fields, error)) else {}


def _no_kind(key: Key, section: dict[str, Any], places: Places) -> Problem:
    for misspelt in difflib.get_close_matches("kind", section, n=1):
        return Problem(places.of_key((*key, misspelt)), (*key, misspelt), "unknown key; did you mean 'kind'?")
    return Problem(places.of_key(key), key, f"needs 'kind', one of {', '.join(KINDS)}")


def _readable(kind: type[StageConfig], fields: dict[str, Any], error: ValidationError) -> StageConfig | None:
    """What can be read of a stage that has errors: enough to look up its references, never to be run."""
    fields = copy.deepcopy(fields)
    for loc in locations(error):
        section: Any = fields
        for inner in loc[:-1]:
            section = section[int(inner)] if isinstance(section, list) else section.get(inner, {})
        if loc and isinstance(section, dict):
            section.pop(loc[-1], None)
    valid = {}
    for name, value in fields.items():
        with contextlib.suppress(ValidationError):
            adapter: TypeAdapter[Any] = TypeAdapter(kind.model_fields[name].annotation)  # type: ignore[arg-type]
            valid[name] = adapter.validate_python(value)
    config = kind.model_construct(**valid)
    try:
        for part in config.split().values():
            part.needs()
    except AttributeError:  # a field that says what it needs is not there
        return None
    return config


def _near_file(path: Path) -> str:
    """The recipe files a mistyped path may have meant."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
    return near(str(path), names)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
