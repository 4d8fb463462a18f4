"""Config models of what TRL and PEFT take, made from a list of their fields, so that checking needs no torch.

`python -m stages.options` writes the list, `options.json`, from the installed versions; a test holds it against them.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import create_model, model_serializer, model_validator

from stages.base import Config

LIST = Path(__file__).with_name("options.json")

_NO_CHECKPOINTS = "the finished model is published; checkpoints are not kept"
_ONE_PROCESS = "a step trains in one process"
_NO_HUB = "results stay in the store, and a recipe holds no secrets"
_UNWEIGHTED = "token weights are not carried through it"

RESERVED = {
    "output_dir": "the store decides where results lie",
    "seed": "use the recipe's or the stage's own 'seed'",
    "data_seed": "use the recipe's or the stage's own 'seed'",
    "do_train": "a stage trains by definition",
    "do_eval": "name evaluation data under 'data.eval'",
    "do_predict": "use a stage of kind lm_eval",
    "resume_from_checkpoint": "the pipeline decides what a step starts from",
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _NO_HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), _NO_HUB),
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit", "save_only_model"), _NO_CHECKPOINTS),
    **dict.fromkeys(("save_on_each_node", "load_best_model_at_end", "metric_for_best_model"), _NO_CHECKPOINTS),
    **dict.fromkeys(("greater_is_better", "restore_callback_states_from_checkpoint"), _NO_CHECKPOINTS),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"), _ONE_PROCESS),
    "trust_remote_code": "remote code is never run",
}
"""Fields of TRL's configs that a recipe cannot set under `train`, and what to use in their place."""

RESERVED_SFT = {
    "completion_only_loss": "say it by 'weights'; {prompt: 0, completion: 1} is completion-only loss",
    "assistant_only_loss": "say it by 'weights'; {prompt: 0, completion: 1} is loss on the answers only",
    "prompt_loss_weight": "use 'weights.prompt'",
    "completion_loss_weight": "use 'weights.completion'",
    "loss_type": "an sft stage has one loss, the weighted one; see 'weights'",
    "label_smoothing_factor": "an sft stage has one loss, the weighted one; see 'weights'",
    **dict.fromkeys(("packing", "packing_strategy", "eval_packing", "padding_free"), _UNWEIGHTED),
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

MODEL_INIT = ("attn_implementation", "dtype", "use_kernels")
"""What `model_init_kwargs` may hold: nothing that runs code from elsewhere or reads weights that are no safetensors."""

_BY_NAME = {"int": int, "float": float, "bool": bool, "str": str, "list": list, "dict": dict}


class Options(Config):
    """What a recipe hands on to a library: only what it sets; all else stays at the library's default."""

    reserved: ClassVar[dict[str, str]] = {}
    """Keys that cannot be set, and what to use in their place."""

    @model_validator(mode="after")
    def _safe_loading(self) -> Self:
        given = getattr(self, "model_init_kwargs", None) or {}
        if not isinstance(given, dict) or set(given) - set(MODEL_INIT):
            raise ValueError(f"model_init_kwargs is a mapping with the keys {', '.join(MODEL_INIT)}")
        return self

    @model_serializer
    def _only_set(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in sorted(self.model_fields_set)}


@cache
def options(name: str) -> type[Options]:
    """The model of TRL's or PEFT's class `name`: every field optional, of the types declared there."""
    declared: dict[str, list[str]] = json.loads(LIST.read_text())[name]
    reserved = {
        "SFTConfig": RESERVED | RESERVED_SFT,
        "DPOConfig": RESERVED,
        "LoraConfig": RESERVED_LORA,
    }[name]
    fields: dict[str, Any] = {key: (_union(kinds), None) for key, kinds in declared.items() if key not in reserved}
    model = create_model(name, __base__=Options, **fields)
    model.reserved = reserved
    return model


def _union(kinds: list[str]) -> Any:
    if "any" in kinds:
        return Any
    union: Any = None
    for kind in kinds:
        union = union | _BY_NAME[kind] if union is not None else _BY_NAME[kind] | None
    return union


def describe() -> dict[str, dict[str, list[str]]]:
    """Class -> field -> names of the types it takes, read off the installed TRL and PEFT."""
    from peft import LoraConfig
    from trl import DPOConfig, SFTConfig

    return {cls.__name__: _describe(cls) for cls in (SFTConfig, DPOConfig, LoraConfig)}


def _describe(cls: type) -> dict[str, list[str]]:
    hints = typing.get_type_hints(cls)
    return {f.name: _names(hints[f.name]) for f in sorted(dataclasses.fields(cls), key=lambda f: f.name) if f.init}


def _names(hint: Any) -> list[str]:
    """The plain types that `hint` admits in a recipe; `any` where it is wider than YAML's own types."""
    if hint is type(None):
        return []
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        names = {name for part in typing.get_args(hint) for name in _names(part)}
        return ["any"] if "any" in names else sorted(names)
    if typing.get_origin(hint) is typing.Literal:
        return sorted({type(value).__name__ for value in typing.get_args(hint)})
    plain = (typing.get_origin(hint) or hint).__name__ if hasattr(hint, "__name__") or typing.get_origin(hint) else ""
    plain = "str" if isinstance(hint, type) and issubclass(hint, str) else plain
    return [plain] if plain in _BY_NAME else ["list" if plain == "set" else "any"]


if __name__ == "__main__":
    LIST.write_text(json.dumps(describe(), indent=1, sort_keys=True) + "\n")
