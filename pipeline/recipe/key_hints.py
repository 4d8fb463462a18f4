"""Hints about unknown keys and wrong values: what other tools call them (aliases.yaml), where the key belongs."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import cache, reduce
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.recipe.nodes import Key, dotted, item_of
from stages.system.did_you_mean import did_you_mean, list_choices, plain, similar

Sections = Mapping[Key, type[BaseModel]]
"""Key of the recipe's top, `()`, or of a stage -> the model of its section."""


@cache
def _aliases(section: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("aliases.yaml").read_text(encoding="utf-8"))[section]


def explain_unknown_key(key: Key, names: list[str], sections: Sections) -> str:
    """Say what was probably meant by `key`, whose section has `names`; `sections` are where it could belong."""
    word, targets = plain(str(key[-1])), _aliases("keys").get(plain(str(key[-1])), [])
    places = [(*key[:-1], name) for name in names]
    places += [place for start, model in sections.items() for place in _keys_of(model, start)]
    for target in [targets] if isinstance(targets, str) else targets:
        name, _, remark = target.partition(" ")
        for place in places:
            if name == dotted(tuple(part for part in place[2 * (place[0] == "stages") :] if part != 0)):
                return f"unknown key; did you mean {_quote(place, key)}?{remark and f' {remark}'}"
    if word in _aliases("notes"):
        return f"unknown key; {_aliases('notes')[word]}"
    if not similar(word, names):
        for place in places:
            if plain(str(place[-1])) == word:
                return f"unknown key here; did you mean {_quote(place, key)}?"
    hint = did_you_mean(word, names) + list_choices("the keys are", names)
    return f"unknown key{hint or f'; docs/reference.md lists all {len(names)}'}"


def suggest_word(word: str, choices: list[str]) -> str:
    """Return `; did you mean ...?` for a word that is none of `choices`, or an empty text."""
    known = [choice for choice in _aliases("values").get(plain(word), []) if choice in choices]
    return f"; did you mean {known[0]!r}?" if known else did_you_mean(word, choices)


def suggest_value(model: type[BaseModel], section: dict[str, Any], key: Key, value: Any) -> str:
    """Return `; write ...` with a value of another type that is valid at `key` of `section`, or an empty text."""
    for candidate in _candidates(value, model_at(model, key)):
        changed = copy.deepcopy(section)
        reduce(item_of, key[:-1], changed)[key[-1]] = candidate  # type: ignore[index]
        try:
            model.model_validate(changed)
        except ValidationError as error:
            if any(details["loc"][: len(key)] == key for details in error.errors()):
                continue
        text = yaml.safe_dump([candidate], default_flow_style=True, sort_keys=False, width=1000)
        return f"; write {text.strip()[1:-1]}"
    return ""


def model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """Return the model of the section, or of the items of the list, under `key`."""
    for part in (part for part in key if isinstance(part, str)):
        field = model.model_fields.get(part)
        types = [part for part in types_in(field.annotation) if isinstance(part, type)] if field else []
        inner = next((part for part in types if issubclass(part, BaseModel)), None)
        if inner is None:
            return None
        model = inner
    return model


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all types in it."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def _keys_of(model: type[BaseModel], start: Key) -> Iterator[Key]:
    """Yield all keys of a section, the outer ones first; item 0 stands for all items of a list."""
    yield from ((*start, name) for name in model.model_fields)
    for name, field in model.model_fields.items():
        if (inner := model_at(model, (name,))) is not None:
            is_list = any(get_origin(part) is list for part in types_in(field.annotation))
            yield from _keys_of(inner, (*start, name, 0) if is_list else (*start, name))


def _quote(place: Key, key: Key) -> str:
    """Quote the key `place` for somebody who wrote `key`: its name if it is in the same section, else all of it."""
    if [part for part in place[:-1] if part != 0] == [part for part in key[:-1] if isinstance(part, str)]:
        return repr(place[-1])
    return repr(dotted(place)) + (" at the top of the recipe" if len(place) == 1 else "")


def _candidates(value: Any, model: type[BaseModel] | None) -> Iterator[Any]:
    """Yield values of other types that `value` may stand for; `model` is that of the section or of the list's items."""
    items = [item.strip() for item in value.split(",")] if isinstance(value, str) else [value]
    for name in [name for name, field in model.model_fields.items() if field.is_required()][:1] if model else []:
        yield from ({name: value}, [{name: item} for item in items])
    if isinstance(value, str | float):
        with contextlib.suppress(ValueError):
            yield from (int(float(value)),) if float(value).is_integer() else (float(value),)
        yield from ([True] if value in ("yes", "true") else [False] if value in ("no", "false") else [])
    yield value[0] if isinstance(value, list) and len(value) == 1 else items
