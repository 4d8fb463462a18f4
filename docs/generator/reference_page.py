"""The page docs/reference.md: every key of a recipe and every option of the command.

`python -m docs.generator.reference_page` writes it from the JSON Schema, the command's parser and
reference.md.jinja.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from docs.generator.json_schema import LIBRARIES, REFUSED, ROOT, Schema, default_note, schema, section_of
from pipeline.arguments import build_parser

PAGE = ROOT / "docs" / "reference.md"
PAGE_TEMPLATE = Path(__file__).with_name("reference.md.jinja")

_TITLES = {
    "SFTConfig": ("SFTConfig", "train of sft"),
    "DPOConfig": ("DPOConfig", "train of dpo"),
    "LoraConfig": ("LoraConfig", "lora"),
    "BitsAndBytesConfig": ("Quantization", "quantization"),
    "launch": ("Launch", "launch"),
    "gen_kwargs": ("gen_kwargs", "options.gen_kwargs"),
}
"""Class or command in LIBRARIES -> the section's definition in the schema, its title on the page."""
_WORDS = {"string": "text", "integer": "whole number", "boolean": "true, false", "object": "section"}
_SIGNS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def page() -> str:
    definitions = schema()["definitions"]
    rows = {name: list(_rows(definition, definitions)) for name, definition in definitions.items()}
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": _escape_cell, "anchor": _anchor}
    return environment.from_string(PAGE_TEMPLATE.read_text(encoding="utf-8")).render(
        definitions=definitions,
        rows=rows,
        every_stage=rows["stage"] + [row for row in rows["ReportStage"] if row[0].startswith("resources")],
        refused={name: _refused(definition) for name, definition in definitions.items()},
        libraries=LIBRARIES,
        titles=_TITLES,
        options=_options(),
    )


def _rows(section: Schema, definitions: Schema, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type, default and meaning of the keys of a section and of its sections, except libraries' options."""
    for name, value in section.get("properties", {}).items():
        if value.get("not") == {}:
            continue
        default = f"`{_plain(value['default'])}`" if "default" in value else "-"
        default = "required" if name in section.get("required", ()) else default
        meaning = value.get("description", "").removesuffix(default_note(value))
        inner = section_of(value, definitions)
        title = next((title for name, title in _TITLES.values() if definitions[name] is inner), None)
        yield f"{prefix}{name}", f"[options](#{_anchor(title)})" if title else _type(value), default, meaning
        if inner and not title and inner is not definitions["stage"]:
            choices = value.get("anyOf", [value])
            mark = "[]" if any("items" in choice for choice in choices) else ""
            yield from _rows(inner, definitions, f"{prefix}{name}{mark}.")


def _type(value: Schema) -> str:
    """Name the types of a value in words; null and interpolations are left out."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(filter(None, map(_type, value["anyOf"]))))
    if "$ref" in value:
        return "" if value["$ref"].endswith("/interpolation") else "section"
    if "const" in value or "enum" in value:
        words = {str(word): word for word in reversed(value.get("enum", [value.get("const")]))}  # 2 and "2" are one
        return ", ".join(f"`{_plain(word)}`" for word in reversed(words.values()))
    types = value.get("type", "any")
    names = [types] if isinstance(types, str) else types
    return " or ".join(_type_name(name, value) for name in names if name != "null")


def _type_name(name: str, value: Schema) -> str:
    if name == "array":
        items = _type(value["items"]) if value.get("items") else ""
        return f"list of {items.replace('section', 'sections')}" if items and items != "any" else "list"
    bounds = [f" {sign} {value[key]:g}" for key, sign in _SIGNS.items() if key in value and abs(value[key]) < 1e6]
    return _WORDS.get(name, name) + ",".join(bounds)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _refused(section: Schema) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, value in section.get("properties", {}).items():
        if value.get("not") == {}:
            reasons.setdefault(value["description"].removeprefix(REFUSED), []).append(name)
    return reasons


def _options() -> Iterator[tuple[str, str]]:
    for action in build_parser()._actions:
        if action.dest != "help":
            value = "\\|".join(map(str, action.choices or ())) or (action.metavar if action.nargs != 0 else "")
            name = " ".join(filter(None, (", ".join(action.option_strings), str(value or ""))))
            yield name + ("..." if isinstance(action, argparse._AppendAction) else ""), action.help or ""


def _anchor(title: str) -> str:
    """Return the anchor of a heading on GitHub."""
    return re.sub(r"[^\w -]", "", title).replace(" ", "-")


def _escape_cell(text: str) -> str:
    """Escape what would end a cell, or start a tag outside of code."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
