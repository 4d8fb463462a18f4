"""Experiment trackers (`train.report_to`): what they show of a run, where their local files go, and when they close.

transformers does the reporting; the trackers' own environment variables configure them further. Their files contain
times, so they are written beside the run's logs and are not published.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from stages.base import Context, Input
from stages.system.file_names import file_name
from stages.training.trainer_internals import TRLTrainer


@dataclass
class TrackedFields:
    """Fields for a TRL config. Trackers show every field of the config as the run's config."""

    recipe: str = ""
    step: str = ""
    """The step's name, with its cell of the matrix."""
    weights: dict[str, Any] | None = None
    """The WIT loss weights of this training, or of the last one before it."""


def tracked_fields(context: Context) -> dict[str, Any]:
    """Return TrackedFields and TRL's run_name as keyword arguments, and set where trackers write their files."""
    if "tensorboard" in context.config.trackers:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(_tensorboard_folder(context))
    if "wandb" in context.config.trackers:
        os.environ.setdefault("WANDB_DIR", str(context.logs or context.scratch))
        os.environ.setdefault("WANDB_CONSOLE", "off")  # the pipeline keeps the step's log, with secrets masked
    return {
        "run_name": f"{context.recipe}/{context.step}",
        "recipe": context.recipe,
        "step": context.step,
        "weights": _loss_weights(context.config.model_dump(), context.inputs.get("model")),
    }


@contextmanager
def open_trackers(trainer: TRLTrainer, context: Context, resumed: bool) -> Iterator[None]:
    """Keep the trackers open until the block ends, and close them even if it fails.

    They would close when training ends, and report the evaluation after it as a second run.

    Args:
        resumed: Keep TensorBoard's files of an earlier attempt.
    """
    if not resumed and "tensorboard" in context.config.trackers and trainer.is_world_process_zero():
        shutil.rmtree(_tensorboard_folder(context), ignore_errors=True)
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    trackers = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
    on_train_end = [tracker.on_train_end for tracker in trackers]
    for tracker in trackers:
        tracker.on_train_end = lambda *_, **__: None

    def close() -> None:
        for end in on_train_end:
            options = {"model": trainer.model, "processing_class": trainer.processing_class}
            end(trainer.args, trainer.state, trainer.control, **options)

    try:
        yield
    except BaseException:
        with suppress(Exception):  # the user has to see the training's error, not a tracker's
            if "wandb" in context.config.trackers:  # its on_train_end leaves the run to wandb's exit handler
                import wandb

                wandb.finish(exit_code=1)
            close()
        raise
    close()


def _tensorboard_folder(context: Context) -> Path:
    """A folder for each step: `tensorboard --logdir` of the parent folder shows all steps side by side."""
    return (context.logs or context.scratch) / "tensorboard" / file_name(context.step)


def _loss_weights(config: dict[str, Any], start_model: Input | None) -> dict[str, Any] | None:
    """The weights in a training's config, else those of the last training before it that had some."""
    if config.get("weights"):
        return {name: weight for name, weight in config["weights"].items() if weight is not None}
    return _loss_weights(start_model.config, start_model.inputs.get("model")) if start_model else None
