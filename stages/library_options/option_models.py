"""Config models of what TRL, PEFT, transformers and accelerate take, made from a list of their fields, so that checking
needs no torch.

`python -m stages.library_options.option_models` writes the list, `options.json`, from the
installed versions; a test holds it against them.
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
from stages.library_options.option_constraints import BOUNDS, misfit

LIST = Path(__file__).with_name("options.json")

_OWN_CHECKPOINTS = "checkpoints serve to go on after an interruption; save_steps says how often, the rest is given"
_LAST_MODEL = "the model after the last step is published; evaluation data choose none of its checkpoints"
_BY_LAUNCH = "say how processes share the work under the stage's 'launch'"
_NO_HUB = "a stage of kind push uploads a finished model; a recipe holds no secrets"

RESERVED = {
    "output_dir": "the store decides where results lie",
    "seed": "use the recipe's or the stage's own 'seed'",
    "data_seed": "use the recipe's or the stage's own 'seed'",
    "do_train": "a stage trains by definition",
    "do_eval": "name evaluation data under 'data.eval'",
    "do_predict": "use a stage of kind lm_eval",
    "resume_from_checkpoint": "a step goes on from its last complete checkpoint by itself",
    "ignore_data_skip": "a step goes on with the rows that it had not seen",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _NO_HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _NO_HUB),
    **dict.fromkeys(("save_strategy", "save_total_limit", "save_only_model", "save_on_each_node"), _OWN_CHECKPOINTS),
    "restore_callback_states_from_checkpoint": _OWN_CHECKPOINTS,
    **dict.fromkeys(("load_best_model_at_end", "metric_for_best_model", "greater_is_better"), _LAST_MODEL),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"), _BY_LAUNCH),
    "trust_remote_code": "set 'trust_remote_code' on the stage itself",
}
"""Fields of TRL's configs that a recipe cannot set under `train`, and what to use in their place."""

RESERVED_SFT = {
    "completion_only_loss": "say it by 'weights'; {prompt: 0, completion: 1} is completion-only loss",
    "assistant_only_loss": "say it by 'weights'; {prompt: 0, completion: 1} is loss on the answers only",
    "prompt_loss_weight": "use 'weights.prompt'",
    "completion_loss_weight": "use 'weights.completion'",
    "loss_type": "an sft stage has one loss, the weighted one; see 'weights'",
    "label_smoothing_factor": "an sft stage has one loss, the weighted one; see 'weights'",
    "packing_strategy": "examples are packed whole, by 'bfd'; the other strategies cut them in pieces",
    "average_tokens_across_devices": "the loss counts tokens over all ranks",
    "truncation_mode": "rows are cut on the right",
    "eos_token": "the tokenizer's own EOS token is used",
    "chat_template_path": "the model's own chat template is used",
    "dataset_text_field": "say how rows are read by 'data.format'",
    "dataset_kwargs": "say how rows are read by 'data.format'",
}
"""Further fields of SFTConfig."""

RESERVED_LORA = {
    "task_type": "a stage trains a causal language model",
    "peft_type": "the section is LoRA's",
    "inference_mode": "a stage trains by definition",
}
"""Fields of PEFT's LoraConfig that a recipe cannot set under `lora`."""

_OWN_COMMAND = "the pipeline calls a module of its own"
_OWN_LOG = "the pipeline keeps the step's log"
_OUTSIDE = "a file outside the recipe is no part of a step's fingerprint; write its options here"
_NO_TPU = "a step runs on GPUs or CPUs"
_NO_FP8 = "training in 8-bit floating point is not supported"
_NO_MEGATRON = "the trainers do not run on Megatron-LM; use use_fsdp or use_deepspeed"
_NO_MESH = "rows and models are not split that way; use use_fsdp or use_deepspeed"

RESERVED_LAUNCH = {
    **dict.fromkeys(("module", "no_python"), _OWN_COMMAND),
    **dict.fromkeys(("quiet", "tee", "log_dir", "role"), _OWN_LOG),
    **dict.fromkeys(("config_file", "deepspeed_config_file"), _OUTSIDE),
    "multi_gpu": "implied by num_processes",
    "cpu": "a step runs on the GPUs there are, and on CPUs where there are none",
    "gpu_ids": "a step is given num_processes free GPUs; name those to use by CUDA_VISIBLE_DEVICES",
    "max_restarts": "a step that failed runs again when the recipe is run again",
    "mixed_precision": "use train.bf16 or train.fp16",
    "gradient_accumulation_steps": "use train.gradient_accumulation_steps",
    "gradient_clipping": "use train.max_grad_norm",
    "mpirun_hostfile": "processes are started by torch's launcher, not by MPI",
    **dict.fromkeys(("aws_access_key_id", "aws_secret_access_key"), "a recipe holds no secrets"),
    **dict.fromkeys(("tpu", "tpu_cluster", "no_tpu_cluster", "tpu_use_sudo", "vm", "env"), _NO_TPU),
    **dict.fromkeys(("main_training_function", "downcast_bf16"), _NO_TPU),
    **dict.fromkeys(("use_megatron_lm", "megatron_lm_*"), _NO_MEGATRON),
    **dict.fromkeys(("use_parallelism_config", "parallelism_config_*"), _NO_MESH),
    "fp8_*": _NO_FP8,
}
"""Options of `accelerate launch` that a recipe cannot set under `launch`; `*` stands for any ending."""

NOT_GENERATED_BY = ("custom_generate", "trust_remote_code")
"""Generation settings that would fetch code and run it in place of the model's own way to generate."""

RESERVED_GENERATION = {
    **dict.fromkeys(NOT_GENERATED_BY, "it would run code from elsewhere"),
    **dict.fromkeys(("pad_token_id", "use_cache", "transformers_version"), "lm-eval sets it itself"),
    **dict.fromkeys(("num_return_sequences", "return_dict_in_generate"), "lm-eval takes one answer, as plain text"),
    **dict.fromkeys(("output_*", "speculation_type"), "lm-eval takes one answer, as plain text"),
}
"""Fields of transformers' GenerationConfig that a recipe cannot set under `gen_kwargs`."""

OF_LM_EVAL = ("until", "max_gen_toks", "max_tokens", "max_completion_tokens")
"""What lm-eval itself takes there (lm_eval.models.utils.normalize_gen_kwargs), besides GenerationConfig's fields."""

_NUMBER = re.compile(r"\[number.*?\]")
"""How PEFT's annotations write that a number stands there."""
_BY_NAME = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict}


class Options(Config):
    """What a recipe hands on to a library: only what it sets; all else stays at the library's default."""

    reserved: ClassVar[dict[str, str]] = {}
    """Keys that cannot be set, and what to use in their place."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if wrong := misfit({name: getattr(self, name) for name in self.model_fields_set}):
            raise wrong_at(*wrong)
        return self

    @model_serializer
    def _only_set(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


class ModelInit(Options):
    """What transformers' from_pretrained is told of the model that trains; nothing that reads weights that are no
    safetensors."""

    attn_implementation: (
        Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
        | Annotated[str, StringConstraints(pattern=r"/")]
        | None
    ) = None
    """A word of transformers, or kernels on the hub, ORG/NAME, which need the stage's trust_remote_code."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of the weights; float32 where it is not set."""
    use_kernels: bool | None = None
    """Whether layers are replaced by kernels from the hub, which need the stage's trust_remote_code."""


@cache
def options(name: str) -> type[Options]:
    """The model of the class or command `name` in the list: every field optional, of the types declared there."""
    declared: dict[str, list[str]] = json.loads(LIST.read_text())[name]
    patterns = {
        "SFTConfig": RESERVED | RESERVED_SFT,
        "DPOConfig": RESERVED,
        "LoraConfig": RESERVED_LORA,
        "BitsAndBytesConfig": {},
        "gen_kwargs": RESERVED_GENERATION,
        "launch": RESERVED_LAUNCH,
    }[name]
    known = [*declared, *(pattern for pattern in patterns if "*" not in pattern)]
    reserved = {key: why for pattern, why in patterns.items() for key in fnmatch.filter(known, pattern)}
    fields: dict[str, Any] = {
        key: (_union(kinds), Field(default=None, **BOUNDS.get(key, {})))
        for key, kinds in declared.items()
        if key not in reserved
    }
    if "model_init_kwargs" in fields:
        fields["model_init_kwargs"] = (ModelInit | None, None)
    model = create_model(name, __base__=Options, **fields)
    model.reserved = reserved
    return model


def _union(kinds: list[str]) -> Any:
    """The type that admits what `kinds` names, in the words of `describe`."""
    if "any" in kinds:
        return Any
    literal: Any = typing.Literal
    words = [kind.removeprefix("=") for kind in kinds if kind.startswith("=")]
    choices = [word for word in words if "#" not in word]
    items = [kind.removeprefix("[]=") for kind in kinds if kind.startswith("[]=")]
    numbers = [int(choice) for choice in choices if choice.isdecimal()]  # YAML's 2 is as good as '2'
    types: list[Any] = [_BY_NAME[kind] for kind in kinds if kind in _BY_NAME]
    types += [literal[*choices, *numbers]] if choices else []
    types += [list[literal[*items]]] if items else []
    patterns = (word.replace("#", r"\d+") for word in words if "#" in word)
    types += [typing.Annotated[str, StringConstraints(pattern=f"^{pattern}$")] for pattern in patterns]
    return typing.Union[*types, None]


def describe() -> dict[str, dict[str, list[str]]]:
    """Class or command -> field -> what it takes, off the installed versions.

    That is a type's name, `=` and a choice in which # stands for a number, or `[]=` and a choice for the items of a
    list.
    """
    from accelerate.commands.launch import launch_command_parser
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, GenerationConfig
    from trl import DPOConfig, SFTConfig

    described = {cls.__name__: _describe(cls) for cls in (SFTConfig, DPOConfig, LoraConfig)}
    defaults = inspect.signature(BitsAndBytesConfig).parameters.values()
    described["BitsAndBytesConfig"] = {
        field.name: ["any" if field.default is None else type(field.default).__name__]
        for field in defaults
        if field.kind is not inspect.Parameter.VAR_KEYWORD
    }
    fields = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
    described["gen_kwargs"] = {name: ["any"] for name in sorted((*fields, *OF_LM_EVAL))}
    actions = [action for action in launch_command_parser()._actions if action.option_strings]
    described["launch"] = {flag(action): _takes(action) for action in actions if action.dest != "help"}
    return described


def _describe(cls: type) -> dict[str, list[str]]:
    hints = typing.get_type_hints(cls)
    return {
        field.name: _chosen(_names(hints[field.name]), _documented(field))
        for field in sorted(dataclasses.fields(cls), key=lambda field: field.name)
        if field.init
    }


def _documented(field: dataclasses.Field[Any]) -> list[str]:
    """The choices that a field's metadata or help text lists."""
    text = re.search(r"Possible values are:? (.*?)\.(\s|$)", field.metadata.get("help", ""))
    return list(field.metadata.get("choices", re.findall(r"`'?(\w+)'?`", text[1]) if text else ()))


def _chosen(names: list[str], choices: list[str]) -> list[str]:
    """`names` with text narrowed to `choices`, if there are any."""
    if choices and "list" in names:
        return [name for name in names if name != "list"] + [f"[]={choice}" for choice in choices]
    if choices and "str" in names:
        return [name for name in names if name != "str"] + [f"={choice}" for choice in choices]
    return names


def flag(action: argparse.Action) -> str:
    """`num_processes` of the option `--num_processes`."""
    return next(name for name in action.option_strings if name.startswith("--"))[2:].replace("-", "_")


def _takes(action: argparse.Action) -> list[str]:
    """The types or choices of an option of a command line. Many of text are true or false by meaning."""
    if action.choices:
        return [f"={choice}" for choice in action.choices]
    if action.nargs == 0 or getattr(action.type, "__name__", "") == "str_to_bool":
        return ["bool"]
    return [action.type.__name__] if action.type in (int, float, bool) else ["bool", "str"]


def _names(hint: Any) -> list[str]:
    """What `hint` admits in a recipe; `any` where it is wider than YAML's own types."""
    if hint is type(None):
        return []
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        names = list(dict.fromkeys(name for part in typing.get_args(hint) for name in _names(part)))
        choices = [name for name in names if name.startswith("=")]
        plain = sorted(name for name in names if name not in choices and not (choices and name == "str"))
        return ["any"] if "any" in names else plain + choices
    if typing.get_origin(hint) is typing.Literal:
        values = typing.get_args(hint)
        words = ["=" + _NUMBER.sub("#", value) for value in values if isinstance(value, str)]
        return sorted({type(value).__name__ for value in values if not isinstance(value, str)}) + words
    if isinstance(hint, type) and issubclass(hint, str) and issubclass(hint, enum.Enum):
        return [f"={choice.value}" for choice in hint]
    plain_name = getattr(typing.get_origin(hint) or hint, "__name__", "")
    return [plain_name] if plain_name in _BY_NAME else ["list" if plain_name == "set" else "any"]


if __name__ == "__main__":
    LIST.write_text(json.dumps(describe(), indent=1, sort_keys=True) + "\n")
