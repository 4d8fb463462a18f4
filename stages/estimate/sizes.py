"""A model as its config describes it, without weights: how many parameters it has, how many of them train, and how many
bytes they take."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from stages.base import UserError
from stages.library_options.option_models import Options
from stages.models.model_folder import why_not_loaded
from stages.training.model_io import lora_config

BLOCK = 64
"""Weights for which bitsandbytes keeps one scale, of 4 bytes, in 4 bits."""


@dataclass(frozen=True)
class Sizes:
    """Of one model, with its adapter if it has one."""

    parameters: int
    """A tensor shared by two modules counts once."""
    trainable: int
    trainable_bytes: int
    """What their gradients take."""
    factored: int
    """What adafactor keeps of the trainable ones: a row and a column of float32 for each matrix."""
    weights: int
    """Bytes of all of them, quantised ones as bitsandbytes keeps them."""
    base: int
    """Parameters without the adapter's."""
    multiplied: int
    """Parameters that every token is multiplied by: all but an input embedding that is not the head's too."""
    layer: int
    """Bytes of the largest layer: what FSDP gathers at a time."""


def read_config(path: Path, trusted: bool) -> Any:
    """The config of the model in `path`. Raises UserError."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: holds no config that can be read: {why_not_loaded(error)}") from None


def dtype_of(options: dict[str, Any] | None, config: Any) -> torch.dtype:
    """The dtype of the weights in training: what `model_init_kwargs` say, else float32."""
    named = (options or {}).get("dtype", "float32")
    if named == "auto":
        named = getattr(config, "dtype", None) or "float32"
    return named if isinstance(named, torch.dtype) else getattr(torch, str(named).removeprefix("torch."))


def build(
    config: Any,
    dtype: torch.dtype,
    lora: Options | None = None,
    checkpointing: bool = False,
    attention: str | None = None,
    trusted: bool = False,
) -> Any:
    """The model that `config` describes, in training mode. Under torch.device("meta") or FakeTensorMode it takes no
    memory."""
    options = {"attn_implementation": attention} if attention else {}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=trusted, **options)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how it is called, and that an adapter is on the meta device
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if lora is None:
            return model
        # it is where it should be, and tensors without content cannot be moved
        with patch.object(nn.Module, "to", lambda module, *_, **__: module):
            return get_peft_model(model, lora_config(lora))  # type: ignore[arg-type]


def sizes(
    config: Any,
    dtype: torch.dtype,
    lora: Options | None = None,
    quantization: dict[str, Any] | None = None,
    trusted: bool = False,
) -> Sizes:
    """Count. Raises UserError for a model or an adapter that cannot be made."""
    try:
        with torch.device("meta"):
            model = build(config, dtype, lora, trusted=trusted)
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"the model cannot be made from its config: {why_not_loaded(error)}") from None
    held = dict(model.named_parameters())
    adapter = {name for name in held if "lora_" in name or "modules_to_save" in name}
    training = [p for p in held.values() if p.requires_grad]
    parameters = sum(p.numel() for p in held.values())
    base = sum(p.numel() for name, p in held.items() if name not in adapter)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = 0 if head is None or head.weight is embedding.weight else embedding.weight.numel()
    layers = [m for found in model.modules() if isinstance(found, nn.ModuleList) for m in found]
    return Sizes(
        parameters=parameters,
        trainable=sum(p.numel() for p in training),
        trainable_bytes=sum(p.nbytes for p in training),
        factored=sum(4 * (sum(p.shape) if p.dim() > 1 else p.numel()) for p in training),
        weights=sum(p.nbytes for p in held.values()) - _saved(model, dtype, quantization),
        base=base,
        multiplied=parameters - own,
        layer=max((sum(p.nbytes for p in layer.parameters()) for layer in layers), default=0),
    )


def _saved(model: Any, dtype: torch.dtype, quantization: dict[str, Any] | None) -> int:
    """The bytes by which quantised weights are smaller: those of all linear layers but the head and adapters."""
    if quantization is None:
        return 0
    skipped = quantization.get("llm_int8_skip_modules") or ["lm_head"]
    saved = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(part in name for part in (*skipped, "lora_")):
            count = module.weight.numel()
            if quantization.get("load_in_8bit"):
                kept = float(count + 4 * module.out_features)
            else:
                scale = 1 + 4 / 256 if quantization.get("bnb_4bit_use_double_quant") else 4
                kept = count / 2 + count / BLOCK * scale
            saved += round(count * dtype.itemsize - kept)
    return saved
