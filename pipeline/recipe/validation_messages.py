"""What pydantic finds wrong with a section of a recipe, in the words of the recipe: place, key, what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pipeline.recipe.did_you_mean import did_you_mean, listed
from pipeline.recipe.nodes import BROKEN, Key, Problem, SourceMap, split_key
from stages.base import AT_KEY, StageConfig

_BRANCHES = {"bool", "int", "float", "str", "dict", "list", "constrained-str"}
"""How pydantic names the types of a union."""


def explain(error: ValidationError, model: type[BaseModel], root: Key, places: SourceMap) -> Iterator[Problem]:
    """The problems of the section at `root`, which `model` reads; none for values that were found BROKEN before."""
    by_key: dict[Key, list[Any]] = {}
    for item, loc in zip(error.errors(include_url=False), locations(error), strict=True):
        by_key.setdefault(loc, []).append(item)
    for loc, items in by_key.items():
        key, kind = root + loc, items[0]["type"]
        if kind == "extra_forbidden":
            yield Problem(places.of_key(key), key, _unknown(model, loc))
        elif items[0]["input"] is BROKEN:
            continue
        elif kind == "missing":
            yield Problem(places.at(key), key, "is missing")
        elif kind == AT_KEY or kind == "value_error":
            yield Problem(places.at(key), key, items[0]["msg"].removeprefix("Value error, "))
        else:
            yield Problem(places.at(key), key, _wrong(model, loc, items))


def locations(error: ValidationError) -> list[Key]:
    """The key of every error, within the section that was read."""
    found: list[Key] = []
    for item in error.errors(include_url=False):
        key = split_key(item["ctx"]["key"]) if item["type"] == AT_KEY else ()
        found.append((*(part for part in item["loc"] if not _is_branch(part)), *key))
    return found


def _unknown(model: type[BaseModel], loc: Key) -> str:
    reserved = getattr(_model(model, loc[:-1]), "reserved", {})
    if loc[-1] in reserved:
        return f"cannot be set here: {reserved[loc[-1]]}"
    known = _fields(model, loc[:-1])
    return f"unknown key{_hint(str(loc[-1]), 'the keys are', known)}"


def _wrong(model: type[BaseModel], loc: Key, items: list[Any]) -> str:
    """What is said of a value that fits none of the types that may stand there, one item for each."""
    found = repr(items[0]["input"])
    found = f"found {found if len(found) <= 100 else found[:100] + '...'}"
    choices = _choices(model, loc) if any(item["type"] == "literal_error" for item in items) else []
    aside = ("literal_error", "string_pattern_mismatch") if choices else ()  # choices of which some are patterns
    messages = [item["msg"].removeprefix("String ") for item in items if item["type"] not in aside]
    if not choices:
        return f"{_joined(messages)}, {found}"
    said = f"{_joined(messages)}, or else one of the allowed words, {found}" if messages else found
    return f"{said}{_hint(str(items[0]['input']), 'allowed are', choices)}"


def _hint(word: str, introduction: str, known: list[str]) -> str:
    """What would be right: the nearest, all where they are few, or else where they are listed."""
    return did_you_mean(word, known) + listed(introduction, known) or f"; docs/reference.md lists all {len(known)}"


def _joined(messages: list[str]) -> str:
    """`Input should be a valid integer` and `... a valid string` as one sentence."""
    prefix = "Input should be "
    ends = list(dict.fromkeys(message.removeprefix(prefix) for message in messages))
    return ("should be " if messages[0].startswith(prefix) else "") + " or ".join(ends)


def _is_branch(part: Any) -> bool:
    """Whether pydantic put `part` into a location to name the branch of a union: no key of a recipe."""
    return isinstance(part, str) and (part in _BRANCHES or "[" in part)


def _choices(model: type[BaseModel], loc: Key) -> list[str]:
    """The words that may stand at `loc`, or in the list there."""
    while loc and isinstance(loc[-1], int):
        loc = loc[:-1]
    owner = _model(model, loc[:-1])
    field = owner.model_fields.get(str(loc[-1])) if owner and loc else None
    return list(dict.fromkeys(map(str, _words(field.annotation)))) if field else []


def _words(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    else:
        for part in get_args(annotation):
            yield from _words(part)


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
