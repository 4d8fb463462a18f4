"""Load the model that a training starts from, and publish the trained model."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    set_seed,
)
from transformers.integrations import validate_bnb_backend_availability
from transformers.utils import import_utils

from stages.base import Context, UserError
from stages.library_options.option_models import Options
from stages.models.model_folder import why_not_loaded
from stages.training.trainer_internals import TRLTrainer, tokenizer_of

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
    if quantization is not None:
        from bitsandbytes.nn import Linear4bit

        for module in model.modules():
            if isinstance(module, Linear4bit):  # else the first evaluation repacks it for a CPU kernel without gradient
                module.support_avx512bf16_for_cpu = False
    return model


def lora_config(lora: Options | None) -> LoraConfig | None:
    """Build PEFT's LoraConfig from a recipe's `lora` section."""
    return None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora.model_dump())


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


def publish(trainer: TRLTrainer, context: Context) -> None:
    """Write model and tokenizer to context.out; an adapter also goes to `adapter` in it. The trainer ends with this.

    All ranks call it, because each may hold a part of the weights; rank 0 writes. An adapter is merged into the model
    that training started from, loaded again: the adapter's own copy of it may be quantised.
    """
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)
    gathered = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    weights = {name.replace("_orig_mod.", ""): weight for name, weight in gathered.items()}  # torch.compile's prefix
    del gathered
    is_first = trainer.is_world_process_zero()
    trainer.accelerator.end_training()  # no rank waits for another from here on
    if not is_first:
        return
    tokenizer_of(trainer).save_pretrained(context.out)
    if isinstance(model, PeftModel):
        model.active_peft_config.base_model_name_or_path = ""  # no path of this machine; stage.json names the base
        model.save_pretrained(str(context.out / "adapter"), state_dict=weights)
        (context.out / "adapter" / "README.md").unlink()  # PEFT's empty form, which contains that path as well
        if trainer.accelerator.num_processes == 1:
            _free_memory(trainer)
        del model, weights
        gc.collect()
        _merge_adapter(context).save_pretrained(context.out)
    else:
        tied = model.all_tied_weights_keys  # gathered as copies, which save_pretrained would write twice
        model.save_pretrained(
            context.out, state_dict={name: weight for name, weight in weights.items() if name not in tied}
        )


def _merge_adapter(context: Context) -> PreTrainedModel:
    """The model that training started from, in the dtype of training, with the published adapter merged in."""
    options = context.config.train.model_dump().get("model_init_kwargs")
    trusted = context.config.trust_remote_code
    base = load_model(context.inputs["model"].path, context.config.seed, options, trust_remote_code=trusted)
    return PeftModel.from_pretrained(base, str(context.out / "adapter"), torch_device="cpu").merge_and_unload()


def _free_memory(trainer: TRLTrainer) -> None:
    """Drop the trained weights and the optimiser's state: with them, two models would be in memory while merging."""
    for holder in (trainer, trainer.callback_handler):
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(holder, name, None)
    trainer.model_wrapped = None  # type: ignore[assignment]
    trainer.accelerator.free_memory()
