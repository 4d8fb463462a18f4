"""What the installed versions of TRL, PEFT, transformers and accelerate declare, for the JSON files beside the options.

`python -m tests.stages.library_options.libraries` writes options.json and option_help.json; tests compare them.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import json
import re
import types
import typing
from typing import Any

from docs.generator.json_schema import LIBRARIES, STAGE_NOTES
from stages.library_options.option_models import HELP_FILE, OPTIONS_FILE, TYPES, Help, option_kinds, options

LM_EVAL_OPTIONS = {
    "until": "Texts at which an answer ends.",
    "max_gen_toks": "The longest answer, in tokens.",
    "max_tokens": "Another name of max_gen_toks.",
    "max_completion_tokens": "Another name of max_gen_toks.",
}
"""Keys of `gen_kwargs` that are lm-eval's own (lm_eval.models.utils.normalize_gen_kwargs) -> help."""

_MAX_LENGTH = 300
"""Longest help text of an option, in characters."""
_ARGUMENT = re.compile(r"^ {8}(\w+):? ?\(.*?\):?\n((?: {12}.*\n|\n)+)", re.MULTILINE)
"""An argument in a docstring of transformers, with its indented text."""


def describe() -> dict[str, dict[str, list[str]]]:
    """Describe the installed libraries: class or command -> option -> kinds of values.

    A kind is the name of a type, `=` and a choice (# stands for a number), or `[]=` and a choice for the items of a
    list.
    """
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import DPOConfig, SFTConfig

    description = {cls.__name__: _describe_fields(cls) for cls in (SFTConfig, DPOConfig, LoraConfig)}
    parameters = inspect.signature(BitsAndBytesConfig).parameters.values()
    description["BitsAndBytesConfig"] = {
        parameter.name: ["any" if parameter.default is None else type(parameter.default).__name__]
        for parameter in parameters
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    description["gen_kwargs"] = {name: ["any"] for name in sorted((*fields, *LM_EVAL_OPTIONS))}
    description["launch"] = {name: _kinds_of_action(action) for name, action in launch_actions().items()}
    return description


def _describe_fields(cls: type) -> dict[str, list[str]]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: _narrow(_kinds_of_hint(hints[field.name]), _documented_choices(field))
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.name)
        if field.init
    }


def _documented_choices(field: dataclasses.Field[Any]) -> list[str]:
    """The choices that a field's metadata or help text lists."""
    text = re.search(r"Possible values are:? (.*?)\.(\s|$)", field.metadata.get("help", ""))
    return list(field.metadata.get("choices", re.findall(r"`'?(\w+)'?`", text[1]) if text else ()))


def _narrow(kinds: list[str], choices: list[str]) -> list[str]:
    """Narrow text, or a list, to `choices` if there are any."""
    wide, prefix = ("list", "[]=") if "list" in kinds else ("str", "=")
    if not choices or wide not in kinds:
        return kinds
    return [kind for kind in kinds if kind != wide] + [f"{prefix}{choice}" for choice in choices]


def _kinds_of_action(action: argparse.Action) -> list[str]:
    """The kinds of a command line option. An untyped one may be text, or true or false."""
    if action.choices:
        return [f"={choice}" for choice in action.choices]
    if action.nargs == 0:
        return ["flag"]
    if getattr(action.type, "__name__", "") == "str_to_bool":
        return ["bool"]
    return [action.type.__name__] if action.type in (int, float, bool) else ["bool", "str"]


def _kinds_of_hint(hint: Any) -> list[str]:
    """The kinds that a type hint accepts; `any` if it is wider than YAML's types."""
    if hint is type(None):
        return []
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = list(dict.fromkeys(kind for part in typing.get_args(hint) for kind in _kinds_of_hint(part)))
        choices = [kind for kind in kinds if kind.startswith("=")]
        plain = sorted(kind for kind in kinds if kind not in choices and not (choices and kind == "str"))
        return ["any"] if "any" in kinds else plain + choices
    if typing.get_origin(hint) is typing.Literal:
        values = typing.get_args(hint)
        choices = ["=" + re.sub(r"\[number.*?\]", "#", value) for value in values if isinstance(value, str)]
        return sorted({type(value).__name__ for value in values if not isinstance(value, str)}) + choices
    if isinstance(hint, type) and issubclass(hint, str) and issubclass(hint, enum.Enum):
        return [f"={choice.value}" for choice in hint]
    name = getattr(typing.get_origin(hint) or hint, "__name__", "")
    return [name] if name in TYPES else ["list" if name == "set" else "any"]


def collect() -> dict[str, dict[str, Help]]:
    """Collect the help of the installed libraries: class or command -> option -> help."""
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import DPOConfig, SFTConfig

    quantization_texts = _argument_texts(BitsAndBytesConfig)
    parameters = inspect.signature(BitsAndBytesConfig).parameters
    generation_texts = _argument_texts(GenerationConfig) | LM_EVAL_OPTIONS
    collected = {
        **{cls.__name__: _help_of_fields(cls) for cls in (SFTConfig, DPOConfig, LoraConfig)},
        "BitsAndBytesConfig": {
            name: Help(parameter.default, quantization_texts.get(name, "")) for name, parameter in parameters.items()
        },
        "gen_kwargs": {name: Help(None, generation_texts.get(name, "")) for name in options("gen_kwargs").model_fields},
        "launch": {
            name: Help(action.default or None, _first_sentence(action.help or ""))
            for name, action in launch_actions().items()
        },
    }
    return {name: {key: collected[name][key] for key in options(name).model_fields} for name in LIBRARIES}


def launch_actions() -> dict[str, argparse.Action]:
    """Return the options of `accelerate launch` by name, such as `num_processes`. argparse has no public list."""
    from accelerate.commands.launch import launch_command_parser

    actions: dict[str, argparse.Action] = {}
    for action in launch_command_parser()._actions:
        long_names = [name for name in action.option_strings if name.startswith("--")]
        if long_names and action.dest != "help":
            actions[long_names[0][2:].replace("-", "_")] = action
    return actions


def _help_of_fields(cls: type) -> dict[str, Help]:
    from transformers import TrainingArguments

    texts = {}
    for field in dataclasses.fields(cls):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = value if isinstance(value, bool | int | float) or (value and isinstance(value, str | list)) else None
        texts[field.name] = Help(default, _first_sentence(field.metadata.get("help", "")))
    if issubclass(cls, TrainingArguments):
        texts |= {name: Help(None, f"{texts[name].text} {note}") for name, note in STAGE_NOTES.items()}
    return texts


def _argument_texts(cls: type) -> dict[str, str]:
    """Argument -> first sentence of its text in the class's docstring."""
    return {name: _first_sentence(text) for name, text in _ARGUMENT.findall(f"{cls.__doc__}\n")}


def _first_sentence(text: str) -> str:
    """Return the first sentence on one line, without the markup of links."""
    text = re.sub(r"</?a\b.*?>", "", text)
    text = re.sub(r"\[`?~?(.*?)`?\](\(.*?\))?", r"`\1`", " ".join(text.split()))
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)\.(?= [A-Z`]|$)", text)
    sentence = text[: end.end()] if end else text
    return sentence if len(sentence) <= _MAX_LENGTH else sentence[: _MAX_LENGTH - 4].rsplit(" ", 1)[0] + " ..."


if __name__ == "__main__":
    OPTIONS_FILE.write_text(json.dumps(describe(), indent=1, sort_keys=True) + "\n")
    options.cache_clear()
    option_kinds.cache_clear()
    HELP_FILE.write_text(json.dumps(collect(), indent=1, sort_keys=True) + "\n")
