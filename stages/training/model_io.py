"""Load the model that a training starts from, and its adapter."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import import_utils

from stages.base import UserError
from stages.library_options.option_models import Options
from stages.models.generation_config import unpublishable
from stages.models.model_folder import why_not_loaded

_ATTENTION = "train.model_init_kwargs.attn_implementation"


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
            raise UserError(f"{attention} does not work here: {why_not_loaded(error)}", _ATTENTION) from None
        if quantization is None:
            raise
        raise _unusable_quantization(error) from None
    for name in unpublishable(model.generation_config) if model.generation_config else ():
        setattr(model.generation_config, name, getattr(GenerationConfig(), name, None))
    if quantization is not None:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):  # else the first evaluation repacks it for a CPU kernel without gradient
                module.support_avx512bf16_for_cpu = False
    return model


def lora_config(lora: Options | None) -> LoraConfig | None:
    """Build PEFT's LoraConfig from a recipe's `lora` section."""
    return None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora.model_dump())


def with_reference(model: PreTrainedModel, lora: Options | None) -> dict[str, Any]:
    """Return DPOTrainer's arguments `model` and `peft_config`, so that its reference is the model at the first step.

    With a `peft_config`, TRL's reference is the model with the adapter switched off. That is another model if the
    adapter's initialisation changes the weights (pissa, olora), and, in a narrow dtype, if it only cancels out up to
    rounding (orthogonal, DoRA). To a PeftModel, TRL adds a copy of its adapter, `ref`, and switches to that.
    """
    config = lora_config(lora)
    if config is None or (config.init_lora_weights in (True, "gaussian", "mica") and not config.use_dora):
        return {"model": model, "peft_config": config}
    adapted = get_peft_model(model, config)
    config.init_lora_weights = True  # the copy has the same config, and would change the weights a second time
    return {"model": adapted}


def _refuse_fallback_kernel(attention: str | None) -> None:
    """Raise UserError if transformers would replace a missing flash attention by a kernel from the hub."""
    checks = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
        "flash_attention_4": import_utils.is_flash_attn_4_available,
    }
    if attention in checks and not checks[attention]() and import_utils.is_kernels_available():
        raise UserError(
            f"{attention} is not installed, and transformers would run a kernel from the hub instead, which is"
            " third-party code; install flash-attn, or set trust_remote_code: true on the stage if you trust it",
            _ATTENTION,
        )


def _quantization_options(quantization: Options | None) -> dict[str, Any]:
    if quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("bitsandbytes is not installed; pip install -e '.[qlora]'", "quantization")
    try:
        config = BitsAndBytesConfig(**quantization.model_dump())
    except (TypeError, ValueError) as error:
        raise UserError(why_not_loaded(error), "quantization") from None
    device = int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def check_quantization(quantization: Options) -> None:
    """Raise UserError if this machine cannot quantise a model that way."""
    _quantization_options(quantization)
    try:
        validate_bnb_backend_availability(raise_exception=True)
    except (ImportError, RuntimeError) as error:
        raise _unusable_quantization(error) from None


def _unusable_quantization(error: Exception) -> UserError:
    return UserError(f"bitsandbytes does not work on this machine: {why_not_loaded(error)}", "quantization")
