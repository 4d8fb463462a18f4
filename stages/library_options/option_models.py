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

OPTIONS_FILE = Path(__file__).with_name("options.json")
HELP_FILE = Path(__file__).with_name("option_help.json")

CODE_OPTIONS = ("custom_generate", "trust_remote_code")
"""Generation options that would fetch code and run it instead of the model's own generation."""

RULES: dict[str, Any] = json.loads(Path(__file__).with_name("option_rules.json").read_text())
"""Constraints that the libraries check only when training starts, so that a recipe is checked before. These are the
likeliest mistakes, not all: the libraries' own checks still run.

- `reserved`: class or command in options.json, or `train` for both configs of TRL -> an option that a recipe cannot
  set, where `*` matches any ending -> reason or remedy;
- `ranges`: option -> range of its number, as arguments of pydantic's Field;
- `conflicts`: option, values of it, another option, values of that with which they do not work, the problem;
- `checked_by_recipe`: options of `train` that work on every machine. Only others need TRL's own checks, which take
  seconds to import;
- `exclusive`: options of which at most one may be set;
- `refused_values`: class -> option -> value that has no effect or fails once training starts -> reason;
- `only_with`: option -> another option, and the values of that without which it has no effect; none if any will do;
- `scheduler_options`, `scheduler_needs`: value of lr_scheduler_type -> keys that lr_scheduler_kwargs may have; keys of
  which it must have one;
- `optimizer_packages`: value of optim -> the module that it needs.
"""
RESERVED: dict[str, dict[str, str]] = RULES["reserved"]

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
        if conflict := _find_conflict(
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


def _find_conflict(name: str, options: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first option of the class `name` that does not fit the others, and the problem; None if all fit."""
    for key, reasons in RULES["refused_values"].get(name, {}).items():
        if str(options.get(key)) in reasons:
            return key, f"cannot be {options[key]}: {reasons[str(options[key])]}"
    for key, (other, values) in RULES["only_with"].items():
        selected = options.get(other) or []
        selected = selected if isinstance(selected, list) else [selected]
        if options.get(key) and not (set(selected) & set(values) if values else selected):
            return key, f"has no effect unless {other} is {' or '.join(values) or 'set'}; set that, or leave this out"
    scheduler = options.get("lr_scheduler_type") or "linear"
    scheduler_keys = list(options.get("lr_scheduler_kwargs") or {})
    needs = RULES["scheduler_needs"].get(scheduler, scheduler_keys)
    if needs and not {*needs} & {*scheduler_keys}:
        return "lr_scheduler_type", f"{scheduler} needs lr_scheduler_kwargs with {' or '.join(needs)}"
    known = RULES["scheduler_options"].get(scheduler, scheduler_keys)
    for key in (key for key in scheduler_keys if key not in known):
        return f"lr_scheduler_kwargs.{key}", f"is no option of {scheduler}, which has {', '.join(known) or 'none'}"
    for first, second in RULES["exclusive"]:
        if options.get(first) and options.get(second):
            return second, f"cannot be set together with {first}; leave one out"
    for option, values, other, refused, problem in RULES["conflicts"]:
        if options.get(option) in values and (wrong := {*(options.get(other) or [])} & {*refused}):
            return option, problem.format(min(wrong))
    for name in ("logging_steps", "eval_steps", "warmup_steps"):
        steps = options.get(name) or 0
        if steps > 1 and steps != int(steps):
            return name, f"is {steps}; set a whole number of steps, or a fraction of all steps below 1"
    if scheduler in ("reduce_lr_on_plateau", "greedy") and options.get("eval_strategy", "no") == "no":
        return "lr_scheduler_type", f"{scheduler} follows the evaluation loss; set eval_strategy"
    for kernel in ("fused_linear_cross_entropy", "cross_entropy"):
        if (options.get("liger_kernel_config") or {}).get(kernel):
            return f"liger_kernel_config.{kernel}", "would compute another loss than the stage's; leave it out"
    if isinstance(options.get("target_modules"), str) and options.get("layers_to_transform") is not None:
        return "layers_to_transform", "has no effect if target_modules is one text; make that a list"
    return None


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
        key: (_type_of(kinds), Field(default=None, **RULES["ranges"].get(key, {})))
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


if typing.TYPE_CHECKING:
    SFTOptions = Options
    DPOOptions = Options
    LoraOptions = Options
    QuantizationOptions = Options
    LaunchOptions = Options
    GenerationOptions = Options
else:
    SFTOptions, DPOOptions, LoraOptions = map(options, ("SFTConfig", "DPOConfig", "LoraConfig"))
    QuantizationOptions, LaunchOptions, GenerationOptions = map(options, ("BitsAndBytesConfig", "launch", "gen_kwargs"))
