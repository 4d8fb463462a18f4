"""pydantic's validation errors as messages about a recipe: location, key, what is allowed."""

import re
from collections.abc import Iterator
from functools import reduce
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.recipe.key_hints import Sections, explain_unknown_key, model_at, suggest_word, types_in
from pipeline.recipe.nodes import BROKEN, Key, Node, Problem, item_of, split_key_within
from stages.base import AT_KEY
from stages.library_options.option_models import Options
from stages.system.did_you_mean import list_choices

_ANY = object()


def explain(
    error: ValidationError, section: dict[str, Any], key: Key, tree: Node, sections: Sections
) -> Iterator[Problem]:
    """Yield the problems of `section`, at `key` in `tree`, except for values that are already BROKEN.

    `sections` has its model and, for hints, those of other sections.
    """
    model = sections[key]
    for inner_key, details in errors_by_key(error, section).items():
        full_key, kind, value = key + inner_key, details[0]["type"], details[0]["input"]
        location = tree.locate_value(full_key)
        if kind == "extra_forbidden":
            text = _explain_unknown_key(key, inner_key, sections)
            yield Problem(tree.nearest(full_key).key_location, full_key, text)
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


def _explain_unknown_key(start: Key, key: Key, sections: Sections) -> str:
    """Explain the unknown `key` of the section at `start`."""
    owner = model_at(sections[start], key[:-1])
    name = str(key[-1])
    if owner and issubclass(owner, Options) and name in owner.reserved:
        return f"cannot be set here: {owner.reserved[name]}"
    names = list(owner.model_fields) if owner else []
    if len(key) == 1:
        names = ["kind", *names] if start else [*names, "extends"]
    return explain_unknown_key(start + key, names, sections)


def _explain_wrong_value(model: type[BaseModel], key: Key, details: list[ErrorDetails]) -> str:
    """Describe a value that fits none of the allowed types; `details` has one error for each of them."""
    value = repr(details[0]["input"])
    value = f"found {value if len(value) <= 100 else value[:100] + '...'}"
    choices = _choices_at(model, key) if any(item["type"] == "literal_error" for item in details) else []
    in_choices = ("literal_error", "string_pattern_mismatch") if choices else ()  # some choices are patterns
    messages = [item["msg"].removeprefix("String ") for item in details if item["type"] not in in_choices]
    text = f"{_join(messages)}, or else one of the allowed words, {value}" if messages else value
    if choices:
        hint = suggest_word(str(details[0]["input"]), choices) + list_choices("allowed are", choices)
        return f"{text}{hint or f'; docs/reference.md lists all {len(choices)}'}"
    if isinstance(details[0]["input"], list) and details[0]["type"] == "string_type" and key[0] == "data":
        value += "; to read several files, move them to a folder and name that; for one result each, use a matrix"
    return f"{_join(messages)}, {value}"


def _join(messages: list[str]) -> str:
    """Join `Input should be a valid integer` and `... a valid string` into one sentence."""
    prefix = "Input should be "
    messages = [re.sub("a valid dictionary or instance of .*", "a section of keys and values", m) for m in messages]
    ends = list(dict.fromkeys(message.removeprefix(prefix) for message in messages))
    return ("should be " if messages[0].startswith(prefix) else "") + " or ".join(ends)


def _choices_at(model: type[BaseModel], key: Key) -> list[str]:
    """Return the words allowed at `key`, or in the list there."""
    while key and isinstance(key[-1], int):
        key = key[:-1]
    owner = model_at(model, key[:-1])
    field = owner.model_fields.get(str(key[-1])) if owner and key else None
    literals = [part for part in types_in(field.annotation) if get_origin(part) is Literal] if field else []
    return list(dict.fromkeys(str(word) for literal in literals for word in get_args(literal)))
