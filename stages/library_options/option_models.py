"""Pydantic models of the options of TRL, PEFT, transformers and accelerate, built from options.json without torch.

`python -m stages.library_options.option_models` writes that file from the installed versions; a test compares the two.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import fnmatch
import inspect
import json
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, create_model, model_serializer, model_validator

from stages.base import Config, wrong_at
from stages.library_options.option_constraints import RANGES, find_conflict

OPTIONS_FILE = Path(__file__).with_name("options.json")

_CHECKPOINTS = "the pipeline saves checkpoints to resume from; set save_steps to say how often"
_LAST_MODEL = "the model after the last step is published, whatever its checkpoints score"
_LAUNCH = "use the stage's 'launch', which says how processes share the work"
_PUSH = "use a stage of kind push; a recipe contains no secrets"
_SEED = "use the recipe's or the stage's own 'seed'"

RESERVED = {
    "output_dir": "the store decides where results are",
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "do_train": "the stage always trains",
    "do_eval": "name evaluation data under 'data.eval'",
    "do_predict": "use a stage of kind lm_eval",
    "resume_from_checkpoint": "an interrupted step always resumes from its last complete checkpoint",
    "ignore_data_skip": "a resumed step always continues with the rows that it has not seen",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _PUSH),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _PUSH),
    **dict.fromkeys(("save_strategy", "save_total_limit", "save_only_model", "save_on_each_node"), _CHECKPOINTS),
    "restore_callback_states_from_checkpoint": _CHECKPOINTS,
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _LAST_MODEL),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"), _LAUNCH),
    "trust_remote_code": "set 'trust_remote_code' on the stage itself",
}
"""Fields of TRL's configs that a recipe cannot set under `train` -> reason or remedy."""

RESERVED_SFT = {
    "completion_only_loss": "use 'weights'; {prompt: 0, completion: 1} is completion-only loss",
    "assistant_only_loss": "use 'weights'; {prompt: 0, completion: 1} is loss on the answers only",
    "prompt_loss_weight": "use 'weights.prompt'",
    "completion_loss_weight": "use 'weights.completion'",
    **dict.fromkeys(
        ("loss_type", "label_smoothing_factor"), "an sft stage always has the weighted loss; see 'weights'"
    ),
    "packing_strategy": "examples are packed whole, by 'bfd'; the other strategies cut them in pieces",
    "average_tokens_across_devices": "the loss always counts the tokens of all ranks",
    "truncation_mode": "rows are truncated on the right",
    "eos_token": "the tokenizer's own EOS token is used",
    "chat_template_path": "the model's own chat template is used",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs"), "use 'data.format', which says how rows are read"),
}
"""Fields of SFTConfig that a recipe cannot set in addition to RESERVED."""

RESERVED_LORA = {
    "task_type": "a stage trains a causal language model",
    "peft_type": "the section is LoRA's",
    "inference_mode": "the stage always trains",
}
"""Fields of PEFT's LoraConfig that a recipe cannot set under `lora`."""

_FILE = "a file outside the recipe would not count in the step's fingerprint; write its options here"
_TPU = "a step runs on GPUs or CPUs"
_SHARD = "is not supported; use use_fsdp or use_deepspeed"

RESERVED_LAUNCH = {
    **dict.fromkeys(("module", "no_python"), "the pipeline starts a module of its own"),
    **dict.fromkeys(("quiet", "tee", "log_dir", "role"), "the pipeline keeps the step's log"),
    **dict.fromkeys(("config_file", "deepspeed_config_file"), _FILE),
    "multi_gpu": "num_processes implies it",
    "cpu": "a step uses GPUs if there are any, else CPUs",
    "gpu_ids": "a step gets num_processes free GPUs; set CUDA_VISIBLE_DEVICES to name those that it may use",
    "max_restarts": "run the recipe again to run a failed step again",
    "mixed_precision": "use train.bf16 or train.fp16",
    "gradient_accumulation_steps": "use train.gradient_accumulation_steps",
    "gradient_clipping": "use train.max_grad_norm",
    "mpirun_hostfile": "torch's launcher starts the processes, not MPI",
    **dict.fromkeys(("aws_access_key_id", "aws_secret_access_key"), "a recipe contains no secrets"),
    **dict.fromkeys(("tpu", "tpu_cluster", "no_tpu_cluster", "tpu_use_sudo", "vm", "env"), _TPU),
    **dict.fromkeys(("main_training_function", "downcast_bf16"), _TPU),
    **dict.fromkeys(("use_megatron_lm", "megatron_lm_*"), f"Megatron-LM {_SHARD}"),
    **dict.fromkeys(("use_parallelism_config", "parallelism_config_*"), f"a mesh of devices {_SHARD}"),
    "fp8_*": "training in 8-bit floating point is not supported",
}
"""Options of `accelerate launch` that a recipe cannot set under `launch`; `*` matches any ending."""

CODE_OPTIONS = ("custom_generate", "trust_remote_code")
"""Generation options that would fetch code and run it instead of the model's own generation."""

RESERVED_GENERATION = {
    **dict.fromkeys(CODE_OPTIONS, "it would run third-party code"),
    **dict.fromkeys(("pad_token_id", "use_cache", "transformers_version"), "lm-eval sets it itself"),
    **dict.fromkeys(("num_return_sequences", "return_dict_in_generate"), "lm-eval reads one answer, as plain text"),
    **dict.fromkeys(("output_*", "speculation_type"), "lm-eval reads one answer, as plain text"),
}
"""Fields of transformers' GenerationConfig that a recipe cannot set under `gen_kwargs`."""

LM_EVAL_OPTIONS = {
    "until": "Texts at which an answer ends.",
    "max_gen_toks": "The longest answer, in tokens.",
    "max_tokens": "Another name of max_gen_toks.",
    "max_completion_tokens": "Another name of max_gen_toks.",
}
"""Keys of `gen_kwargs` that are lm-eval's own (lm_eval.models.utils.normalize_gen_kwargs) -> help."""

_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict}


class Options(Config):
    """Options for a library. Only those that the recipe sets are passed on; the others keep the library's defaults."""

    reserved: ClassVar[dict[str, str]] = {}
    """Keys that cannot be set -> reason or remedy."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if conflict := find_conflict({name: getattr(self, name) for name in self.model_fields_set}):
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
def options(name: str) -> type[Options]:
    """Build the model of a class or command in options.json; all its fields are optional."""
    declared: dict[str, list[str]] = json.loads(OPTIONS_FILE.read_text())[name]
    patterns = {
        "SFTConfig": RESERVED | RESERVED_SFT,
        "DPOConfig": RESERVED,
        "LoraConfig": RESERVED_LORA,
        "BitsAndBytesConfig": {},
        "gen_kwargs": RESERVED_GENERATION,
        "launch": RESERVED_LAUNCH,
    }[name]
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
    """The type that accepts the values which `describe` writes as `kinds`."""
    if "any" in kinds:
        return Any
    literal: Any = typing.Literal
    choices = [kind.removeprefix("=") for kind in kinds if kind.startswith("=")]
    words = [choice for choice in choices if "#" not in choice]
    items = [kind.removeprefix("[]=") for kind in kinds if kind.startswith("[]=")]
    numbers = [int(word) for word in words if word.isdecimal()]  # YAML's 2 means '2'
    types: list[Any] = [_TYPES[kind] for kind in kinds if kind in _TYPES]
    types += [literal[*words, *numbers]] if words else []
    types += [list[literal[*items]]] if items else []
    patterns = (choice.replace("#", r"\d+") for choice in choices if "#" in choice)
    types += [typing.Annotated[str, StringConstraints(pattern=f"^{pattern}$")] for pattern in patterns]
    return typing.Union[*types, None]


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


def launch_actions() -> dict[str, argparse.Action]:
    """Return the options of `accelerate launch` by name, such as `num_processes`. argparse has no public list."""
    from accelerate.commands.launch import launch_command_parser

    actions: dict[str, argparse.Action] = {}
    for action in launch_command_parser()._actions:
        long_names = [name for name in action.option_strings if name.startswith("--")]
        if long_names and action.dest != "help":
            actions[long_names[0][2:].replace("-", "_")] = action
    return actions


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
    if action.nargs == 0 or getattr(action.type, "__name__", "") == "str_to_bool":
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
    return [name] if name in _TYPES else ["list" if name == "set" else "any"]


if __name__ == "__main__":
    OPTIONS_FILE.write_text(json.dumps(describe(), indent=1, sort_keys=True) + "\n")
