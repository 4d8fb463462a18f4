"""Constraints that TRL, transformers and PEFT check only when training starts, so that a recipe is checked before.

These are the likeliest mistakes, not all: the libraries' own checks still run.
"""

import json
from pathlib import Path
from typing import Any

_RULES = json.loads(Path(__file__).with_name("option_rules.json").read_text())

RESERVED: dict[str, dict[str, str]] = _RULES["reserved"]
"""Class or command in options.json, or `train` for both configs of TRL -> an option that a recipe cannot set, where `*`
matches any ending -> reason or remedy."""

RANGES: dict[str, dict[str, Any]] = _RULES["ranges"]
"""Option -> range of its number, as arguments of pydantic's Field."""

EXCLUSIVE: list[tuple[str, str]] = _RULES["exclusive"]
"""Options of which at most one may be set."""

REFUSED_VALUES: dict[str, dict[str, dict[str, str]]] = _RULES["refused_values"]
"""Class -> option -> value that has no effect or fails once training starts -> reason."""

ONLY_WITH: dict[str, tuple[str, list[str]]] = _RULES["only_with"]
"""Option -> another option, and the values of that without which it has no effect; none if any value will do."""

SCHEDULER_OPTIONS: dict[str, list[str]] = _RULES["scheduler_options"]
SCHEDULER_NEEDS: dict[str, list[str]] = _RULES["scheduler_needs"]
"""Value of lr_scheduler_type -> keys that lr_scheduler_kwargs may have; keys of which it must have one."""

OPTIMIZER_PACKAGES: dict[str, str] = _RULES["optimizer_packages"]
"""Value of optim -> the module that it needs."""


def find_conflict(name: str, options: dict[str, Any]) -> tuple[str, str] | None:
    """Return the first option of the class `name` that does not fit the others, and the problem; None if all fit."""
    for key, reasons in REFUSED_VALUES.get(name, {}).items():
        if str(options.get(key)) in reasons:
            return key, f"cannot be {options[key]}: {reasons[str(options[key])]}"
    for key, (other, values) in ONLY_WITH.items():
        selected = options.get(other) or []
        selected = selected if isinstance(selected, list) else [selected]
        if options.get(key) and not (set(selected) & set(values) if values else selected):
            return key, f"has no effect unless {other} is {' or '.join(values) or 'set'}; set that, or leave this out"
    scheduler = options.get("lr_scheduler_type") or "linear"
    scheduler_keys = list(options.get("lr_scheduler_kwargs") or {})
    needs = SCHEDULER_NEEDS.get(scheduler, scheduler_keys)
    if needs and not {*needs} & {*scheduler_keys}:
        return "lr_scheduler_type", f"{scheduler} needs lr_scheduler_kwargs with {' or '.join(needs)}"
    known = SCHEDULER_OPTIONS.get(scheduler, scheduler_keys)
    for key in (key for key in scheduler_keys if key not in known):
        return f"lr_scheduler_kwargs.{key}", f"is no option of {scheduler}, which has {', '.join(known) or 'none'}"
    for first, second in EXCLUSIVE:
        if options.get(first) and options.get(second):
            return second, f"cannot be set together with {first}; leave one out"
    for name in ("logging_steps", "eval_steps", "warmup_steps"):
        steps = options.get(name) or 0
        if steps > 1 and steps != int(steps):
            return name, f"is {steps}; set a whole number of steps, or a fraction of all steps below 1"
    if scheduler in ("reduce_lr_on_plateau", "greedy") and options.get("eval_strategy", "no") == "no":
        return "lr_scheduler_type", f"{scheduler} follows the evaluation loss; set eval_strategy"
    for kernel in ("fused_linear_cross_entropy", "cross_entropy"):
        if (options.get("liger_kernel_config") or {}).get(kernel):
            return f"liger_kernel_config.{kernel}", "would compute another loss than the stage's; leave it out"
    if isinstance(options.get("target_modules"), str) and options.get("layers_to_transform") is not None:
        return "layers_to_transform", "has no effect if target_modules is one text; make that a list"
    return None
