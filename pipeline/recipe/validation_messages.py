"""pydantic's validation errors as messages about a recipe: location, key, what is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.recipe.did_you_mean import did_you_mean, list_choices
from pipeline.recipe.nodes import BROKEN, Key, Node, Problem, item_of, split_key_within
from stages.base import AT_KEY, StageConfig
from stages.library_options.option_models import Options

_ANY = object()


def explain(
    error: ValidationError, model: type[BaseModel], section: dict[str, Any], key: Key, tree: Node
) -> Iterator[Problem]:
    """Yield the problems of `section`, at `key` in `tree`, except for values that are already BROKEN."""
    for inner_key, details in errors_by_key(error, section).items():
        full_key, kind, value = key + inner_key, details[0]["type"], details[0]["input"]
        location = tree.locate_value(full_key)
        if kind == "extra_forbidden":
            yield Problem(tree.nearest(full_key).key_location, full_key, _explain_unknown_key(model, inner_key))
        elif value is BROKEN:
            continue
        elif kind == "missing":
            yield Problem(location, full_key, "is missing")
        elif kind == AT_KEY or kind == "value_error":
            yield Problem(location, full_key, details[0]["msg"].removeprefix("Value error, "))
        else:
            yield Problem(location, full_key, _explain_wrong_value(model, inner_key, details))


def errors_by_key(error: ValidationError, section: dict[str, Any]) -> dict[Key, list[ErrorDetails]]:
    """Group pydantic's errors by the key of `section` that they are about."""
    groups: dict[Key, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        groups.setdefault(_key_of(details, section), []).append(details)
    return groups


def _key_of(details: ErrorDetails, section: dict[str, Any]) -> Key:
    location, value, end = details["loc"], details["input"], Key()
    if details["type"] == "missing":  # the input is the section in which the last key is missing
        location, end = location[:-1], location[-1:]
    key = _keys_in(section, location, value)
    if key is None:
        key = _keys_in(section, location, _ANY) or ()
    if details["type"] == AT_KEY:
        end = split_key_within(reduce(item_of, key, section), details["ctx"]["key"])
    return key + end


def _keys_in(value: Any, location: Key, target: Any) -> Key | None:
    """Return the keys of `value` that lead to `target`, or None.

    Besides keys, pydantic's location names branches of unions and validators ("int", "list[str]", "function-after[]").
    A key may have such a name, too, so only the values tell them apart.
    """
    if not location:
        return () if target is _ANY or value is target or value == target else None
    part, rest = location[0], location[1:]
    if (child := item_of(value, part)) is not None or (isinstance(value, dict) and part in value):
        keys = _keys_in(child, rest, target)
        if keys is not None:
            return (part, *keys)
    return _keys_in(value, rest, target)


def _explain_unknown_key(model: type[BaseModel], key: Key) -> str:
    owner = _model_at(model, key[:-1])
    name = str(key[-1])
    if owner and issubclass(owner, Options) and name in owner.reserved:
        return f"cannot be set here: {owner.reserved[name]}"
    names = list(owner.model_fields) if owner else []
    if len(key) == 1 and issubclass(model, StageConfig):
        names.insert(0, "kind")
    return f"unknown key{_hint(name, 'the keys are', names)}"


def _explain_wrong_value(model: type[BaseModel], key: Key, details: list[ErrorDetails]) -> str:
    """Describe a value that fits none of the allowed types; `details` has one error for each of them."""
    value = repr(details[0]["input"])
    value = f"found {value if len(value) <= 100 else value[:100] + '...'}"
    choices = _choices_at(model, key) if any(item["type"] == "literal_error" for item in details) else []
    in_choices = ("literal_error", "string_pattern_mismatch") if choices else ()  # some choices are patterns
    messages = [item["msg"].removeprefix("String ") for item in details if item["type"] not in in_choices]
    if not choices:
        return f"{_join(messages)}, {value}"
    text = f"{_join(messages)}, or else one of the allowed words, {value}" if messages else value
    return f"{text}{_hint(str(details[0]['input']), 'allowed are', choices)}"


def _hint(word: str, introduction: str, choices: list[str]) -> str:
    hint = did_you_mean(word, choices) + list_choices(introduction, choices)
    return hint or f"; docs/reference.md lists all {len(choices)}"


def _join(messages: list[str]) -> str:
    """Join `Input should be a valid integer` and `... a valid string` into one sentence."""
    prefix = "Input should be "
    ends = list(dict.fromkeys(message.removeprefix(prefix) for message in messages))
    return ("should be " if messages[0].startswith(prefix) else "") + " or ".join(ends)


def _choices_at(model: type[BaseModel], key: Key) -> list[str]:
    """Return the words allowed at `key`, or in the list there."""
    while key and isinstance(key[-1], int):
        key = key[:-1]
    owner = _model_at(model, key[:-1])
    field = owner.model_fields.get(str(key[-1])) if owner and key else None
    literals = [part for part in _types_in(field.annotation) if get_origin(part) is Literal] if field else []
    return list(dict.fromkeys(str(word) for literal in literals for word in get_args(literal)))


def _model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    for part in key:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(str(part))
        types = [part for part in _types_in(field.annotation) if isinstance(part, type)] if field else []
        inner = next((part for part in types if issubclass(part, BaseModel)), None)
        if inner is None:
            return None
        model = inner
    return model


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)
