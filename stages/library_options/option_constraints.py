"""What TRL, transformers and PEFT refuse only when training starts, said here so that a recipe can be checked before.

The likeliest mistakes, not all: the libraries' own checks still run.
"""

from __future__ import annotations

from typing import Any

_COUNT = {"ge": 1}
_NOT_NEGATIVE = {"ge": 0}
_MOMENTUM = {"ge": 0, "lt": 1}
_SHARE = {"ge": 0, "le": 1}
_POSITIVE = {"gt": 0}

BOUNDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "precompute_ref_batch_size"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), _COUNT),
    **dict.fromkeys(("max_length", "dataset_num_proc", "ddp_timeout", "ref_model_sync_steps", "r"), _COUNT),
    **dict.fromkeys(("dataloader_prefetch_factor", "lora_alpha"), _COUNT),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay", "neftune_noise_alpha"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"), _MOMENTUM),
    **dict.fromkeys(("ld_alpha", "ref_model_mixup_alpha"), _SHARE),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "beta", "discopop_tau"), _POSITIVE),
    "label_smoothing": {"ge": 0, "lt": 0.5},
    "max_steps": {"ge": -1},
}
"""Field -> what its number must be."""

EXCLUSIVE = (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval"), ("use_dora", "lora_bias"))
"""Fields of which at most one may be set."""

NEEDED = {
    "dataloader_prefetch_factor": "dataloader_num_workers",
    "dataloader_persistent_workers": "dataloader_num_workers",
    "layers_pattern": "layers_to_transform",
}
"""A field -> the one without which it is refused."""

OWN_LOSS = ("fused_linear_cross_entropy", "cross_entropy")
"""Kernels of Liger that would compute a loss in place of the trainer's own."""

BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")
"""Values of lr_scheduler_type that follow the loss on evaluation data."""


def misfit(given: dict[str, Any]) -> tuple[str, str] | None:
    """The first key of what a recipe sets that does not go with the others, and what is wrong with it."""
    for one, other in EXCLUSIVE:
        if given.get(one) and given.get(other):
            return other, f"cannot be set together with {one}; leave one out"
    for name, needed in NEEDED.items():
        if given.get(name) and not given.get(needed):
            return name, f"needs {needed}; set that too, or leave this out"
    for name in ("logging_steps", "eval_steps", "warmup_steps"):
        steps = given.get(name) or 0
        if steps > 1 and steps != int(steps):
            return name, f"is a whole number of steps, or below 1 a fraction of all steps; found {steps}"
    if given.get("lr_scheduler_type") in BY_EVALUATION and given.get("eval_strategy", "no") == "no":
        return "lr_scheduler_type", f"{given['lr_scheduler_type']} follows the evaluation loss; set eval_strategy"
    for kernel in OWN_LOSS:
        if (given.get("liger_kernel_config") or {}).get(kernel):
            return f"liger_kernel_config.{kernel}", "would compute another loss than the stage's; leave it out"
    if isinstance(given.get("target_modules"), str) and given.get("layers_to_transform") is not None:
        return "layers_to_transform", "has no effect where target_modules is one text; make that a list"
    if given.get("init_lora_weights") == "loftq" and not given.get("loftq_config"):
        return "init_lora_weights", "loftq needs loftq_config"
    return None
