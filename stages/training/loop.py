"""The training loop that sft and dpo share: defaults for the machine, checkpoints, progress, evaluation, publishing."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers import TrainerCallback

from stages.base import Context, UserError
from stages.data.dataset_cache import PreparedRows
from stages.data.reader import DROPPED_ROWS
from stages.records.metrics import Metrics
from stages.training.best_point import BestPoint, selection_arguments
from stages.training.checkpoints import CHECKPOINTS_KEPT, Checkpoints
from stages.training.model_card import write_card
from stages.training.probe import Probe
from stages.training.publishing import publish, subtracted_weights
from stages.training.trackers import open_trackers
from stages.training.trainer_internals import TRLTrainer, trained_tokens

_UNFREED: list[TRLTrainer] = []
"""Trainers of several ranks live until the process ends. Freeing one can deadlock: torch waits for a thread that waits
for Python's lock."""


def arguments(context: Context, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a TRL config: `fields`, of the recipe's `train` section, over our defaults.

    Raises UserError if this machine has no kernels for an option.
    """
    gpu = torch.cuda.is_available()
    if fields.get("use_liger_kernel") and not gpu:
        text = "Liger's kernels need a GPU, and there is none here; leave it out"
        raise UserError(text, "train.use_liger_kernel")
    defaults = {
        "bf16": gpu and torch.cuda.is_bf16_supported() and not fields.get("fp16"),
        "report_to": "none",
        "save_strategy": "no",  # Checkpoints decides; transformers would also save after the last step
        "disable_tqdm": True,
        "dataloader_pin_memory": gpu,
        "accelerator_config": {"non_blocking": gpu},  # else each tensor of a batch waits for the work before it
        "logging_nan_inf_filter": False,  # a loss that is not a number must show, not be averaged away
    }
    fixed = {"output_dir": str(context.checkpoints), "save_total_limit": CHECKPOINTS_KEPT, "seed": context.config.seed}
    return defaults | _current_names(fields) | fixed | selection_arguments(context.config)


def _current_names(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace option names that transformers 5 deprecates; a new name that is set wins. Fingerprints keep either."""
    fields = dict(fields)
    checkpointing = fields.pop("gradient_checkpointing", True)  # TRL's default, which it still has under the old name
    kwargs = fields.pop("gradient_checkpointing_kwargs", None)
    if fields.get("activation_checkpointing") is None:
        fields["activation_checkpointing"] = bool(checkpointing)
    if fields.get("activation_checkpointing_kwargs") is None:
        fields["activation_checkpointing_kwargs"] = kwargs
    return fields


class Progress(TrainerCallback):
    """Reports progress to the console, and stops the training when the loss is not a finite number."""

    def __init__(self, trainer: TRLTrainer, context: Context) -> None:
        self.trainer, self.context = trainer, context
        self.note = ""
        self._since: tuple[float, int] | None = None
        """When the steps since the last log began, and the tokens before them."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._since is None:
            self._since = time.perf_counter(), trained_tokens(self.trainer)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.context.progress(state.global_step, state.max_steps, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or (loss := logs.get("loss")) is None:
            return
        self.note = f"loss {loss:.3f}, {self._speed(logs):,.0f} tokens/s"
        self.note += f", MFU {logs['mfu']:.2f}" if "mfu" in logs else ""
        self.context.progress(state.global_step, state.max_steps, self.note)
        if not math.isfinite(loss):
            raise UserError(
                f"step {state.global_step}: the loss is {loss} at learning rate {logs['learning_rate']:.3g};"
                " lower train.learning_rate or look at the rows of this step"
            )

    def after_training(self, activity: str) -> None:
        """Report what happens after the last step."""
        state = self.trainer.state
        self.context.progress(state.global_step, state.max_steps, ", ".join(filter(None, (self.note, activity))))

    def _speed(self, logs: dict[str, Any]) -> float:
        """Tokens per second since the last log: from WITTrainer's log, else counted here."""
        start, tokens_before = self._since or (0.0, 0)
        self._since = None
        speed = (trained_tokens(self.trainer) - tokens_before) / (time.perf_counter() - start)
        return logs.get("tokens_per_second", speed)


def train(
    trainer: TRLTrainer,
    context: Context,
    splits: Mapping[str, PreparedRows],
    sums: Mapping[str, torch.Tensor],
    logged: Mapping[str, str],
) -> Metrics:
    """Train, evaluate and publish the model, from the last checkpoint of an interrupted attempt if there is one.

    Every rank calls it; only rank 0 publishes.

    Args:
        splits: The rows of `train` and, if there is one, `eval`, for the metrics and the card.
        sums: The trainer's running sums beyond TRL's own; they are saved and restored in place.
        logged: Metric -> the key that has its value in the last log of a step.
    """
    if trainer.accelerator.num_processes > 1:
        _UNFREED.append(trainer)
    checkpoints = Checkpoints(trainer, "save_steps" in context.config.train.model_dump(), sums)
    progress = Progress(trainer, context)
    best_point = BestPoint(trainer, context) if context.config.select else None
    for callback in (progress, checkpoints, best_point):
        if callback:
            trainer.add_callback(callback)
    checkpoint = checkpoints.resume_from
    sharding = context.config.launch.sharding if context.config.launch else None
    if context.only_probe or (trainer.accelerator.device.type == "cuda" and not checkpoint and not sharding):
        trainer.add_callback(Probe(trainer, context))
    assert trainer.model is not None
    for name, parameter in trainer.model.named_parameters():
        if "ref" in name.split("."):  # DPO's reference, which PEFT leaves trainable in embeddings of a narrow dtype
            parameter.requires_grad_(False)
    subtracted = subtracted_weights(trainer.model, context.config.lora)
    with open_trackers(trainer, context, resumed=checkpoint is not None):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        selection: dict[str, Any] = best_point.result() if best_point else {"notes": []}
        evaluation: dict[str, Any] = {}
        if trainer.eval_dataset is not None:
            progress.after_training("evaluating")
            evaluation = trainer.evaluate()
    metrics: dict[str, Any] = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "tokens": trained_tokens(trainer),
        "seconds": round(checkpoints.elapsed(), 1),
        **selection,
        "data": {name: asdict(rows.stats) for name, rows in splits.items()},
        "notes": checkpoints.notes
        + selection["notes"]
        + [f"{name} data: {note}" for name, rows in splits.items() for note in rows.notes],
    }
    metrics |= {name: value for name, value in _without_times(evaluation).items() if name != "epoch"}
    if logged:
        last_log = next((row for row in reversed(trainer.state.log_history) if set(logged.values()) <= row.keys()), {})
        metrics |= {name: last_log.get(figure) for name, figure in logged.items()}
    for name in ("train_loss", "eval_loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise UserError(f"the {name} is {metrics[name]}; lower train.learning_rate or look at the rows")
    lines = [json.dumps(_without_times(row), sort_keys=True) + "\n" for row in trainer.state.log_history]
    (context.out / "training_log.jsonl").write_text("".join(lines))
    progress.after_training("writing the model")
    publish(trainer, context, subtracted)
    if dropped := [line for rows in splits.values() for line in rows.dropped]:
        (context.out / DROPPED_ROWS).write_text("".join(f"{line}\n" for line in dropped), encoding="utf-8")
    write_card(context, Metrics(**metrics))
    return Metrics(**metrics)


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Drop the values that differ between two equal trainings."""
    return {
        key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second", "_per_sec", "mfu"))
    }
