"""LoRA adapters: how they start, DPO's reference, and the model that base and adapter make together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.library_options.option_models import Options

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def lora_config(lora: Options | None) -> LoraConfig | None:
    """Build PEFT's LoraConfig from a recipe's `lora` section."""
    return None if lora is None else LoraConfig(task_type="CAUSAL_LM", **lora.model_dump())


def with_reference(model: PreTrainedModel, lora: Options | None) -> dict[str, Any]:
    """Return DPOTrainer's arguments `model` and `peft_config`, so that its reference is the model at the first step.

    With a `peft_config`, TRL's reference is the model with the adapter switched off. That is another model if the
    adapter's initialisation changes the weights (pissa, olora), and, in a narrow dtype, if it only cancels out up to
    rounding (orthogonal, DoRA). TRL compares a PeftModel with a frozen copy of its adapter instead.
    """
    config = lora_config(lora)
    if config is None or (config.init_lora_weights in (True, "gaussian", "mica") and not config.use_dora):
        return {"model": model, "peft_config": config}
    adapted = get_peft_model(model, config)
    config.init_lora_weights = True  # the copy has the same config, and would change the weights a second time
    return {"model": adapted}


def freeze_reference(model: nn.Module) -> None:
    """Freeze the adapter `ref` that DPOTrainer adds; PEFT leaves adapters of embeddings trainable in narrow dtypes."""
    for name, parameter in model.named_parameters():
        if "ref" in name.split("."):
            parameter.requires_grad_(False)


def subtracted_weights(model: nn.Module, lora: Options | None) -> dict[str, Tensor]:
    """Copy the adapter's first matrices if the initialisation subtracted their product from the model's weights.

    Returns:
        Name in the adapter's file -> matrix, on the CPU. Empty for initialisations that leave the model as it is.
    """
    start = "" if lora is None else str(lora.model_dump().get("init_lora_weights", ""))
    if not start.startswith(("pissa", "olora")):
        return {}
    return {
        name.replace(".default.", "."): parameter.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if ".lora_A.default." in name or ".lora_B.default." in name
    }


def save_adapter(model: PeftModel, weights: dict[str, Tensor], subtracted: dict[str, Tensor], folder: Path) -> None:
    """Save the trained adapter so that it fits the model that training started from.

    The trained weights are W - s B0 A0 + s B A, with B0 A0 as in `subtracted`. The file has B' = [B, -B0] and
    A' = [A; A0], so that W + s B' A' is the same: twice the rank at the same scale s. PEFT's own conversion (its
    `path_initial_model_for_weight_conversion`) would lose modules_to_save, DoRA's magnitudes and trained tokens.
    """
    config = model.peft_config["default"]
    config.base_model_name_or_path = ""  # no path of this machine; stage.json names the base
    if subtracted:
        config.init_lora_weights = True
    model.save_pretrained(str(folder), selected_adapters=["default"], state_dict=weights)
    (folder / "README.md").unlink()  # PEFT's empty form, which contains that path as well
    if not subtracted:
        return
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    for name, start in subtracted.items():
        is_a = ".lora_A." in name
        tensors[name] = torch.cat([tensors[name], start if is_a else -start], dim=0 if is_a else 1).contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    alpha = math.sqrt(2) if saved["use_rslora"] else 2  # the scale is alpha / sqrt(r), or alpha / r
    for key, factor in (("r", 2), ("lora_alpha", alpha)):
        saved[key] *= factor
    for key, factor in (("rank_pattern", 2), ("alpha_pattern", alpha)):
        saved[key] = {name: value * factor for name, value in saved[key].items()}
    (folder / "adapter_config.json").write_text(json.dumps(saved, indent=2, sort_keys=True), encoding="utf-8")


def untie(model: PreTrainedModel) -> bool:
    """Give the output layer its own copy of the embeddings if they share one tensor. Returns whether they did."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def merge(adapted: PeftModel, was_tied: bool) -> PreTrainedModel:
    """Merge the adapter; the embeddings stay tied to the output layer only if training left them equal."""
    dtype = adapted.dtype
    merged = adapted.merge_and_unload().to(dtype)  # modules_to_save are float32
    if was_tied:
        head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
        tied = torch.equal(head.weight, embeddings.weight)
        for config in (merged.config, merged.config.get_text_config()):
            config.tie_word_embeddings = tied
        if tied:
            head.weight = embeddings.weight
    return merged
