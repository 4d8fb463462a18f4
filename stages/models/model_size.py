"""Parameters, bytes and activations of a model, from its config alone: the model is built on the meta device."""

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from stages.base import UserError
from stages.models.adapter_check import add_adapter
from stages.models.model_folder import why_not_loaded
from stages.system.limits import LimitExceeded, limited

STORED_CHECKPOINTS = 3  # those that stages.training.checkpoints keeps and the one it writes; importing it takes seconds
# part of an optimiser's name -> values that it keeps for each trainable parameter; others keep none
OPTIMISER_STATES = {"adafactor": 0.1, "adalomo": 0.1, "ademamix": 3, "adam": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}
BUILD_SECONDS = 60.0
"""Longest time to build a model without weights; those of a hundred layers take a few."""


@lru_cache(8)  # the cells of a matrix mostly share it
def build(path: Path, dtype: str, trusted: bool, lora: str | None = None) -> Any:
    """Build the model in `path`, with its adapter (JSON), on the meta device, where it needs no memory.

    Raises UserError, at a key of `lora` if that is wrong.
    """
    try:
        with torch.device("meta"):
            with limited(BUILD_SECONDS):
                config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
                dtype = (config.dtype or "float32") if dtype == "auto" else dtype
                model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted).train()
            if lora is not None:
                add_adapter(model, json.loads(lora))
            return model
    except (ValueError, TypeError, OSError, ImportError, MemoryError, LimitExceeded) as error:
        raise UserError(f"{path}: the model cannot be built from its config: {why_not_loaded(error)}") from None


@cache
def position_limit(path: Path, trusted: bool) -> tuple[int | None, bool]:
    """Return the positions of a model's config, and whether it has a table of them, so that no row can be longer.

    The model is built for two numbers of positions: only tables change their shape.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None, False
    shapes = []
    for positions in (limit, limit + 8):
        text.max_position_embeddings = positions
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        modules = [module for module in model.modules() if not hasattr(module, "make_weights")]  # makes a longer table
        tensors = (t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        shapes.append([tensor.shape for tensor in tensors])
    return limit, shapes[0] != shapes[1]


def check_positions(path: Path, trusted: bool, longest: int) -> str | None:
    """Describe rows of up to `longest` tokens that have more than the model's positions; None if none has.

    Raises UserError if the model has a table of positions, which these rows would exceed.
    """
    limit, has_table = position_limit(path, trusted)
    if limit is None or longest <= limit:
        return None
    text = f"the longest row has {longest} tokens, and the model {limit} positions"
    if has_table:
        raise UserError(f"{text}; set it to {limit} or less", "train.max_length")
    return f"{text}; beyond these it extrapolates"


class ModelSize(NamedTuple):
    """Counts of parameters: all, without the adapter's, those that multiply every token, the trainable ones; and bytes
    of the trainable ones and of all, quantised ones as bitsandbytes stores them."""

    parameters: int
    base: int
    multiplied: int
    trainable: int
    trainable_bytes: int
    weights: int


def model_size(model: Any, quantization: dict[str, Any] | None = None) -> ModelSize:
    """Count the parameters of a model from `build`."""
    parameters = dict(model.named_parameters())  # a tied tensor occurs once
    count = sum(p.numel() for p in parameters.values())
    trainable = [p for p in parameters.values() if p.requires_grad]
    adapter = sum(p.numel() for name, p in parameters.items() if "lora_" in name or "modules_to_save" in name)
    weights = sum(p.nbytes for p in parameters.values())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    lookup = 0 if head is None or head.weight is embedding.weight else embedding.weight.numel()
    if quantization:  # of the linear layers but the head; a float32 scale for 64 weights of 4 bits
        linear = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
        per_weight = 1 if quantization.get("load_in_8bit") else 0.5 + 4 / 64
        weights -= sum(round(m.weight.nbytes - per_weight * m.weight.numel()) for m in linear if m is not head)
    trained = sum(p.numel() for p in trainable), sum(p.nbytes for p in trainable)
    return ModelSize(count, count - adapter, count - lookup, *trained, weights)


def optimiser_bytes(name: str, size: ModelSize) -> int:
    """Return the bytes of the state of `name`, one of transformers' OptimizerNames; GaLore and APOLLO as full rank."""
    values = next((count for part, count in OPTIMISER_STATES.items() if part in name), 0)
    bits = 8 if "8bit" in name else 4 if "4bit" in name else 0
    return round(values * (size.trainable * bits / 8 if bits else size.trainable_bytes))


def checkpoint_bytes(optimiser: str, size: ModelSize) -> int:
    """Return the bytes of a training's checkpoints on disk, at most."""
    return STORED_CHECKPOINTS * (size.trainable_bytes + optimiser_bytes(optimiser, size))


def saved_activations(model: Any, rows: int, length: int) -> int:
    """Return the bytes that the backbone's forward pass saves for the backward pass.

    The meta device saves attention probabilities; fused kernels save each layer's mask instead, which a single row does
    not need.
    """
    attention = (rows, model.config.get_text_config().num_attention_heads, length, length)
    parameters = {StorageWeakRef(p.untyped_storage()) for p in model.parameters()}
    saved: dict[StorageWeakRef, int] = {}

    def save(tensor: Tensor) -> Tensor:
        key, size = StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()
        if key not in parameters:
            is_attention = tensor.shape[-2:] == attention[-2:] and tensor.numel() == math.prod(attention)
            saved[key] = size if not is_attention else size // attention[1] if rows > 1 else 0
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool)
        ids = torch.zeros(rows, length, dtype=torch.long)
        _output = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)  # keeps what it saved alive
        return sum(saved.values())
