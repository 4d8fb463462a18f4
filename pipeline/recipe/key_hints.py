"""Hints about unknown keys and wrong values: what other tools call them (aliases.yaml), where the key belongs."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel

from pipeline.recipe.nodes import Key, dotted
from stages.system.did_you_mean import did_you_mean, list_choices, plain, similar

Sections = Mapping[Key, type[BaseModel]]
"""Key of the recipe's top, `()`, or of a stage -> the model of its section."""


@cache
def _aliases(section: str) -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("aliases.yaml").read_text(encoding="utf-8"))[section]


def explain_unknown_key(key: Key, names: list[str], sections: Sections) -> str:
    """Say what was probably meant by `key`, whose section has `names`; `sections` are where it could belong."""
    word, targets = plain(str(key[-1])), _aliases("keys").get(plain(str(key[-1])), [])
    section: Key = tuple(part for part in key[:-1] if isinstance(part, str))
    places = [(*section, name) for name in names]
    places += [place for start, model in sections.items() for place in _keys_of(model, start)]
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


def suggest_word(word: str, choices: list[str]) -> str:
    """Return `; did you mean ...?` for a word that is none of `choices`, or an empty text."""
    known = [choice for choice in _aliases("values").get(plain(word), []) if choice in choices]
    return f"; did you mean {known[0]!r}?" if known else did_you_mean(word, choices)


def model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """Return the model of the section, or of the items of the list or mapping, under `key`."""
    parts = iter(part for part in key if isinstance(part, str))
    for part in parts:
        field = model.model_fields.get(part)
        types = list(types_in(field.annotation)) if field else []
        inner = next((each for each in types if isinstance(each, type) and issubclass(each, BaseModel)), None)
        if inner is None:
            return None
        if any(get_origin(each) is dict for each in types):
            next(parts, None)  # the mapping's own key, which users choose
        model = inner
    return model


def types_in(annotation: Any) -> Iterator[Any]:
    """Yield an annotation and all types in it."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)


def _keys_of(model: type[BaseModel], start: Key) -> Iterator[Key]:
    """Yield all keys of a section and of the sections in it, the outer ones first."""
    yield from ((*start, name) for name in model.model_fields)
    for name in model.model_fields:
        if (inner := model_at(model, (name,))) is not None:
            yield from _keys_of(inner, (*start, name))


def _quote(place: Key, section: Key) -> str:
    """Quote the key `place` for somebody who wrote in `section`: its name if it is there, else all of it."""
    if place[:-1] == section:
        return repr(place[-1])
    return repr(dotted(place)) + (" at the top of the recipe" if len(place) == 1 else "")
