"""Put a LoRA adapter on a model without weights, and refuse one that would not train."""

import re
import textwrap
from typing import Any

from stages.base import UserError
from stages.system.limits import LimitExceeded, limited

ADAPTER_SECONDS = 120.0
"""Longest time for matching the adapter's patterns and building it."""


def add_adapter(model: Any, lora: dict[str, Any]) -> None:
    """Add an adapter to a model on the meta device. Raises UserError, at a key of `lora`, if it cannot be trained."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    try:
        with limited(ADAPTER_SECONDS):
            _check_names(model, lora)
            get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), low_cpu_mem_usage=True)
    except UserError:
        raise
    except LimitExceeded as error:
        text = f"matching its patterns against the modules {error}; write a simpler pattern"
        raise UserError(text, "lora.target_modules") from None
    except Exception as error:
        raise UserError(f"PEFT cannot build this adapter: {textwrap.shorten(str(error), 300)}", "lora") from None
    head = model.get_output_embeddings()
    if isinstance(head, LoraLayer):
        reason = "the loss reads the weights of the model's output layer directly, so an adapter on it would not train"
        remedy = "name the layer in modules_to_save instead, to train all of it"
        raise UserError(f"{reason}; {remedy}", "lora.target_modules")
    if isinstance(head, TrainableTokensWrapper):
        reason = "the loss cannot train rows of the output layer, which is also tied to the embeddings if none is named"
        remedy = "use modules_to_save: [embed_tokens] to train the embeddings"
        raise UserError(f"{reason}; {remedy}", "lora.trainable_token_indices")
    for name, layer in model.named_modules():
        if isinstance(layer, TrainableTokensLayer):
            rows, indices = layer.get_base_layer().get_parameter("weight").shape[0], layer.token_indices["default"]
            if bad := [index for index in indices if not 0 <= index < rows]:
                text = f"the model has no token {bad[0]}, only 0 to {rows - 1}"
                raise UserError(text, "lora.trainable_token_indices")
        if isinstance(layer, LoraLayer):
            _check_layer(name, layer, lora)


def _check_names(model: Any, lora: dict[str, Any]) -> None:
    """Refuse names that match no module at all, as PEFT does (BaseTuner.check_target_module_exists)."""
    modules = dict(model.named_modules())
    targets, saved = lora.get("target_modules"), lora.get("modules_to_save")
    layers = sorted({n.rpartition(".")[2] for n, module in modules.items() if [*module.parameters(recurse=False)]})
    has = f"it has {', '.join(name for name in layers if not name.isdecimal())}"
    if isinstance(targets, str):
        try:
            is_known = any(re.fullmatch(targets, name) for name in modules)
        except re.error as error:
            text = f"{targets!r} is not a regular expression: {error}"
            raise UserError(text, "lora.target_modules") from None
        if not is_known and targets.lower() != "all-linear":
            hint = f"; write [{targets}] for the modules of that name" if targets in layers else ""
            raise UserError(f"{targets!r} matches no module of the model{hint}; {has}", "lora.target_modules")
    elif targets and not any(f".{name}".endswith(f".{target}") for name in modules for target in targets):
        raise UserError(f"none of {targets} is a module of the model; {has}", "lora.target_modules")
    if saved and not any(name.endswith(module) for name in modules for module in saved):
        raise UserError(f"none of {saved} is a module of the model; {has}", "lora.modules_to_save")


def _check_layer(name: str, layer: Any, lora: dict[str, Any]) -> None:
    base, start, rank = layer.get_base_layer(), lora.get("init_lora_weights", True), layer.r["default"]
    if lora.get("lora_bias") and getattr(base, "bias", None) is None:
        text = f"{name} has no bias that the adapter's bias could be merged into; leave lora_bias out"
        raise UserError(text, "lora.lora_bias")
    if start in (True, False, "gaussian"):
        return
    supported = {"olora": ("Linear",), "mica": ("Linear", "Conv1D", "Embedding")}.get(start, ("Linear", "Conv1D"))
    if type(layer).__name__ == "ParamWrapper" or type(base).__name__ not in supported:
        text = f"PEFT has no {start} for {name}, a {type(base).__name__}; use true"
        raise UserError(text, "lora.init_lora_weights")
    if start != "orthogonal" and rank > min(layer.in_features, layer.out_features):
        text = f"{rank} is more than the rank of {name}, from which {start} starts; lower it"
        raise UserError(text, "lora.r")
