"""Load the tokenizer and the model that a training starts from."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import import_utils

from stages.base import UserError
from stages.library_options.option_models import Options
from stages.models.model_folder import why_not_loaded

_ATTENTION = "train.model_init_kwargs.attn_implementation"


def load_tokenizer(path: Path, rows: list[Any], trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer. Raises UserError if it cannot serve `rows`, one or more of each data file."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds no tokenizer that can be loaded: {why_not_loaded(error)}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: the tokenizer has no character offsets; save it as a fast tokenizer")
    if tokenizer.eos_token is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so answers would not end; set one")
    values = [value for row in rows for value in row.columns().values()]
    if tokenizer.chat_template is None and any(isinstance(value[0], dict) for value in values if value):
        raise UserError(
            f"{path}: the tokenizer has no chat template, and the rows are messages; use rows of plain text (for"
            " instruction data: 'format: official') or a model with a chat template"
        )
    return tokenizer


def load_model(
    path: Path,
    seed: int,
    options: dict[str, Any] | None,
    random_init: bool = False,
    quantization: Options | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a model from safetensors.

    Args:
        seed: Seeds random weights here, and the adapter's weights later.
        options: TRL's `model_init_kwargs`. The weights are float32 unless it has a dtype.
        random_init: Draw the weights instead of reading them.

    Raises:
        UserError: There is no such model, or this machine cannot load it that way.
    """
    set_seed(seed)
    options = {"dtype": torch.float32} | (options or {}) | _quantization_options(quantization)
    options["trust_remote_code"] = trust_remote_code  # with None, transformers would ask on the terminal
    if not trust_remote_code:
        _refuse_fallback_kernel(options.get("attn_implementation"))
    try:
        if random_init:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            return AutoModelForCausalLM.from_config(config, **options)
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: holds no model that can be loaded: {why_not_loaded(error)}") from None
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ImportError) and "attn_implementation" in options:
            attention = options["attn_implementation"]
            raise UserError(f"{_ATTENTION}: {attention} does not work here: {why_not_loaded(error)}") from None
        if quantization is None:
            raise
        raise UserError(f"quantization: bitsandbytes does not work on this machine: {why_not_loaded(error)}") from None
    if quantization is not None:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):  # else the first evaluation repacks it for a CPU kernel without gradient
                module.support_avx512bf16_for_cpu = False
    return model


def _refuse_fallback_kernel(attention: str | None) -> None:
    """Raise UserError if transformers would replace a missing flash attention by a kernel from the hub."""
    checks = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
        "flash_attention_4": import_utils.is_flash_attn_4_available,
    }
    if attention in checks and not checks[attention]() and import_utils.is_kernels_available():
        raise UserError(
            f"{_ATTENTION}: {attention} is not installed, and transformers would run a kernel from the hub instead,"
            " which is third-party code; install flash-attn, or set trust_remote_code: true on the stage if you"
            " trust it"
        )


def _quantization_options(quantization: Options | None) -> dict[str, Any]:
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantization: bitsandbytes is not installed; pip install -e '.[qlora]'")
    try:
        config = BitsAndBytesConfig(**quantization.model_dump())
    except (TypeError, ValueError) as error:
        raise UserError(f"quantization: {why_not_loaded(error)}") from None
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}
