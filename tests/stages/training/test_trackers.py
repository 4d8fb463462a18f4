"""Trackers close when a training ends, and also when it fails."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stages.base import Context, Input, UserError
from stages.sft.config import SFTStage
from stages.sft.stage import run
from tests.stages.training.test_lora import ROWS, TRAIN


def train(folder: Path, logs: Path, model: Path, **options: Any) -> None:
    """Run an sft stage that reports to TensorBoard."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    section = {"train": TRAIN | {"report_to": ["tensorboard"]} | options, "data": {"train": "./rows.jsonl"}}
    run(
        Context(
            recipe="r",
            step="s",
            config=SFTStage.model_validate(section | {"weights": {"prompt": 0.5, "completion": 1}}),
            inputs={"model": Input(model), "train": Input(rows)},
            out=folder / "out",
            scratch=folder / "scratch",
            checkpoints=folder / "checkpoints",
            cache=folder / "cache",
            progress=lambda *_: None,
            logs=logs,
        )
    )


def logged_steps(logs: Path) -> list[int]:
    """The steps with a loss in TensorBoard's files."""
    events = EventAccumulator(str(logs / "tensorboard" / "s")).Reload()
    return [event.step for event in events.Scalars("train/loss")]


def test_a_failed_training_closes_its_trackers(tmp_path: Path, model_folder: Path) -> None:
    """TensorBoard's writer ends the thread that writes its file when it closes. The next attempt starts a new file."""
    threads = set(threading.enumerate())
    with pytest.raises(UserError, match="the loss is no"):
        train(tmp_path / "failed", tmp_path / "logs", model_folder, learning_rate=1e30)
    assert set(threading.enumerate()) <= threads
    failed_after = len(logged_steps(tmp_path / "logs"))
    assert 0 < failed_after < TRAIN["max_steps"]
    train(tmp_path / "repeated", tmp_path / "logs", model_folder)
    assert logged_steps(tmp_path / "logs") == [1, 2, 3, 4, 5, 6]
