"""What would make a training stage fit: changes of its recipe, estimated anew one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stages.estimate.result import Given, Remedy
from stages.training_config import TrainingStage

if TYPE_CHECKING:
    from stages.estimate.training import Training

SHOWN = 3
"""How many are told."""
DEVICES = (2, 4, 8, 16, 32, 64)


def remedies(stage: TrainingStage, given: Given, longest: int, rows: int | None) -> list[Remedy]:
    """The first few that fit, those that leave the result as it is before those that do not."""
    from stages.estimate.training import Training, read_config

    config = read_config(given.paths["model"], stage.trust_remote_code)
    found: list[Remedy] = []
    if given.libraries > given.room:
        return found
    for changes in _candidates(Training(stage, given, config)):
        changed = type(stage).model_validate(_laid_over(stage.model_dump(), changes))
        memory = Training(changed, given, config).memory(longest, rows, by_part=False).total
        if memory <= given.room:
            found.append(Remedy(changes=[_told(key, value) for key, value in changes.items()], memory=memory))
            if len(found) == SHOWN:
                break
    return found


def _candidates(training: Training) -> Iterator[dict[str, Any]]:
    """Key -> value, from the mildest to the hardest."""
    stage, options = training.stage, training.options
    mild: dict[str, Any] = {}
    if not options["gradient_checkpointing"]:
        mild["train.gradient_checkpointing"] = True
        yield dict(mild)
    batch, accumulation = options["per_device_train_batch_size"], options["gradient_accumulation_steps"]
    for parts in (2, 4, 8, 16, 32, 64, 128):
        if batch % parts == 0:
            mild["train.per_device_train_batch_size"] = batch // parts
            mild["train.gradient_accumulation_steps"] = accumulation * parts
            if batch // parts in (1, batch // 4):
                yield dict(mild)
    if training.dtype.itemsize > 2:
        given = options["model_init_kwargs"] or {}
        yield mild | {"train.model_init_kwargs": given | {"dtype": "bfloat16"}}
    if stage.lora is None and stage.reads_weights:
        lora = {"lora": {"r": 16, "target_modules": "all-linear"}}
        yield mild | lora
        yield mild | lora | {"quantization": {"load_in_4bit": True}}
    elif stage.quantization is None and stage.lora is not None:
        yield mild | {"quantization": {"load_in_4bit": True}}
    if training.device == "cuda" and (stage.launch is None or stage.launch.sharding is None):
        for count in DEVICES:
            yield mild | {"launch": {"num_processes": count, "use_fsdp": True}}


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
