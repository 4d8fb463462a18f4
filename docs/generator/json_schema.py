"""The JSON Schema of recipes, which lets an editor complete and explain their keys.

`python -m docs.generator.json_schema` writes recipes/recipe.schema.json from the models that validate a recipe. The
schema accepts every valid recipe and some invalid ones: only `run-recipe --plan` checks how keys depend on each other
and on the files they name.
"""

from __future__ import annotations

import ast
import contextlib
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

from pipeline.recipe.loader import NAME, RESERVED_NAMES, RESERVED_STAGE_NAMES, RecipeHead
from pipeline.recipe.matrix import MATRIX
from stages.base import StageConfig
from stages.kinds import KINDS
from stages.library_options.option_models import Options, option_help

ROOT = Path(__file__).parents[2]
SCHEMA_FILE = ROOT / "recipes" / "recipe.schema.json"

Schema = dict[str, Any]
_DOCS = json.loads(Path(__file__).with_name("library_docs.json").read_text(encoding="utf-8"))
LIBRARIES: dict[str, list[str]] = _DOCS["libraries"]
"""Class or command, as in options.json -> its usual name, and the address of its documentation."""
STAGE_NOTES: dict[str, str] = _DOCS["stage_notes"]
"""Fields of TRL's configs whose default or meaning differs in a stage (stages.training.loop.arguments) -> how."""
REFUSED = "Cannot be set here: "
"""Prefix of the description of a refused key; the reason follows."""

_PARTS = json.loads(Path(__file__).with_name("recipe_parts.json").read_text(encoding="utf-8"))
"""Definitions of what no config model describes: interpolations, `extends` and the matrix."""
_NAME_PATTERN = f"^{NAME.pattern}$"


@cache
def schema() -> Schema:
    """Build the schema of a recipe, in the dialect draft-07, which all editors support.

    Every section has a definition with the name of its model. A recipe that extends another one may leave out required
    keys, so it uses the definitions NAME_partial, except in items of lists, which are not merged.
    """
    models: list[type[BaseModel]] = [RecipeHead, *KINDS.values()]
    refs, generated = models_json_schema(
        [(model, "validation") for model in models],
        ref_template="#/definitions/{model}",
        union_format="primitive_type_array",
        schema_generator=_Generator,
    )
    definitions: dict[str, Schema] = dict(sorted(generated["$defs"].items()))
    for definition in definitions.values():
        for value in definition["properties"].values():
            if "description" not in value and (section := section_of(value, definitions)):
                value["description"] = section["description"]
    head = definitions.pop(RecipeHead.__name__)
    stages = {kind: refs[model, "validation"] for kind, model in KINDS.items()}
    texts = [section["description"] for ref in stages.values() if (section := section_of(ref, definitions))]
    definitions |= {"recipe": _recipe(head), "stage": _stage(stages, texts)}
    definitions = {name: _open_parts(definition) for name, definition in definitions.items()}
    partial = {f"{name}_partial": _partial(definition, definitions) for name, definition in definitions.items()}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "A recipe of run-recipe.",
        "if": {"required": ["extends"]},
        "then": _ref("recipe_partial"),
        "else": _ref("recipe"),
        "definitions": {
            "interpolation": _PARTS["interpolation"],
            **definitions,
            **{name: value for name, value in partial.items() if value != definitions[name.removesuffix("_partial")]},
        },
    }


def section_of(value: Schema, definitions: dict[str, Schema]) -> Schema | None:
    """Return the definition of the section allowed as `value`, or as an item of it."""
    if "$ref" in value:
        definition = definitions.get(value["$ref"].rpartition("/")[2], {})
        return definition if "properties" in definition else None
    inner = [*value.get("anyOf", ()), value.get("items"), value.get("additionalProperties")]
    sections = (section_of(choice, definitions) for choice in inner if isinstance(choice, dict))
    return next((section for section in sections if section), None)


def default_note(value: Schema) -> str:
    """Return the end of a description that states the default, because editors do not show defaults."""
    return f" Default: {json.dumps(value['default'])}." if "default" in value else ""


def _ref(name: str) -> Schema:
    return {"$ref": f"#/definitions/{name}"}


def _recipe(head: Schema) -> Schema:
    properties = head["properties"]
    pattern = f"{_NAME_PATTERN}|{_PARTS['interpolation']['pattern']}"
    properties["name"] |= {"pattern": pattern, "not": {"enum": list(RESERVED_NAMES)}}
    properties[MATRIX] = _PARTS[MATRIX] | {"description": properties[MATRIX]["description"]}
    properties["stages"] = {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": _NAME_PATTERN, "not": {"enum": list(RESERVED_STAGE_NAMES)}},
        "additionalProperties": _ref("stage"),
        "description": properties["stages"]["description"],
    }
    return head | {"properties": {"extends": _PARTS["extends"], **properties}}


def _stage(refs: dict[str, Schema], texts: list[str]) -> Schema:
    about = "What the stage does. The other keys depend on it."
    kind = {"enum": list(refs), "enumDescriptions": texts, "description": about}
    rules = [
        {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": ref}
        for kind, ref in refs.items()
    ]
    without_kind = {"if": {"not": {"required": ["kind"]}}, "then": {"anyOf": list(refs.values())}}
    return {"type": "object", "properties": {"kind": kind}, "required": ["kind"], "allOf": [*rules, without_kind]}


def _partial(value: Any, definitions: dict[str, Schema]) -> Any:
    """Return `value` for a recipe that extends another one: no key is required, except in items of lists."""
    if isinstance(value, list):
        return [_partial(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        definition = definitions.get(name := value["$ref"].rpartition("/")[2])
        return value if _partial(definition, definitions) == definition else _ref(f"{name}_partial")
    return {
        key: item if key in ("if", "items") else _partial(item, definitions)
        for key, item in value.items()
        if key not in ("required", "minProperties")
    }


def _open(value: Schema) -> Schema:
    """Also allow an interpolation, unless the value may be any text."""
    value = _open_parts(value)
    if "default" in value:
        value["description"] += default_note(value)
    if "not" in value or _accepts_text(value):
        return value
    notes: Schema = {key: value.pop(key) for key in ("description", "default") if key in value}
    choices = value["anyOf"] if set(value) == {"anyOf"} else [value]
    return {**notes, "anyOf": [*choices, _ref("interpolation")]}


def _open_parts(value: Schema) -> Schema:
    """Allow interpolations for all values in a section or list."""
    value = dict(value)
    if "properties" in value:
        value["properties"] = {name: _open(item) for name, item in value["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(value.get(key), dict):
            value[key] = _open(value[key])
    if "anyOf" in value:
        value["anyOf"] = [_open_parts(choice) for choice in value["anyOf"]]
    return value


def _accepts_text(value: Schema) -> bool:
    if "anyOf" in value:
        return any(map(_accepts_text, value["anyOf"]))
    any_type = not {"type", "enum", "const", "$ref"} & value.keys()
    return any_type or ("string" in value.get("type", ()) and not {"enum", "pattern"} & value.keys())


class _Generator(GenerateJsonSchema):
    """pydantic's generator, with the libraries' help for their options and without notes that no reader needs."""

    def model_schema(self, schema: Any) -> Schema:
        section = super().model_schema(schema)
        model, properties = schema["cls"], section.setdefault("properties", {})
        description = " ".join((model.__doc__ or "").partition("\n\n")[0].split())
        for name, text in _docstrings(model).items():
            if name in properties:
                properties[name]["description"] = re.sub(r"\bNone\b", "null", " ".join(text.split()))
        if library := library_of(model):
            _add_help(properties, library, model)
        if issubclass(model, StageConfig):
            properties = {"kind": {"const": model.kind, "description": description}, **properties}
            if "seed" in properties:
                properties["seed"].pop("default", None)
                properties["seed"]["description"] += " Absent: the recipe's own."
        section.pop("title")
        return section | {"properties": properties, "description": description}

    def default_schema(self, schema: Any) -> Schema:
        """Leave out defaults that mean "absent" or are sections."""
        value = super().default_schema(schema)
        if isinstance(value.get("default"), list | dict | None):
            value.pop("default", None)
        return value

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def str_schema(self, schema: Any) -> Schema:
        """Leave out patterns with \\w, which is any letter in Python but only A to Z in JavaScript."""
        value = super().str_schema(schema)
        if r"\w" in value.get("pattern", ""):
            del value["pattern"]
        return value


def _docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return field -> the docstring under it. pydantic's use_attribute_docstrings would slow the command's start."""
    texts: dict[str, str] = {}
    for cls in reversed(model.__mro__[: model.__mro__.index(BaseModel)]):
        with contextlib.suppress(OSError):  # classes of create_model have no source
            definition = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
            for field, text in itertools.pairwise(ast.iter_child_nodes(definition)):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    texts[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return texts


def _add_help(properties: Schema, library: str, model: Any) -> None:
    """Add the descriptions and defaults of a library's options, and the keys that are refused."""
    for name, option in option_help(library).items():
        properties[name].setdefault("description", option.text or f"An option of {LIBRARIES[library][0]}.")
        if option.default is not None:
            properties[name]["default"] = option.default
    for name, reason in sorted(model.reserved.items()):
        text = f"{REFUSED}{reason}."
        properties[name] = {"not": {}, "description": text, "deprecationMessage": text}


def text() -> str:
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def library_of(model: type) -> str | None:
    """Return the class or command in options.json whose options `model` has; None if there is none."""
    bases = (base.__name__ for base in model.__mro__ if issubclass(base, Options))
    return next((name for name in bases if name in LIBRARIES), None)


if __name__ == "__main__":
    SCHEMA_FILE.write_text(text(), encoding="utf-8")
