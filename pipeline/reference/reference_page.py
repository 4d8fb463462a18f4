"""The page docs/reference.md: every key of a recipe and every option of the command, off the schema and the parser.

`python -m pipeline.reference.reference_page` writes it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator

from pipeline.arguments import build_parser
from pipeline.reference.json_schema import REFUSED, ROOT, Schema, schema, section, told_default
from stages.library_options.option_docs import LIBRARIES

PAGE = ROOT / "docs" / "reference.md"

_INTRODUCTION = """\
# Reference

<!-- written by `make schema`; edit the docstrings in pipeline/recipe.py and stages/*/config.py, not this file -->

Every key of a recipe and every option of `run-recipe`, off the code that reads them. An unknown key is an error that
names the nearest right one. In an editor with a YAML language server (VS Code: the extension YAML by Red Hat) the same
is said of each key as you write, in every recipe with this line, the path being relative to the recipe:

    # yaml-language-server: $schema=./recipe.schema.json

`a.b` is the key `b` in the section `a`, `a[].b` that of each item of the list `a`. "required" is what has to be there,
in the recipe or in one that it `extends`; all else may be left out, and a dash stands where that is the default. Any
value may be a reference: `${stages.wit.seed}` is the value under that key, `${matrix.prompt}` the cell's.
"""

_TOP = """\
Names of recipes and stages are of letters, digits, `_`, `-` and `.`, and begin with a letter. Paths are relative to the
recipe's file. [Grids](grid.md) says more of `matrix`.
"""

_MORE = {
    "sft": "[The README](../README.md#your-own-model-and-data) shows the formats of rows.",
    "dpo": "[The README](../README.md#your-own-model-and-data) shows the formats of rows.",
    "lm_eval": "One step for each model. Tasks are those of [lm-evaluation-harness]"
    "(https://github.com/EleutherAI/lm-evaluation-harness/tree/main/lm_eval/tasks), the options of its [command]"
    "(https://github.com/EleutherAI/lm-evaluation-harness/blob/main/docs/interface.md). More: [evaluations]"
    "(evaluation.md).",
    "judge": "One step for each model. [MT-Bench](https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge) and"
    " [AlpacaEval](https://github.com/tatsu-lab/alpaca_eval). More: [evaluations](evaluation.md).",
    "sensitivity": "One step for each model. More: [evaluations](evaluation.md).",
    "characteristics": "More: [reports](report.md).",
    "report": "More: [reports](report.md).",
    "push": "More: [models](models.md).",
}
"""Kind -> where to read on."""

_OPTIONS = {
    "SFTConfig": ("SFTConfig", "train of sft"),
    "DPOConfig": ("DPOConfig", "train of dpo"),
    "LoraConfig": ("LoraConfig", "lora"),
    "BitsAndBytesConfig": ("Quantization", "quantization"),
    "launch": ("Launch", "launch"),
    "gen_kwargs": ("gen_kwargs", "options.gen_kwargs"),
}
"""Class or command, as stages.options calls it -> the schema's definition of the section, and its title here."""
_SHARED = "train of sft and of dpo"
_TRAINING_ARGUMENTS = (
    "[transformers' TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer"
    "#transformers.TrainingArguments)"
)

_WORDS = {"string": "text", "integer": "whole number", "boolean": "true, false", "object": "section"}

_CALL = """\
    run-recipe RECIPE [option]...

What ends in ... may be given several times.
"""
_COMMAND = """\
Exit codes: 0 done; 1 a stage failed (those that do not need it have still run), or `--verify` found something; 2 the
recipe or the command line is wrong; 130 interrupted.
"""

Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""


def page() -> str:
    """The page, as Markdown."""
    made = schema()
    definitions = made["definitions"]
    of_any = {"kind": definitions["stage"]["properties"]["kind"]}
    of_any["resources"] = definitions["ReportStage"]["properties"]["resources"]
    parts = [_INTRODUCTION]
    parts += ["## A recipe\n", _TOP, _table(_rows(made, made["else"], definitions))]
    parts += ["## Every stage\n", _table(_rows({"properties": of_any}, {"required": ["kind"]}, definitions))]
    for rule in definitions["stage"]["allOf"]:
        parts += _kind(rule, definitions)
    parts += _options(definitions)
    parts += [
        "## The command\n",
        "    run-recipe RECIPE [option]...\n",
        "What ends in ... may be given several times.\n",
        _command(build_parser()),
        _COMMAND,
    ]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _kind(rule: Schema, definitions: Schema) -> list[str]:
    """What is said of one kind of stage, whose `rule` stands in the schema's `stage`."""
    kind = rule["if"]["properties"]["kind"]["const"]
    ref, needed = rule["then"].get("allOf", [rule["then"], {}])
    found = definitions[ref["$ref"].rpartition("/")[2]]
    own = {name: value for name, value in found["properties"].items() if name not in ("kind", "resources")}
    return [
        f"## {kind}\n",
        f"{found['description']} {_MORE.get(kind, '')}\n",
        _table(_rows({"properties": own}, needed, definitions)),
    ]


def _rows(found: Schema, needed: Schema, definitions: Schema, prefix: str = "") -> Iterator[Row]:
    """The keys of a section and of those within it, but for the options of libraries."""
    for name, value in found["properties"].items():
        if "not" in value and "type" not in value:
            continue
        default = "required" if name in needed.get("required", ()) else _default(value)
        meaning = value.get("description", "").removesuffix(told_default(value))
        inner = section(value, definitions)
        library = _library(inner, definitions)
        kind = f"[options](#{_anchor(_OPTIONS[library][1])})" if library else _type(value)
        yield f"{prefix}{name}", kind, default, meaning
        if inner and not library:
            mark, below = "", needed.get("properties", {}).get(name, {})
            for key, its_mark in (("items", "[]"), ("additionalProperties", ".NAME")):
                if any(isinstance(choice.get(key), dict) for choice in value.get("anyOf", [value])):
                    mark, below = its_mark, below.get(key, {})
            yield from _rows(inner, below, definitions, f"{prefix}{name}{mark}.")


def _library(found: Schema | None, definitions: Schema) -> str | None:
    """Whose options a section holds."""
    return next((name for name, (definition, _) in _OPTIONS.items() if definitions[definition] is found), None)


def _type(value: Schema) -> str:
    """What may stand there, in the words of this project; that it may be null or a reference goes without saying."""
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(filter(None, map(_type, value["anyOf"]))))
    if "$ref" in value:
        return "" if value["$ref"].endswith("/reference") else "section"
    if "const" in value or "enum" in value:
        words = value.get("enum", [value.get("const")])
        listed = [word for word in words if str(word) not in map(str, words[: words.index(word)])]
        return ", ".join(f"`{_plain(word)}`" for word in listed)
    kinds = value.get("type", "any")
    names = [kinds] if isinstance(kinds, str) else [kind for kind in kinds if kind != "null"]
    return " or ".join(_of_type(name, value) for name in names if name != "null")


def _of_type(name: str, value: Schema) -> str:
    if name == "array":
        inner = _type(value["items"]) if value.get("items") else ""
        return f"list of {inner.replace('section', 'sections')}" if inner and inner != "any" else "list"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f" {sign} {value[key]:g}" for key, sign in signs.items() if key in value and abs(value[key]) < 1e6]
    return _WORDS.get(name, name) + ",".join(bounds)


def _default(value: Schema) -> str:
    return f"`{_plain(value['default'])}`" if "default" in value else "-"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _options(definitions: Schema) -> list[str]:
    """The options of libraries. What `train` of sft and of dpo share is listed once."""
    tables = {
        library: list(_rows(definitions[name], {"required": ["num_processes"]}, definitions))
        for library, (name, _) in _OPTIONS.items()
    }
    shared = [row for row in tables["SFTConfig"] if row in tables["DPOConfig"]]
    parts = []
    for library, (definition, title) in _OPTIONS.items():
        name, address = LIBRARIES[library]
        with_shared = f", beside [those that both kinds take](#{_anchor(_SHARED)})" if "train" in title else ""
        own = [row for row in tables[library] if not with_shared or row not in shared]
        parts += [f"## {title}\n", f"Handed on to [{name}]({address}){with_shared}.\n", _table(own)]
        parts += [_refused(definitions[definition])]
        if library == "DPOConfig":
            parts += [f"## {_SHARED}\n", f"Most are those of {_TRAINING_ARGUMENTS}.\n", _table(shared)]
    return parts


def _anchor(title: str) -> str:
    """Where GitHub's links to a heading point."""
    return re.sub(r"[^\w -]", "", title).replace(" ", "-")


def _refused(found: Schema) -> str:
    """The keys that a section refuses, by reason."""
    reasons: dict[str, list[str]] = {}
    for name, value in found["properties"].items():
        if value.get("description", "").startswith(REFUSED):
            reasons.setdefault(value["description"].removeprefix(REFUSED), []).append(f"`{name}`")
    lines = [f"| {', '.join(names)} | {_cell(why)} |" for why, names in reasons.items()]
    return "\n".join(["Refused:\n", "| option | why |", "|---|---|", *lines, ""]) if lines else ""


def _table(rows: Iterator[Row] | list[Row]) -> str:
    lines = [f"| `{key}` | {_cell(kind)} | {_cell(default)} | {_cell(text)} |" for key, kind, default, text in rows]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines, ""])


def _cell(text: str) -> str:
    """Text in a table: what ends a cell, or begins a tag outside of code, is written out."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts))


def _command(parser: argparse.ArgumentParser) -> str:
    lines = []
    for action in parser._actions:
        if action.dest == "help":
            continue
        name = ", ".join(action.option_strings)
        choices = "\\|".join(map(str, action.choices or ()))
        value = choices or (action.metavar if action.nargs != 0 else "") or ""
        many = "..." if isinstance(action, argparse._AppendAction) else ""
        lines.append(f"| `{' '.join(filter(None, (name, str(value))))}{many}` | {_cell(action.help or '')} |")
    return "\n".join(["| option | what it does |", "|---|---|", *lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
