"""Constraints that TRL, transformers and PEFT check only when training starts, so that a recipe is checked before.

These are the likeliest mistakes, not all: the libraries' own checks still run.
"""

from __future__ import annotations

from typing import Any

_COUNT = {"ge": 1}
_NOT_NEGATIVE = {"ge": 0}
_BELOW_1 = {"ge": 0, "lt": 1}
_SHARE = {"ge": 0, "le": 1}
_POSITIVE = {"gt": 0}

RANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "precompute_ref_batch_size"), _COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"), _COUNT),
    **dict.fromkeys(("max_length", "dataset_num_proc", "ddp_timeout", "ref_model_sync_steps", "r"), _COUNT),
    **dict.fromkeys(("dataloader_prefetch_factor", "lora_alpha"), _COUNT),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), _NOT_NEGATIVE),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay", "neftune_noise_alpha"), _NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"), _BELOW_1),
    **dict.fromkeys(("ld_alpha", "ref_model_mixup_alpha"), _SHARE),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "beta", "discopop_tau"), _POSITIVE),
    "label_smoothing": {"ge": 0, "lt": 0.5},
    "max_steps": {"ge": -1},
}
"""Option -> range of its number, as arguments of pydantic's Field."""

EXCLUSIVE = (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval"), ("use_dora", "lora_bias"))
"""Options of which at most one may be set."""

REQUIRED = {
    "dataloader_prefetch_factor": "dataloader_num_workers",
    "dataloader_persistent_workers": "dataloader_num_workers",
    "layers_pattern": "layers_to_transform",
}
"""Option -> the option that it requires."""


def find_conflict(options: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first option that does not fit the others, and the problem; None if all fit."""
    for first, second in EXCLUSIVE:
        if options.get(first) and options.get(second):
            return second, f"cannot be set together with {first}; leave one out"
    for name, required in REQUIRED.items():
        if options.get(name) and not options.get(required):
            return name, f"needs {required}; set that too, or leave this out"
    for name in ("logging_steps", "eval_steps", "warmup_steps"):
        steps = options.get(name) or 0
        if steps > 1 and steps != int(steps):
            return name, f"is {steps}; set a whole number of steps, or a fraction of all steps below 1"
    scheduler = options.get("lr_scheduler_type")
    if scheduler in ("reduce_lr_on_plateau", "greedy") and options.get("eval_strategy", "no") == "no":
        return "lr_scheduler_type", f"{scheduler} follows the evaluation loss; set eval_strategy"
    for kernel in ("fused_linear_cross_entropy", "cross_entropy"):
        if (options.get("liger_kernel_config") or {}).get(kernel):
            return f"liger_kernel_config.{kernel}", "would compute another loss than the stage's; leave it out"
    if isinstance(options.get("target_modules"), str) and options.get("layers_to_transform") is not None:
        return "layers_to_transform", "has no effect if target_modules is one text; make that a list"
    if options.get("init_lora_weights") == "loftq" and not options.get("loftq_config"):
        return "init_lora_weights", "loftq needs loftq_config"
    return None
