"""Pydantic models of the options of TRL, PEFT, transformers and accelerate, built from options.json without torch.

`python -m tests.stages.library_options.libraries` writes the JSON files; a test compares them with the libraries.
"""

import fnmatch
import json
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints, create_model, model_serializer, model_validator

from stages.base import Config, wrong_at
from stages.library_options.option_constraints import RANGES, RESERVED, find_conflict

OPTIONS_FILE = Path(__file__).with_name("options.json")
HELP_FILE = Path(__file__).with_name("option_help.json")

CODE_OPTIONS = ("custom_generate", "trust_remote_code")
"""Generation options that would fetch code and run it instead of the model's own generation."""

TYPES = {"int": int, "float": float, "bool": bool, "flag": bool, "str": str, "list": list, "dict": dict}


class Help(NamedTuple):
    """A library's default of an option, None if it has none or computes it, and the first sentence of its help."""

    default: Any
    text: str


class Options(Config):
    """Options for a library. Only those that the recipe sets are passed on; the others keep the library's defaults."""

    reserved: ClassVar[dict[str, str]] = {}
    """Keys that cannot be set -> reason or remedy."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if conflict := find_conflict(
            type(self).__name__, {name: getattr(self, name) for name in self.model_fields_set}
        ):
            raise wrong_at(*conflict)
        return self

    @model_serializer
    def _only_set(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


class ModelInit(Options):
    """Options of transformers' from_pretrained for the trained model, without those that could load pickled weights."""

    attn_implementation: (
        Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
        | Annotated[str, StringConstraints(pattern=r"/")]
        | None
    ) = None
    """An implementation of transformers, or kernels on the hub, ORG/NAME, which need the stage's trust_remote_code."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """dtype of the weights; float32 unless it is set."""
    use_kernels: bool | None = None
    """Whether kernels from the hub replace layers; they need the stage's trust_remote_code."""


@cache
def option_help(name: str) -> dict[str, Help]:
    """Return option -> help of a class or command in options.json."""
    return {key: Help(*entry) for key, entry in json.loads(HELP_FILE.read_text())[name].items()}


@cache
def option_kinds(name: str) -> dict[str, list[str]]:
    """Return option -> kinds of its values, of a class or command; see `_type_of`. A `flag` has no value in a shell."""
    return dict(json.loads(OPTIONS_FILE.read_text())[name])


@cache
def options(name: str) -> type[Options]:
    """Build the model of a class or command in options.json; all its fields are optional."""
    declared = option_kinds(name)
    patterns = RESERVED.get(name, {}) | (RESERVED["train"] if name in ("SFTConfig", "DPOConfig") else {})
    names = [*declared, *(pattern for pattern in patterns if "*" not in pattern)]
    reserved = {key: reason for pattern, reason in patterns.items() for key in fnmatch.filter(names, pattern)}
    fields: dict[str, Any] = {
        key: (_type_of(kinds), Field(default=None, **RANGES.get(key, {})))
        for key, kinds in declared.items()
        if key not in reserved
    }
    if "model_init_kwargs" in fields:
        fields["model_init_kwargs"] = (ModelInit | None, None)
    model = create_model(name, __base__=Options, **fields)
    model.reserved = reserved
    return model


def _type_of(kinds: list[str]) -> Any:
    """A kind is the name of a type, `=` and a choice (# is a number), or `[]=` and a choice for a list's items."""
    if "any" in kinds:
        return Any
    literal: Any = typing.Literal
    choices = [kind.removeprefix("=") for kind in kinds if kind.startswith("=")]
    words = [choice for choice in choices if "#" not in choice]
    items = [kind.removeprefix("[]=") for kind in kinds if kind.startswith("[]=")]
    numbers = [int(word) for word in words if word.isdecimal()]  # YAML's 2 means '2'
    types: list[Any] = [TYPES[kind] for kind in kinds if kind in TYPES]
    types += [literal[*words, *numbers]] if words else []
    types += [list[literal[*items]]] if items else []
    patterns = (choice.replace("#", r"\d+") for choice in choices if "#" in choice)
    types += [typing.Annotated[str, StringConstraints(pattern=f"^{pattern}$")] for pattern in patterns]
    return typing.Union[*types, None]
