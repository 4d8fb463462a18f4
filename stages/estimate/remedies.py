"""What would make a training stage fit: changes of its recipe, estimated anew one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stages.estimate.result import Given, Remedy
from stages.training.config import TrainingStage

if TYPE_CHECKING:
    from stages.estimate.training import Training

SHOWN = 3
"""How many are told."""
DEVICES = (2, 4, 8, 16, 32, 64)


def remedies(stage: TrainingStage, given: Given, longest: int, rows: int | None) -> list[Remedy]:
    """The first few that fit, those that leave the result as it is before those that change it."""
    from stages.estimate.training import Training, read_config

    config = read_config(given.paths["model"], stage.trust_remote_code)
    found: list[Remedy] = []
    if given.libraries > given.room:
        return found
    for changes, same in _candidates(Training(stage, given, config)):
        changed = type(stage).model_validate(_laid_over(stage.model_dump(), changes))
        memory = Training(changed, given, config).memory(longest, rows, by_part=False).total
        if memory <= given.room:
            told = [_told(key, value) for key, value in changes.items()]
            found.append(Remedy(changes=told, memory=memory, same_result=same))
            if len(found) == SHOWN:
                break
    return found


def _candidates(training: Training) -> Iterator[tuple[dict[str, Any], bool]]:
    """Key -> value, from the mildest to the hardest, and whether training takes the same steps, up to rounding."""
    stage, options = training.stage, training.options
    mild: dict[str, Any] = {}
    if training.keeps_reference and stage.lora is None and not options["sync_ref_model"]:
        mild["train.precompute_ref_log_probs"] = True
        yield dict(mild), True
    if not options["gradient_checkpointing"]:
        mild |= {"train.activation_checkpointing": True}
        yield dict(mild), True
    batch, accumulation = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
    for parts in (2, 4, 8, 16, 32, 64, 128):
        if batch % parts == 0:
            mild["train.per_device_train_batch_size"] = batch // parts
            mild["train.gradient_accumulation_steps"] = accumulation * parts
            if batch // parts in (1, batch // 4):
                yield dict(mild), True
    if training.device == "cuda":
        yield from _sharded(training, mild)
    if training.dtype.itemsize > 2:
        given = options["model_init_kwargs"] or {}
        yield mild | {"train.model_init_kwargs": given | {"dtype": "bfloat16"}}, False
    if stage.lora is None and stage.reads_weights:
        lora = {"lora": {"r": 16, "target_modules": "all-linear"}}
        yield mild | lora, False
        yield mild | lora | {"quantization": {"load_in_4bit": True}}, False
    elif stage.quantization is None and stage.lora is not None:
        yield mild | {"quantization": {"load_in_4bit": True}}, False


def _sharded(training: Training, mild: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bool]]:
    """Split over GPUs, as many as now or more, with as many rows a step as now, where these can be shared out."""
    launch, options = training.stage.launch, training.options
    now = launch.num_processes if launch else 1
    batch = mild.get("train.per_device_train_batch_size", options["per_device_train_batch_size"])
    accumulation = mild.get("train.gradient_accumulation_steps", options["gradient_accumulation_steps"])
    sharding = {} if launch and launch.sharding else {"use_fsdp": True}
    for count in DEVICES:
        if count < now or (count == now and not sharding):
            continue
        each, rest = divmod(batch * accumulation * now, batch * count)
        changes = mild | {"launch": (launch.model_dump() if launch else {}) | sharding | {"num_processes": count}}
        if max(each, 1) != options["gradient_accumulation_steps"]:
            changes["train.gradient_accumulation_steps"] = max(each, 1)
        yield changes, rest == 0 and each > 0


def _laid_over(section: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    changed = json.loads(json.dumps(section))
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = changed
        for part in parents:
            place = place[part]
        place[last] = value
    return changed


def _told(key: str, value: Any) -> str:
    return f"{key}: {json.dumps(value)}".replace('"', "")
