"""Text -> Recipe: YAML read, merged, interpolated and validated; every error says file, line, key and remedy.

What the keys of a stage mean is said by the stage's own config model; how a stage runs is no concern of this file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError

from pipeline.places import Key, Places, split_key
from pipeline.secret import masked, secrets
from stages import KINDS
from stages.base import Config, StageConfig

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,99}")
"""Names of recipes and stages become folder names: no slash, no leading dot, and short enough for any file system."""
_RULE = "use a letter, then letters, digits, _ . -, at most 100 in all"

TAKEN = ("store", "cache")
"""Folders beside those of the recipes."""
TAKEN_STAGES = ("base", "logs", "preview", "run.json")
"""The recipe's own model, and what lies beside the links to the stages' results."""


class RecipeError(Exception):
    """One or more things wrong with a recipe or the command line; `str` is the message, a line per error."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))


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

    def error(self, key: Key, text: str) -> RecipeError:
        """An error at the place where `key` stands."""
        return RecipeError([f"{self.places.at(key)}: {'.'.join(map(str, key))}: {text}"])


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path`, with `KEY=VALUE` overrides laid over it. Raises RecipeError."""
    OmegaConf.clear_resolver("oc.env")  # a recipe is shared and recorded; the environment holds secrets
    places = Places()
    tree = _read(path, places, seen=())
    for override in overrides:
        tree = _override(tree, override, places)
    try:
        for missing in OmegaConf.missing_keys(tree):
            raise RecipeError([f"{places.at(split_key(missing))}: {missing}: is '???', a value still to be given"])
        values: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(
            [f"{places.at(split_key(error.full_key or ''))}: {error.full_key}: {str(error).splitlines()[0]}"]
        ) from None
    if errors := list(_secrets_in(values, (), places)):
        raise RecipeError(errors)
    return _validate(values, path, places)


def _secrets_in(value: Any, key: Key, places: Places) -> Iterator[str]:
    """An error for each text of the recipe with a secret of the environment in it, which results would record."""
    if isinstance(value, Mapping | list):
        for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _secrets_in(inner, (*key, name), places)
    elif isinstance(value, str):
        for name, secret in secrets().items():
            if secret in value:
                where = f"{masked(str(places.at(key)))}: {'.'.join(map(str, key))}"
                yield f"{where}: holds the secret of the environment variable {name}; a recipe holds none, so remove it"


def _read(path: Path, places: Places, seen: tuple[Path, ...]) -> DictConfig:
    """The YAML at `path` with what it extends beneath it; notes in `places` where each key stands."""
    if path.resolve() in seen:
        raise RecipeError([f"{path}: extends itself by way of {', '.join(map(str, seen))}"])
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text)
        tree = OmegaConf.create(text)
    except (OSError, ValueError) as error:
        near = _near_file(path) if isinstance(error, FileNotFoundError) else ""
        raise RecipeError([f"{path}: cannot be read: {_reason(error)}{near}"]) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError([f"{path}{line}: not valid YAML: {error.problem or error.context}"]) from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError([f"{path}: not valid YAML: {error}"]) from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(tree, DictConfig):
        raise RecipeError([f"{path}:1: a recipe is a mapping with the keys name, model and stages"])
    parent = OmegaConf.to_container(tree).get("extends")  # type: ignore[union-attr]
    if parent is None:
        places.note(path, node)
        return tree
    if not isinstance(parent, str):
        raise RecipeError([f"{path}: extends: names one recipe file, relative to this one"])
    below = _read(path.parent / parent, places, (*seen, path.resolve()))
    places.note(path, node)
    del tree["extends"]
    return OmegaConf.merge(below, tree)  # type: ignore[return-value]


def _override(tree: DictConfig, override: str, places: Places) -> DictConfig:
    """Lay one `--set KEY=VALUE` over the recipe."""
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError([f"--set {override}: write --set KEY=VALUE, for example --set stages.wit.weights.prompt=0.4"])
    try:
        patch = OmegaConf.from_dotlist([override])
        places.note_override(override, split_key(key.strip()))
        return OmegaConf.merge(tree, patch)  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise RecipeError([f"--set {override}: {str(error).splitlines()[0]}"]) from None


def _validate(values: dict[str, Any], path: Path, places: Places) -> Recipe:
    errors: list[str] = []
    try:
        head = RecipeHead.model_validate(values)
    except ValidationError as error:
        errors += _explain(error, RecipeHead, (), places)
        head = None
    sections = values.get("stages")
    stages: dict[str, StageConfig] = {}
    if isinstance(sections, Mapping):
        if not sections:
            errors.append(f"{places.at(('stages',))}: stages: names no stage; the kinds are {', '.join(KINDS)}")
        for name, section in sections.items():
            stages |= _stage(str(name), section, values.get("seed", 23), places, errors)
    if head and (not NAME.fullmatch(head.name) or head.name in TAKEN):
        errors.append(f"{places.at(('name',))}: name: {head.name!r} is no folder name; {_RULE}")
    if errors or head is None:
        raise RecipeError(errors)
    return Recipe(head.name, head.seed, head.model, stages, places)


def _stage(name: str, section: Any, seed: Any, places: Places, errors: list[str]) -> dict[str, StageConfig]:
    """The one stage of `section`, or none and a line in `errors`."""
    key: Key = ("stages", name)
    where = f"{places.at(key)}: stages.{name}"
    if not NAME.fullmatch(name) or name in TAKEN_STAGES:
        taken = ", ".join(TAKEN_STAGES)
        errors.append(f"{where}: is no stage name; {_RULE}; {taken} mean something else")
        return {}
    if not isinstance(section, Mapping):
        errors.append(f"{where}: a stage is a mapping with the key 'kind' and that kind's own keys")
        return {}
    kind = section.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        if kind is None:
            text = f"needs 'kind', one of {', '.join(KINDS)}"
        else:
            text = f"kind: {kind!r} is unknown{_near(str(kind), KINDS)}; the kinds are {', '.join(KINDS)}"
        errors.append(f"{places.at((*key, 'kind'))}: stages.{name}: {text}")
        return {}
    fields = {k: v for k, v in section.items() if k != "kind"}
    if "seed" in KINDS[kind].model_fields:
        fields.setdefault("seed", seed)
    try:
        return {name: KINDS[kind].model_validate(fields)}
    except ValidationError as error:
        errors += _explain(error, KINDS[kind], key, places)
        return {}


def _explain(error: ValidationError, model: type[BaseModel], root: Key, places: Places) -> Iterator[str]:
    """A validation error in the words of the recipe: where, which key, what is wrong, what would be right."""
    for item in error.errors():
        loc = tuple(part for part in item["loc"] if not _is_branch(part))
        key = root + loc
        name = ".".join(map(str, key)) or "recipe"
        if item["type"] == "extra_forbidden":
            known = _fields(model, loc[:-1])
            reserved = getattr(_model(model, loc[:-1]), "reserved", {})
            if loc[-1] in reserved:
                text = f"cannot be set here: {reserved[loc[-1]]}"
            else:
                text = f"unknown key{_near(str(loc[-1]), known)}"
                if len(known) <= 20:
                    text += f"; the keys are {', '.join(known)}"
        elif item["type"] == "missing":
            text = "is missing"
        else:
            text = item["msg"].removeprefix("Value error, ")
            if item["type"] != "value_error":
                text += f", found {item['input']!r}"
        yield f"{places.at(key)}: {name}: {text}"


def _is_branch(part: Any) -> bool:
    """Whether pydantic put `part` into a location to name the branch of a union: no key of a recipe."""
    return isinstance(part, str) and (part in {"bool", "int", "float", "str"} or "[" in part)


def _model(model: type[BaseModel], loc: Key) -> type[BaseModel] | None:
    """The config model in charge of the section at `loc` within `model`."""
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        inner = next(_models(field.annotation), None) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _fields(model: type[BaseModel], loc: Key) -> list[str]:
    """The keys that may stand in the section at `loc`."""
    inner = _model(model, loc)
    kind = ["kind"] if not loc and issubclass(model, StageConfig) else []
    return kind + (list(inner.model_fields) if inner else [])


def _near(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?`, or nothing where no known word is near."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def _near_file(path: Path) -> str:
    """The recipe files a mistyped path may have meant."""
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    names = sorted(str(p) for p in folder.glob("*.yaml")) if folder.is_dir() else []
    return _near(str(path), names)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
