"""Text -> Recipe: YAML read, merged, interpolated and validated; every error says file, line, key and remedy.

What the keys of a stage mean is said by the stage's own config model; how a stage runs is no concern of this file.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, ValidationError

from pipeline.recipe.did_you_mean import did_you_mean
from pipeline.recipe.interpolation import Resolver
from pipeline.recipe.matrix import Cell, cells_of, chosen
from pipeline.recipe.nodes import BROKEN, Key, Location, Node, Problem, SourceMap, TooLargeError, split_key, told
from pipeline.recipe.search_config import Halving
from pipeline.recipe.validation_messages import explain, locations
from pipeline.recipe.yaml_reader import NotYAMLError, parse
from pipeline.store.secrets import masked, secrets
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
    matrix: dict[str, Any] | None = None
    """Axes and their values, for a grid of cells; stages refer to the cell's value as ${matrix.AXIS}. `exclude` leaves
    cells out, `include` adds some: lists of {AXIS: value}."""
    search: Halving | None = None
    """Train and benchmark only the best cells of the matrix, found by successive halving, in place of all."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as written, one cell of it where it has a matrix: validated section by section, its references not yet
    looked up."""

    name: str
    seed: int
    model: str | None
    stages: dict[str, StageConfig]
    places: SourceMap
    problems: list[Problem] = field(default_factory=list)
    """What is wrong with it as far as it was read. Planning finds more, and raises all together."""
    broken: frozenset[str] = frozenset()
    """Stages that are written but could not be read, and `base` where the model could not: what refers to them may
    be right."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Axis of the matrix -> the cell's value on it, as a person writes it."""
    search: Halving | None = None
    """How the cells that are run in full are chosen; None: all are."""
    axes: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """Stage, or `base` for the model -> the axes on which its own section depends."""

    def problem(self, key: Key, text: str) -> Problem:
        """A problem at the place where the value of `key` stands."""
        return Problem(self.places.at(key), key, text)

    def error(self, key: Key, text: str) -> RecipeError:
        """An error at the place where the value of `key` stands."""
        return RecipeError([], [self.problem(key, text)])


def load(path: Path, overrides: Sequence[str] = (), cells: Sequence[str] = ()) -> list[Recipe]:
    """Read the recipe at `path`, with `KEY=VALUE` overrides laid over it: one for each cell of its matrix, or of those
    that `cells` asks for; one where it has no matrix.

    Raises RecipeError where it cannot be read at all; problems of single keys are noted in the first one.
    """
    tree, problems = _read(path, seen=())
    for override in overrides:
        tree = _override(tree, override, problems)
    resolver = Resolver(tree)
    made, wrong = _cells(resolver, cells)
    reader = _Reader()
    recipes = [reader.recipe(resolver.cell(cell), cell) for cell in made]
    if reader.secrets:
        raise RecipeError(reader.secrets)
    recipes[0].problems.extend([*problems, *wrong, *resolver.problems, *reader.problems])
    return recipes


def _cells(resolver: Resolver, asked: Sequence[str]) -> tuple[list[Cell], list[Problem]]:
    """The cells of a recipe and what is wrong with its matrix; one cell without values where there is none."""
    matrix = resolver.matrix()
    made, problems = cells_of(matrix) if matrix else ([], [])
    if asked and not problems:
        if not made:
            raise RecipeError([f"--cells {asked[0]}: the recipe has no matrix"])
        try:
            made = chosen(made, asked)
        except ValueError as error:
            raise RecipeError([str(error)]) from None
    return made or [Cell()], problems


def _secrets_in(value: Any, key: Key, places: SourceMap) -> Iterator[str]:
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
        return tree, [*problems, Problem(parent.error_location, ("extends",), text)]
    extended = path.parent / parent.content
    try:
        there, why = extended.is_file(), "there is no such file"
    except OSError as error:  # a name that no file can have
        there, why = False, f"cannot be looked up: {error.strerror}"
    if not there:
        beside = [
            str(file.relative_to(path.parent)) for part in ("*", "*/*") for file in path.parent.glob(f"{part}.yaml")
        ]
        text = f"{extended}: {why}{did_you_mean(parent.content, beside)}"
        return tree, [*problems, Problem(parent.error_location, ("extends",), text)]
    below, more = _read(extended, (*seen, path.resolve()))
    return tree.laid_over(below), more + problems


def _override(tree: Node, override: str, problems: list[Problem]) -> Node:
    """Lay one `--set KEY=VALUE` over the recipe."""
    name, equals, text = override.partition("=")
    key, place = split_key(name.strip()), Location(f"--set {override}", None, None, Path.cwd())
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


class _Reader:
    """Reads the cells of one recipe. A section that several share is read once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.secrets: list[str] = []
        self._heads: dict[tuple[int, ...], tuple[Node, RecipeHead | None]] = {}
        self._stages: dict[tuple[str, int, int], tuple[Node, StageConfig | None]] = {}
        """Stage, its section's id, seed -> the section, kept alive, and what it says."""

    def recipe(self, tree: Node, cell: Cell) -> Recipe:
        """The recipe of one cell."""
        if tree.content is BROKEN:
            return Recipe("", 23, None, {}, SourceMap(tree), labels=cell.labels)
        places, sections, model = SourceMap(tree), tree.child("stages"), tree.child("model")
        head = self._head(tree, places)
        seed = head.seed if head else 23  # a wrong one is told once, not by every stage
        stages: dict[str, StageConfig] = {}
        axes = {BASE: model.axes if model else frozenset()}
        for name, section in sections.content.items() if sections and isinstance(sections.content, dict) else ():
            key = (name, id(section), seed)
            if key not in self._stages:
                self._stages[key] = section, self._stage(name, section.plain(), seed, places)
            if config := self._stages[key][1]:
                stages[name] = config
            axes[name] = section.axes | self._seed_axes(section, config, tree)
        broken = frozenset(axes) - stages.keys() - {BASE}
        if model and model.content is not None and not isinstance(model.content, str):
            broken |= {BASE}
        reference = str(model.content) if model and model.content is not None else None
        name = tree.child("name")
        return Recipe(
            name=str(name.content if name else None),
            seed=seed,
            model=reference,
            stages=stages,
            places=places,
            broken=broken,
            labels=cell.labels,
            search=head.search if head else None,
            axes=axes,
        )

    def _seed_axes(self, section: Node, config: StageConfig | None, tree: Node) -> frozenset[str]:
        """The axes of the recipe's seed, where a stage takes that."""
        seed = tree.child("seed")
        takes = config is not None and "seed" in type(config).model_fields and section.child("seed") is None
        return seed.axes if seed and takes else frozenset()

    def _head(self, tree: Node, places: SourceMap) -> RecipeHead | None:
        """What the keys at the top say. Of the stages only whether they are a section, and not an empty one."""
        key = tuple(id(node) for name, node in tree.content.items() if name != "stages")
        if key in self._heads:
            return self._heads[key][1]
        values = {name: node.plain() for name, node in tree.content.items() if name != "stages"}
        self.secrets += _secrets_in(values, (), places)
        if "stages" in tree.content:
            stages = tree.content["stages"].content
            values["stages"] = {} if isinstance(stages, dict) else tree.content["stages"].plain()
            if stages == {}:
                text = f"names no stage; the kinds are {', '.join(KINDS)}"
                self.problems.append(Problem(places.at(("stages",)), ("stages",), text))
        head = None
        try:
            head = RecipeHead.model_validate(values)
            if not NAME.fullmatch(head.name) or head.name in TAKEN:
                text = f"{head.name!r} is no folder name; {_RULE}"
                self.problems.append(Problem(places.at(("name",)), ("name",), text))
            elif len({kept.name for _, kept in self._heads.values() if kept} | {head.name}) > 1:
                text = "is not the same for all cells of the matrix; one run has one name"
                self.problems.append(Problem(places.at(("name",)), ("name",), text))
        except ValidationError as error:
            self.problems += explain(error, RecipeHead, (), places)
        self._heads[key] = tree, head
        return head

    def _stage(self, name: str, section: Any, seed: int, places: SourceMap) -> StageConfig | None:
        """The stage of `section`, or none and a problem."""
        key: Key = ("stages", name)
        self.secrets += _secrets_in(section, key, places)
        if section is BROKEN:
            return None
        if not NAME.fullmatch(name) or name in TAKEN_STAGES:
            taken = ", ".join(TAKEN_STAGES)
            text = f"is no stage name; {_RULE}; {taken} mean something else"
            self.problems.append(Problem(places.of_key(key), key, text))
        if not isinstance(section, dict):
            text = "a stage is a mapping with the key 'kind' and that kind's own keys"
            self.problems.append(Problem(places.at(key), key, text))
            return None
        kind = section.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            if "kind" not in section:
                self.problems.append(_no_kind(key, section, places))
            elif kind is not BROKEN:
                text = f"{kind!r} is unknown{did_you_mean(str(kind), KINDS)}; the kinds are {', '.join(KINDS)}"
                self.problems.append(Problem(places.at((*key, "kind")), (*key, "kind"), text))
            return None
        fields = {k: v for k, v in section.items() if k != "kind"}
        if "seed" in KINDS[kind].model_fields:
            fields.setdefault("seed", seed)
        try:
            return KINDS[kind].model_validate(fields)
        except ValidationError as error:
            self.problems += explain(error, KINDS[kind], key, places)
            return _readable(KINDS[kind], fields, error)


def _no_kind(key: Key, section: dict[str, Any], places: SourceMap) -> Problem:
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
    return did_you_mean(str(path), names)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
