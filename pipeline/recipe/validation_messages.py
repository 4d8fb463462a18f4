"""pydantic's validation errors as messages about a recipe: location, key, what is allowed, what was probably meant.

aliases.yaml has the names that other tools give to keys and values.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.recipe.nodes import BROKEN, Key, Node, Problem, dotted, item_of, split_key_within
from stages.base import AT_KEY, Need, StageConfig
from stages.library_options.option_models import Options
from stages.system.did_you_mean import did_you_mean, list_choices, plain, similar

Sections = Mapping[Key, type[BaseModel]]
"""Key of the recipe's top, `()`, or of a stage -> the model of its section."""


def explain(
    error: ValidationError, section: dict[str, Any], key: Key, tree: Node, sections: Sections
) -> Iterator[Problem]:
    """Yield the problems of `section`, at `key` in `tree`, except for values that are already BROKEN.

    `sections` has its model and, for hints, those of other sections.
    """
    for inner_key, details in _errors_by_key(error, section).items():
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
            yield Problem(location, full_key, _explain_wrong_value(inner_key, details))


def references_of(kind: type[StageConfig], section: dict[str, Any], error: ValidationError) -> list[Need]:
    """Return the references in the valid values of `section`, which has the validation errors `error`, so that one run
    of the command reports wrong references and other errors.

    Wrong values are removed and required ones replaced by stand-ins, one per round, until the section is valid, or for
    12 rounds.
    """
    section = copy.deepcopy(section)
    stand_ins: dict[Key, Iterator[Any]] = {}
    wrong: set[Key] = set()
    for _ in range(12):
        errors = _errors_by_key(error, section)
        wrong |= errors.keys()
        for key in sorted(errors, key=len, reverse=True):  # inner keys first
            parent: Any = reduce(item_of, key[:-1], section)
            if not key or parent is None:
                return []
            if errors[key][0]["type"] == "missing" or key in stand_ins or isinstance(parent, list):
                parent[key[-1]] = next(stand_ins.setdefault(key, iter((1, "-", {}, []))), None)
            else:
                parent.pop(key[-1], None)
        try:
            needs = kind.model_validate(section).needs().values()
        except ValidationError as next_error:
            error = next_error
        else:
            keys = {need: split_key_within(section, need.key) for need in needs}
            return [need for need in needs if not any(keys[need][: len(key)] == key for key in wrong)]
    return []


def suggest_word(word: str, choices: list[str]) -> str:
    """Return `; did you mean ...?` for a word that is none of `choices`, or an empty text."""
    known = [choice for choice in _aliases("values").get(plain(word), []) if choice in choices]
    return f"; did you mean {known[0]!r}?" if known else did_you_mean(word, choices)


@cache
def _aliases(section: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("aliases.yaml").read_text(encoding="utf-8"))[section]


def _errors_by_key(error: ValidationError, section: dict[str, Any]) -> dict[Key, list[ErrorDetails]]:
    """Group pydantic's errors by the key of `section` that they are about."""
    groups: dict[Key, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        groups.setdefault(_key_of(details, section), []).append(details)
    return groups


def _key_of(details: ErrorDetails, section: dict[str, Any]) -> Key:
    """The key that an error is about. Pydantic's location mixes keys with names of union branches ("int", "list[str]"):
    only parts that are keys of the section count, and none below the wrong value."""
    key, value = Key(), section
    for part in details["loc"]:
        names = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if part in names and value is not details["input"]:
            key, value = (*key, part), value[part]
    if details["type"] == "missing":  # the input is the section in which the last key is missing
        return (*key, details["loc"][-1])
    return key + split_key_within(value, details["ctx"]["key"]) if details["type"] == AT_KEY else key


def _explain_unknown_key(start: Key, inner_key: Key, sections: Sections) -> str:
    """Say what was probably meant by the unknown key `inner_key` of the section at `start`."""
    owner = _model_at(sections[start], inner_key[:-1])
    if owner and issubclass(owner, Options) and inner_key[-1] in owner.reserved:
        return f"cannot be set here: {owner.reserved[str(inner_key[-1])]}"
    names = list(owner.model_fields) if owner else []
    if len(inner_key) == 1:
        names = ["kind", *names] if start else [*names, "extends"]
    word = plain(str(inner_key[-1]))
    section: Key = tuple(part for part in start + inner_key[:-1] if isinstance(part, str))
    places = [(*section, name) for name in names]
    places += [place for key, model in sections.items() for place in _keys_of(model, key)]
    targets = _aliases("keys").get(word, [])
    for target in [targets] if isinstance(targets, str) else targets:
        name, _, remark = target.partition(" ")
        for place in places:
            if name == dotted(place[2 * (place[0] == "stages") :]):
                return f"unknown key; did you mean {_quote(place, section)}?{remark and f' {remark}'}"
    if word in _aliases("notes"):
        return f"unknown key; {_aliases('notes')[word]}"
    if not similar(word, names):
        for place in places:
            if plain(str(place[-1])) == word:
                return f"unknown key here; did you mean {_quote(place, section)}?"
    hint = did_you_mean(word, names) + list_choices("the keys are", names)
    return f"unknown key{hint or f'; docs/reference.md lists all {len(names)}'}"


def _quote(place: Key, section: Key) -> str:
    """Quote the key `place` for somebody who wrote in `section`: its name if it is there, else all of it."""
    if place[:-1] == section:
        return repr(place[-1])
    return repr(dotted(place)) + (" at the top of the recipe" if len(place) == 1 else "")


def _explain_wrong_value(key: Key, details: list[ErrorDetails]) -> str:
    """Describe a value that fits none of the allowed types; `details` has one error for each of them."""
    value = repr(details[0]["input"])
    value = f"found {value if len(value) <= 100 else value[:100] + '...'}"
    expected = [item["ctx"]["expected"] for item in details if item["type"] == "literal_error"]
    choices = list(dict.fromkeys(re.findall("'([^']+)'", ", ".join(expected))))
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


def _model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """Return the model of the section, or of the items of the list or mapping, under `key`."""
    parts = iter(part for part in key if isinstance(part, str))
    for part in parts:
        field = model.model_fields.get(part)
        types = list(_types_in(field.annotation)) if field else []
        inner = next((each for each in types if isinstance(each, type) and issubclass(each, BaseModel)), None)
        if inner is None:
            return None
        if any(get_origin(each) is dict for each in types):
            next(parts, None)  # the mapping's own key, which users choose
        model = inner
    return model


def _types_in(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all types in it."""
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _keys_of(model: type[BaseModel], start: Key) -> Iterator[Key]:
    """Yield all keys of a section and of the sections in it, the outer ones first."""
    yield from ((*start, name) for name in model.model_fields)
    for name in model.model_fields:
        if (inner := _model_at(model, (name,))) is not None:
            yield from _keys_of(inner, (*start, name))
