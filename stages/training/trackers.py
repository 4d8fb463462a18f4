"""What trackers are told of a training (`train.report_to`), and where those write that keep files of their own.

Reporting is transformers' own: a recipe's fields choose the trackers, and their usual environment variables say the
rest. Their files hold times, so they lie beside the run's logs and are no part of what is published.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import DPOTrainer, SFTTrainer

from stages.base import Context, Input
from stages.system.file_names import file_name


@dataclass
class Told:
    """Fields for a TRL config: trackers show all of its fields as the run's config."""

    recipe: str = ""
    """The recipe's name."""
    step: str = ""
    """The step's name, with its cell of the matrix."""
    weights: dict[str, Any] | None = None
    """The weights of the WIT loss that the model was tuned with, in this step or one before."""


def told(context: Context) -> dict[str, Any]:
    """The fields of `Told`, and TRL's run_name. Notes in the environment where trackers keep their files."""
    logs = context.logs or context.scratch
    if "tensorboard" in context.config.trackers:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(_tensorboard(context))
    if "wandb" in context.config.trackers:
        os.environ.setdefault("WANDB_DIR", str(logs))
        os.environ.setdefault("WANDB_CONSOLE", "off")  # the step's log is the pipeline's, which masks secrets in it
    return {
        "run_name": f"{context.recipe}/{context.step}",
        "recipe": context.recipe,
        "step": context.step,
        "weights": _weights(context.config.model_dump(), context.inputs.get("model")),
    }


@contextmanager
def one_run(trainer: SFTTrainer | DPOTrainer, context: Context, anew: bool) -> Iterator[None]:
    """Keep the trackers open until what stands inside has ended: they would end their run with the training, and take
    the evaluation after it for another one.

    `anew`: nothing goes on from an earlier attempt, whose files are removed.
    """
    if anew and "tensorboard" in context.config.trackers and trainer.is_world_process_zero():
        shutil.rmtree(_tensorboard(context), ignore_errors=True)
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    trackers = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
    ends = [tracker.on_train_end for tracker in trackers]
    for tracker in trackers:
        tracker.on_train_end = lambda *_, **__: None
    yield
    for end in ends:
        end(trainer.args, trainer.state, trainer.control, model=trainer.model, processing_class=trainer._tokenizer)


def _tensorboard(context: Context) -> Path:
    """The step's own folder, so that `tensorboard --logdir` of the one above shows all steps beside each other."""
    return (context.logs or context.scratch) / "tensorboard" / file_name(context.step)


def _weights(config: dict[str, Any], start: Input | None) -> dict[str, Any] | None:
    """The weights of the step's own section, or of the last one before it that had some."""
    if config.get("weights"):
        return {name: weight for name, weight in config["weights"].items() if weight is not None}
    return _weights(start.config, start.inputs.get("model")) if start else None
