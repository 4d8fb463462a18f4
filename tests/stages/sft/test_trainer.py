"""WITTrainer used alone: what it refuses, what it leaves out, and how it evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

from stages.base import BadInput
from stages.sft import WITConfig, WITTrainer
from tests.stages.sft.test_loss import ROWS, formula
from tests.tiny import byte_tokenizer, tiny_model


def config(folder: Path, **fields: Any) -> WITConfig:
    return WITConfig(output_dir=str(folder), report_to="none", bf16=False, use_cpu=True, **fields)


def trainer(folder: Path, rows: list[dict], eval_rows: list[dict] | None = None, **fields: Any) -> WITTrainer:
    return WITTrainer(
        model=tiny_model(dtype=torch.float64),
        args=config(folder, **fields),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(eval_rows) if eval_rows else None,
        processing_class=byte_tokenizer(),
    )


def test_it_is_an_sft_trainer() -> None:
    assert issubclass(WITTrainer, SFTTrainer)


def test_defaults_are_conventional_instruction_tuning(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert (args.prompt_loss_weight, args.completion_loss_weight) == (0.0, 1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_loss_weight": -0.1},
        {"completion_loss_weight": float("nan")},
        {"prompt_loss_weight": 0.0, "completion_loss_weight": 0.0},
        {"packing": True},
        {"padding_free": True, "max_length": None},
        {"loss_type": "dft"},
    ],
)
def test_what_cannot_be_weighed_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"weight|not supported|WIT loss"):
        config(tmp_path, **fields)


def test_rows_with_nothing_to_learn_are_left_out(tmp_path: Path) -> None:
    """At max_length 8 the long prompt leaves no completion token; with weight on prompts it stays."""
    rows = [{"prompt": "abc", "completion": "d"}, {"prompt": "a prompt of many letters", "completion": "d"}]
    assert len(trainer(tmp_path, rows, max_length=8).train_dataset) == 1
    assert len(trainer(tmp_path, rows, max_length=8, prompt_loss_weight=0.1).train_dataset) == 2
    with pytest.raises(BadInput, match="no row of the train data has a token to learn"):
        trainer(tmp_path, rows[1:], max_length=8)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_eval_loss_does_not_depend_on_the_batches(tmp_path: Path, batch: int) -> None:
    """It is the formula over all rows, not a mean of the batches' means."""
    model = trainer(
        tmp_path, ROWS, ROWS, prompt_loss_weight=0.4, completion_loss_weight=0.6, per_device_eval_batch_size=batch
    )
    expected = formula(tiny_model(dtype=torch.float64), (0.4, 0.6)).item()
    assert model.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
