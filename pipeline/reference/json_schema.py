"""Recipes as a JSON Schema, by which an editor completes and explains their keys.

`python -m pipeline.reference.json_schema` writes it, recipes/recipe.schema.json. It is made of the models that
read a recipe. It accepts all that they accept, and more: only `run-recipe --plan` checks how keys relate to each other
and to the files they name.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import json
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from pipeline.recipe.interpolation import PLACEHOLDER
from pipeline.recipe.loader import NAME, RESERVED_NAMES, RESERVED_STAGE_NAMES, RecipeHead
from pipeline.recipe.matrix import MATRIX
from stages import KINDS
from stages.base import StageConfig
from stages.library_options.option_docs import LIBRARIES, library_of, option_help

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "recipes" / "recipe.schema.json"

Schema = dict[str, Any]
REFUSED = "Cannot be set here: "
"""How the description of a key begins that is refused, with the reason."""

_KIND = "What the stage does; it decides which other keys there are."
_EXTENDS = "Another recipe, relative to this one: this one is laid over it, section by section. Lists are not merged."
_SEED = "Absent: the recipe's own."
_REFERENCE = {
    "type": "string",
    "pattern": rf"\$\{{|^{PLACEHOLDER.replace('?', '[?]')}$",
    "description": "${stages.NAME.KEY}, the value under that key; ${matrix.AXIS}, the cell's value;"
    f" {PLACEHOLDER}, a value still to be given.",
}
_NAMED = f"^{NAME.pattern}$"
_PARTIAL = {"type": "object", "minProperties": 1, "description": "Axis -> value."}
_CELLS = {"type": "array", "items": _PARTIAL}
_AXIS = {
    "anyOf": [{"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}],
    "description": "The values of this axis, as a list or by name; stages refer to them by ${matrix.AXIS}.",
}


@cache
def schema() -> Schema:
    """The schema of a whole recipe, in the dialect draft-07, which all editors know.

    Every section has a definition, named as its model, in which no key is required: a recipe that extends another may
    leave out any but those of list items, which are not merged. What is required stands beside the references to it.
    """
    models: list[type[BaseModel]] = [RecipeHead, *KINDS.values()]
    names, made = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/definitions/{model}",
        schema_generator=_Described,
    )
    found: dict[str, Schema] = made["$defs"]
    for each in found.values():
        for value in each["properties"].values():
            if "description" not in value and (inner := section(value, found)):
                value["description"] = inner["description"]
    refs = {kind: names[model, "validation"] for kind, model in KINDS.items()}
    whole, extending = ({kind: _needed(ref, found, every) for kind, ref in refs.items()} for every in (True, False))
    head = found.pop(names[RecipeHead, "validation"]["$ref"].rpartition("/")[2])
    laid_over = {"if": {"type": "object", "not": {"required": ["kind"]}}, "then": {"anyOf": list(refs.values())}}
    definitions = {
        "reference": _REFERENCE,
        "stage": _stage(refs, whole) | {"required": ["kind"]},
        "stage_laid_over": _stage(refs, extending) | laid_over,
        **{name: _parts_open(each) for name, each in sorted(found.items())},
    }
    for each in definitions.values():
        if each.get("additionalProperties") is False:
            each.pop("required", None)
    stages = {"minProperties": 1, "additionalProperties": _open(_ref("stage"))}
    stages_laid_over = {"additionalProperties": _open(_ref("stage_laid_over"))}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "A recipe of run-recipe.",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _open(value) for name, value in _at_the_top(head["properties"]).items()},
        "if": {"required": ["extends"]},
        "then": _with(stages_laid_over, _needed(head, found, whole=False)),
        "else": _with(stages, _needed(head, found, whole=True)),
        "definitions": definitions,
    }


def _with(stages: Schema, needed: Schema) -> Schema:
    """What `needed` says of a recipe, and what `stages` says of its stages."""
    return needed | {"properties": needed.get("properties", {}) | {"stages": stages}}


def _at_the_top(properties: Schema) -> Schema:
    """The keys of a recipe, with what is said of them elsewhere than in RecipeHead."""
    matrix = {
        "type": "object",
        "properties": {"exclude": _CELLS | {"description": "No cells that agree with one of these."}}
        | {"include": _CELLS | {"description": "Further cells; each names every axis."}},
        "additionalProperties": _AXIS,
    }
    stages = {"type": "object", "propertyNames": {"pattern": _NAMED, "not": {"enum": list(RESERVED_STAGE_NAMES)}}}
    name = {"pattern": f"{_NAMED}|{_REFERENCE['pattern']}", "not": {"enum": list(RESERVED_NAMES)}}
    said = {key: {"description": properties[key]["description"]} for key in (MATRIX, "stages")}
    return {
        "extends": {"type": "string", "description": _EXTENDS},
        **properties,
        "name": properties["name"] | name,
        MATRIX: matrix | said[MATRIX],
        "stages": stages | said["stages"],
    }


def section(value: Schema, definitions: dict[str, Schema]) -> Schema | None:
    """The definition of the section that may stand there, or in the list there."""
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return definitions[name] if "properties" in definitions[name] else None
    inner = [*value.get("anyOf", ()), *(value[key] for key in ("items", "additionalProperties") if value.get(key))]
    return next((found for each in inner if isinstance(each, dict) and (found := section(each, definitions))), None)


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _stage(refs: dict[str, Schema], needed: dict[str, Schema]) -> Schema:
    """A stage of any kind; where its kind is a known word, the section of that kind."""
    texts = [docstring(KINDS[kind]) for kind in refs]
    kind = {"enum": list(refs), "enumDescriptions": texts, "description": _KIND}
    rules = [
        {
            "if": {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": {"allOf": [ref, needed[kind]]} if needed[kind] else ref,
        }
        for kind, ref in refs.items()
    ]
    return {"type": "object", "properties": {"kind": _open(kind)}, "allOf": rules}


def _needed(section: Schema, definitions: dict[str, Schema], whole: bool) -> Schema:
    """The keys that must be there within `section`, at every depth: all in a list's items, elsewhere if `whole`."""
    choices = [_needed(each, definitions, whole) for each in section.get("anyOf", ())]
    if "$ref" in section:
        choices.append(_needed(definitions[section["$ref"].rpartition("/")[2]], definitions, whole))
    if found := [choice for choice in choices if choice]:
        return found[0] if len(found) == 1 else {}
    needed: Schema = {"required": section["required"]} if whole and section.get("required") else {}
    inner = {name: _needed(value, definitions, whole) for name, value in section.get("properties", {}).items()}
    if inner := {name: value for name, value in inner.items() if value}:
        needed["properties"] = inner
    for key, is_whole in (("items", True), ("additionalProperties", whole)):
        if isinstance(section.get(key), dict) and (below := _needed(section[key], definitions, is_whole)):
            needed[key] = below
    return needed


def _open(value: Schema) -> Schema:
    """A value that may be written as a reference, too: any but those that take all text as it is."""
    value = _parts_open(value)
    if "default" in value:  # editors offer it, but do not show it
        value["description"] += told_default(value)
    if "not" in value or _takes_text(value):
        return value
    notes: Schema = {key: value.pop(key) for key in ("description", "default") if key in value}
    choices = value["anyOf"] if set(value) == {"anyOf"} else [value]
    return {**notes, "anyOf": [*choices, _ref("reference")]}


def told_default(value: Schema) -> str:
    """What a description says of a default at its end."""
    return f" Default: {json.dumps(value['default'])}." if "default" in value else ""


def _parts_open(value: Schema) -> Schema:
    """Likewise for all values within a section or list."""
    value = copy.copy(value)
    if "properties" in value:
        value["properties"] = {name: _open(inner) for name, inner in value["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(value.get(key), dict):
            value[key] = _open(value[key])
    if "anyOf" in value:
        value["anyOf"] = [_parts_open(inner) for inner in value["anyOf"]]
    return value


def _takes_text(value: Schema) -> bool:
    if "anyOf" in value:
        return any(map(_takes_text, value["anyOf"]))
    free = not {"type", "enum", "const", "$ref"} & value.keys()
    return free or ("string" in value.get("type", ()) and not {"enum", "pattern"} & value.keys())


class _Described(GenerateJsonSchema):
    """Models with their docstrings, and with what the libraries say of their options."""

    def model_schema(self, schema: Any) -> Schema:
        section = super().model_schema(schema)
        model = schema["cls"]
        texts, properties = docstrings(model), section.setdefault("properties", {})
        for name, value in properties.items():
            properties[name] = self._described(value, texts.get(name, ""))
        if library := library_of(model):
            self._add_help(properties, library, model)
        if issubclass(model, StageConfig):
            properties = {"kind": {"const": model.kind, "description": docstring(model)}, **properties}
            if "seed" in properties:
                properties["seed"].pop("default", None)
                properties["seed"]["description"] += f" {_SEED}"
        section.pop("title")
        return section | {"properties": properties, "description": docstring(model)}

    def _described(self, value: Schema, text: str) -> Schema:
        """Without what no reader needs: titles, defaults that say "absent", and choices between plain types."""
        value = {key: inner for key, inner in value.items() if key not in ("title", "description")}
        if value.get("default") is None or isinstance(value["default"], dict | list):
            value.pop("default", None)
        choices = value.get("anyOf", ())
        if choices and all(set(choice) == {"type"} for choice in choices):
            value["type"] = [choice["type"] for choice in value.pop("anyOf")]
        return value | ({"description": text} if text else {})

    def _add_help(self, properties: Schema, library: str, model: Any) -> None:
        own = docstrings(model)
        for name, said in option_help(library).items():
            if name not in own:
                properties[name]["description"] = said.text or f"An option of {LIBRARIES[library][0]}."
            if said.default is not None:
                properties[name]["default"] = said.default
        for name, why in sorted(model.reserved.items()):
            text = f"{REFUSED}{why}."
            properties[name] = {"not": {}, "description": text, "deprecationMessage": text}

    def str_schema(self, schema: Any) -> Schema:
        """Without patterns that editors read otherwise: \\w is any letter in Python, one of A to Z in JavaScript."""
        made = super().str_schema(schema)
        return {key: value for key, value in made.items() if key != "pattern" or r"\w" not in value}


def docstring(model: type) -> str:
    """The first paragraph of a model's docstring, in one line."""
    return " ".join(inspect.cleandoc(model.__doc__ or "").partition("\n\n")[0].split())


def docstrings(model: type) -> dict[str, str]:
    """Field -> the docstring under it, in one line, with YAML's word for None.

    pydantic's use_attribute_docstrings finds them too, but whenever a model is made, which would slow the command.
    """
    texts: dict[str, str] = {}
    for cls in reversed(model.__mro__):
        if not issubclass(cls, BaseModel) or cls is BaseModel:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
        except (OSError, TypeError):  # made of options.json, not of source
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                texts[field.target.id] = re.sub(r"\bNone\b", "null", " ".join(ast.literal_eval(text.value).split()))
    return texts


def text() -> str:
    """What stands in the file."""
    return _written(schema(), 0) + "\n"


def _written(value: Any, depth: int) -> str:
    """JSON in which what is short stands in one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + depth <= 110 or not isinstance(value, dict | list):
        return line
    if isinstance(value, list):
        parts, ends = [_written(each, depth + 1) for each in value], "[]"
    else:
        parts, ends = [f"{json.dumps(name)}: {_written(each, depth + 1)}" for name, each in value.items()], "{}"
    return ends[0] + ",".join(f"\n{' ' * (depth + 1)}{part}" for part in parts) + f"\n{' ' * depth}{ends[1]}"


if __name__ == "__main__":
    SCHEMA.write_text(text(), encoding="utf-8")
