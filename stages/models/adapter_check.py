"""Put a LoRA adapter on a model without weights, to find what PEFT or TRL would refuse or ignore when training starts.

    python -m stages.models.adapter_check MODEL TRUST_REMOTE_CODE LORA

`check_adapter` runs that in a process of its own: it takes seconds and needs torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from stages.base import UserError
from stages.system.module_command import module_command

_PLAIN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights", "bias"}
"""Options that cannot fail on a module that `check_targets` has found."""

_CHECKED: dict[tuple[str, ...], list[str] | None] = {}
"""Arguments -> problem, for the cells of a matrix, which mostly share them."""


def check_adapter(model: Path, lora: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise UserError, at a key of `lora`, if no adapter with these options can be trained on the model."""
    targets = lora.get("target_modules")
    finds_layers = targets == "all-linear" or (
        isinstance(targets, list) and {"lm_head", "embed_out"}.isdisjoint(targets)
    )
    if finds_layers and _PLAIN.issuperset(lora) and lora.get("init_lora_weights") in (None, True, False, "gaussian"):
        return
    arguments = (str(model), str(trust_remote_code), json.dumps(lora, sort_keys=True))
    if arguments not in _CHECKED:
        command, environment = module_command("stages.models.adapter_check", *arguments)
        with tempfile.TemporaryDirectory() as modules:  # transformers copies a model's code there
            environment["HF_MODULES_CACHE"] = modules
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        _CHECKED[arguments] = json.loads(done.stdout or "null")  # null too if no model is built, as loading will report
    if (problem := _CHECKED[arguments]) is not None:
        raise UserError(problem[1], key=problem[0])


def _find_problem(path: str, trusted: bool, lora: dict[str, Any]) -> tuple[str, str] | None:
    """Return a key and what is wrong with it; None if the adapter can be trained and merged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        try:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))
        except Exception as error:
            return "lora", f"PEFT cannot build this adapter: {textwrap.shorten(str(error), 300)}"
    head = model.get_output_embeddings()
    if isinstance(head, LoraLayer):
        reason = "the loss reads the weights of the model's output layer directly, so an adapter on it would not train"
        return "lora.target_modules", f"{reason}; name the layer in modules_to_save instead, to train all of it"
    if isinstance(head, TrainableTokensWrapper):
        reason = "the loss cannot train rows of the output layer, which is also tied to the embeddings if none is named"
        return "lora.trainable_token_indices", f"{reason}; use modules_to_save: [embed_tokens] to train the embeddings"
    for name, layer in model.named_modules():
        if isinstance(layer, TrainableTokensLayer):
            rows = len(layer.get_base_layer().weight)
            if bad := [index for index in layer.token_indices["default"] if not 0 <= index < rows]:
                return (
                    "lora.trainable_token_indices",
                    f"{bad[0]} is not a token of the model, whose ids end at {rows - 1}",
                )
        if isinstance(layer, LoraLayer) and (problem := _problem_of_layer(layer, lora)):
            return problem[0], f"{problem[1].format(name.removeprefix('base_model.model.'))}"
    return None


def _problem_of_layer(layer: Any, lora: dict[str, Any]) -> tuple[str, str] | None:
    from peft.tuners.lora.layer import ParamWrapper
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    base, start, rank = layer.get_base_layer(), str(lora.get("init_lora_weights", True)), layer.r["default"]
    if lora.get("lora_bias") and getattr(base, "bias", None) is None:
        return "lora.lora_bias", "{} has no bias that the adapter's bias could be merged into; leave lora_bias out"
    if start in ("True", "False", "gaussian"):
        return None
    supported = {"olora": (nn.Linear,), "mica": (nn.Linear, Conv1D, nn.Embedding)}.get(start, (nn.Linear, Conv1D))
    if isinstance(layer, ParamWrapper) or not isinstance(base, supported):
        return "lora.init_lora_weights", f"PEFT has no {start} for {{}}, a {type(base).__name__}; use true"
    if start != "orthogonal" and rank > min(layer.in_features, layer.out_features):
        return "lora.r", f"{rank} is more than the rank of {{}}, from which {start} starts; lower it"
    return None


if __name__ == "__main__":
    print(json.dumps(_find_problem(sys.argv[1], sys.argv[2] == "True", json.loads(sys.argv[3]))))
