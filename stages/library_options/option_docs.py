"""What TRL, PEFT, transformers and accelerate say of their own options, for the schema and the reference of recipes.

`python -m stages.library_options.option_docs` writes it, `option_help.json`, from the installed versions;
a test holds it against them.
Nothing that reads, plans or runs a recipe reads it.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stages.library_options.option_models import Options, flag, options

HELP = Path(__file__).with_name("option_help.json")

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
"""Class or command, as stages.options calls it -> what people call it, and its page."""

OF_THE_STAGE = {
    "bf16": "Unless it is set: where the GPU has bfloat16 and fp16 is not set.",
    "report_to": "Unless it is set, none.",
    "run_name": "Unless it is set: RECIPE/STEP.",
    "disable_tqdm": "Unless it is set, true: the console shows how far a step is.",
    "dataloader_pin_memory": "Unless it is set: where there is a GPU.",
    "model_init_kwargs": "Here: attn_implementation, dtype (float32 unless it is set) and use_kernels, no others.",
    "logging_nan_inf_filter": "Unless it is set, false: a loss that is no number is to be seen.",
}
"""Fields of TRL's configs that mean something else in a stage, as stages.training says, and what."""

_OF_LM_EVAL = {
    "until": "Texts at which an answer ends.",
    "max_gen_toks": "The longest answer, in tokens.",
    "max_tokens": "Another name of max_gen_toks.",
    "max_completion_tokens": "Another name of max_gen_toks.",
}
"""lm_eval.models.utils.normalize_gen_kwargs says this in code alone."""
_LONGEST = 300
"""Characters of one option's help."""
_ARGUMENT = re.compile(r"^ {8}(\w+):? ?\(.*?\):?\n((?: {12}.*\n|\n)+)", re.MULTILINE)
"""An argument in a docstring of transformers, and the lines below it."""


class Help(NamedTuple):
    """What a library says of one option."""

    default: Any
    """Of the library; None where it has none, or finds the value itself."""
    text: str
    """The first sentence of the help; empty where there is none."""


@cache
def option_help(name: str) -> dict[str, Help]:
    """Option of the class or command `name`, as stages.options calls it -> what its library says of it."""
    said = {key: Help(*each) for key, each in json.loads(HELP.read_text())[name].items()}
    for key, text in OF_THE_STAGE.items() if name in ("SFTConfig", "DPOConfig") else ():
        said[key] = Help(None, f"{said[key].text} {text}")
    return said


def library_of(model: type) -> str | None:
    """The class or command, as stages.options calls it, whose options `model` takes."""
    bases = (base.__name__ for base in model.__mro__ if issubclass(base, Options))
    return next((name for name in bases if name in LIBRARIES), None)


def collect() -> dict[str, dict[str, Help]]:
    """Class or command -> option -> what the installed version says of it. Imports all of them."""
    from accelerate.commands.launch import launch_command_parser
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import DPOConfig, SFTConfig

    documented = _documented(BitsAndBytesConfig)
    parameters = inspect.signature(BitsAndBytesConfig).parameters
    of_generation = _documented(GenerationConfig) | _OF_LM_EVAL
    said = {
        **{cls.__name__: _of_fields(cls) for cls in (SFTConfig, DPOConfig, LoraConfig)},
        "BitsAndBytesConfig": {name: Help(each.default, documented.get(name, "")) for name, each in parameters.items()},
        "gen_kwargs": {name: Help(None, of_generation.get(name, "")) for name in options("gen_kwargs").model_fields},
        "launch": {
            flag(action): Help(action.default or None, _first_sentence(action.help or ""))
            for action in launch_command_parser()._actions
            if action.option_strings and action.dest != "help"
        },
    }
    return {name: {key: said[name][key] for key in options(name).model_fields} for name in LIBRARIES}


def _of_fields(cls: type) -> dict[str, Help]:
    found = {}
    for field in dataclasses.fields(cls):
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        default = made if isinstance(made, bool | int | float) or (made and isinstance(made, str | list)) else None
        found[field.name] = Help(default, _first_sentence(field.metadata.get("help", "")))
    return found


def _documented(cls: type) -> dict[str, str]:
    """The arguments that a class's docstring explains."""
    return {name: _first_sentence(text) for name, text in _ARGUMENT.findall(f"{cls.__doc__}\n")}


def _first_sentence(text: str) -> str:
    """Without the markup of links, in one line."""
    text = re.sub(r"</?a\b.*?>", "", text)
    text = re.sub(r"\[`?~?(.*?)`?\](\(.*?\))?", r"`\1`", " ".join(text.split()))
    end = re.search(r"(?<!e\.g)(?<!i\.e)(?<!etc)\.(?= [A-Z`]|$)", text)
    sentence = text[: end.end()] if end else text
    return sentence if len(sentence) <= _LONGEST else sentence[: _LONGEST - 4].rsplit(" ", 1)[0] + " ..."


if __name__ == "__main__":
    HELP.write_text(json.dumps(collect(), indent=1, sort_keys=True) + "\n")
