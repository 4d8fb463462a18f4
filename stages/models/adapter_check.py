"""Put a LoRA adapter on a model without weights, to find what PEFT or TRL would refuse or ignore when training starts.

    python -m stages.models.adapter_check MODEL LORA

`check_adapter` runs that in a process of its own, because it takes seconds and needs torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from stages.base import UserError
from stages.system.module_command import module_command

_PLAIN = {"r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "init_lora_weights", "bias"}
"""Options that cannot fail on a module that `check_targets` has found."""


def check_adapter(model: Path, lora: dict[str, Any]) -> None:
    """Raise UserError, at a key of `lora`, if no adapter with these options can be trained on the model."""
    targets, start = lora.get("target_modules"), lora.get("init_lora_weights")
    is_list = isinstance(targets, list) and {"lm_head", "embed_out"}.isdisjoint(targets)
    if _PLAIN.issuperset(lora) and start in (None, True, False, "gaussian") and (is_list or targets == "all-linear"):
        return
    if (problem := _ask(str(model), json.dumps(lora, sort_keys=True))) is not None:
        raise UserError(problem[1], key=problem[0])


@cache  # the cells of a matrix mostly share it
def _ask(model: str, lora: str) -> list[str] | None:
    command, environment = module_command("stages.models.adapter_check", model, lora)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None  # no model was built; loading it will say why


def find_problem(model_path: str, lora: dict[str, Any]) -> tuple[str, str] | None:
    """Return a key and what is wrong with it; None if the adapter can be trained and merged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
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
            rows, indices = layer.get_base_layer().get_parameter("weight").shape[0], layer.token_indices["default"]
            if bad := [index for index in indices if not 0 <= index < rows]:
                return "lora.trainable_token_indices", f"the model has no token {bad[0]}, only 0 to {rows - 1}"
        if isinstance(layer, LoraLayer) and (problem := _problem_of_layer(layer, lora)):
            return problem[0], problem[1].format(name.removeprefix("base_model.model."))
    return None


def _problem_of_layer(layer: Any, lora: dict[str, Any]) -> tuple[str, str] | None:
    base, start, rank = layer.get_base_layer(), lora.get("init_lora_weights", True), layer.r["default"]
    if lora.get("lora_bias") and getattr(base, "bias", None) is None:
        return "lora.lora_bias", "{} has no bias that the adapter's bias could be merged into; leave lora_bias out"
    if start in (True, False, "gaussian"):
        return None
    supported = {"olora": ("Linear",), "mica": ("Linear", "Conv1D", "Embedding")}.get(start, ("Linear", "Conv1D"))
    if type(layer).__name__ == "ParamWrapper" or type(base).__name__ not in supported:
        return "lora.init_lora_weights", f"PEFT has no {start} for {{}}, a {type(base).__name__}; use true"
    if start != "orthogonal" and rank > min(layer.in_features, layer.out_features):
        return "lora.r", f"{rank} is more than the rank of {{}}, from which {start} starts; lower it"
    return None


if __name__ == "__main__":
    print(json.dumps(find_problem(sys.argv[1], json.loads(sys.argv[2]))))
