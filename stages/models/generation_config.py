"""A checkpoint's generation config: what an evaluation leaves out of it, and what a training cannot publish."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from stages.base import UserError
from stages.models.model_folder import why_not_loaded

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What an evaluation keeps."""
NO_EFFECT = (
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
)
RANGES = {
    "temperature": (math.ulp(0.0), math.inf),
    "top_k": (0, math.inf),
    "top_p": (math.ulp(0.0), 1),
    "min_p": (0, 1),
    "typical_p": (math.ulp(0.0), 1),
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "repetition_penalty": (math.ulp(0.0), math.inf),
    "no_repeat_ngram_size": (0, math.inf),
    "num_beams": (1, 1000),
    "max_time": (math.ulp(0.0), math.inf),
}
"""Lowest and highest usable value, which transformers checks when it generates or not at all."""


def read_generation_config(path: Path) -> GenerationConfig:
    """Read the generation config of the model in `path`; an empty one if it has none.

    Raises:
        UserError: transformers cannot read it, or a special token is no number.
    """
    if not (path / "generation_config.json").is_file():
        return GenerationConfig()
    remedy = f"correct or delete {path / 'generation_config.json'}"
    try:
        config = GenerationConfig.from_pretrained(path)
    except Exception as error:  # of any type, as the file's values are
        raise UserError(f"its generation config cannot be read: {why_not_loaded(error)}; {remedy}") from None
    for name in TOKENS:
        value = getattr(config, name)
        for each in value if isinstance(value, list) else [value]:
            if not isinstance(each, int | None):
                raise UserError(f"{name} of its generation config, {each!r}, is no token id; {remedy}")
    return config


def set_values(config: GenerationConfig) -> dict[str, Any]:
    """Return what a generation config sets, such as a penalty, besides special tokens."""
    values = config.to_diff_dict().items()
    return {k: v for k, v in values if not k.startswith("_") and k not in (*TOKENS, *NO_EFFECT) and v is not None}


NOT_USED = "the checkpoint's generation defaults are not used, since they would change its scores"
NOT_PUBLISHED = "of its generation config, what is out of range or has no effect is not published"


def remove_generation_defaults(model: Any) -> dict[str, Any]:
    """Leave a model's special tokens in its generation config, and return what else it set.

    Else `generate` would use whatever the caller does not set, num_beams in greedy decoding among it.
    """
    config = model.generation_config
    if config is None:
        return {}
    model.generation_config = GenerationConfig(**{name: getattr(config, name) for name in TOKENS})
    return set_values(config)


def unpublishable(config: GenerationConfig) -> dict[str, Any]:
    """Return the values that transformers refuses to save, or that nothing can be generated with.

    Among them are those of sampling in a config without `do_sample`, which have no effect.
    """
    values = set_values(config)
    mode = {name: values[name] for name in ("do_sample", "num_beams") if is_in_range(name, values.get(name))}
    return {name: value for name, value in values.items() if not _is_usable(name, value, mode)}


def describe(text: str, values: dict[str, Any]) -> list[str]:
    """Return a note, `text` and the values, if there are any."""
    shown = ", ".join(f"{key}: {json.dumps(value, default=str)}" for key, value in values.items())
    return [f"{text}: {shown}"] if values else []


def is_in_range(name: str, value: Any) -> bool:
    """Return whether a setting of generation has a value that can be used, as far as RANGES knows."""
    if name not in RANGES:
        return value is not None
    low, high = RANGES[name]
    return isinstance(value, int | float) and low <= value <= high


def _is_usable(name: str, value: Any, mode: dict[str, Any]) -> bool:
    if not is_in_range(name, value):
        return False
    try:
        GenerationConfig(**mode | {name: value}).validate(strict=True)
    except Exception:  # of any type, as the values are
        return False
    return True
