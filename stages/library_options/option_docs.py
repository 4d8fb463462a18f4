"""The libraries' own help texts for their options, shown in the recipe schema and reference.

`python -m stages.library_options.option_docs` writes them to option_help.json from the installed versions; a test
compares the two. Reading, planning and running a recipe do not need them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stages.library_options.option_models import LM_EVAL_OPTIONS, Options, launch_actions, options

HELP_FILE = Path(__file__).with_name("option_help.json")

LIBRARIES = {
    "SFTConfig": ("TRL's SFTConfig", "https://huggingface.co/docs/trl/sft_trainer#trl.SFTConfig"),
    "DPOConfig": ("TRL's DPOConfig", "https://huggingface.co/docs/trl/dpo_trainer#trl.DPOConfig"),
    "LoraConfig": ("PEFT's LoraConfig", "https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig"),
    "BitsAndBytesConfig": (
        "transformers' BitsAndBytesConfig",
        "https://huggingface.co/docs/transformers/main_classes/quantization#transformers.BitsAndBytesConfig",
    ),
    "gen_kwargs": (
        "transformers' GenerationConfig",
        "https://huggingface.co/docs/transformers/main_classes/text_generation#transformers.GenerationConfig",
    ),
    "launch": (
        "accelerate launch",
        "https://huggingface.co/docs/accelerate/package_reference/cli#accelerate-launch",
    ),
}
"""Class or command, as in options.json -> its usual name, and the address of its documentation."""

STAGE_NOTES = {
    "activation_checkpointing": "Unless it is set: as gradient_checkpointing, which is true by default.",
    "bf16": "Unless it is set: true if the GPU has bfloat16 and fp16 is not set.",
    "report_to": "Unless it is set: none.",
    "run_name": "Unless it is set: RECIPE/STEP.",
    "disable_tqdm": "Unless it is set: true, because the console shows the progress of each step.",
    "dataloader_pin_memory": "Unless it is set: true if there is a GPU.",
    "model_init_kwargs": "Only attn_implementation, dtype (float32 unless it is set) and use_kernels.",
    "logging_nan_inf_filter": "Unless it is set: false, so that a loss which is not a number shows.",
}
"""Fields of TRL's configs whose default or meaning differs in a stage (stages.training.loop.arguments) -> how."""

_MAX_LENGTH = 300
"""Longest help text of an option, in characters."""
_ARGUMENT = re.compile(r"^ {8}(\w+):? ?\(.*?\):?\n((?: {12}.*\n|\n)+)", re.MULTILINE)
"""An argument in a docstring of transformers, with its indented text."""


class Help(NamedTuple):
    """A library's default and help text of one option."""

    default: Any
    """None if the library has no default or computes it."""
    text: str
    """First sentence of the help; empty if there is none."""


@cache
def option_help(name: str) -> dict[str, Help]:
    """Return option -> help of a class or command in options.json."""
    texts = {key: Help(*entry) for key, entry in json.loads(HELP_FILE.read_text())[name].items()}
    for key, note in STAGE_NOTES.items() if name in ("SFTConfig", "DPOConfig") else ():
        texts[key] = Help(None, f"{texts[key].text} {note}")
    return texts


def library_of(model: type) -> str | None:
    """Return the class or command in options.json whose options `model` has; None if there is none."""
    bases = (base.__name__ for base in model.__mro__ if issubclass(base, Options))
    return next((name for name in bases if name in LIBRARIES), None)


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


def _help_of_fields(cls: type) -> dict[str, Help]:
    texts = {}
    for field in dataclasses.fields(cls):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = value if isinstance(value, bool | int | float) or (value and isinstance(value, str | list)) else None
        texts[field.name] = Help(default, _first_sentence(field.metadata.get("help", "")))
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
    HELP_FILE.write_text(json.dumps(collect(), indent=1, sort_keys=True) + "\n")
