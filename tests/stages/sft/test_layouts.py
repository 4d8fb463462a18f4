"""The same loss in every layout: an optimiser step has the formula's gradients, however rows form batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from stages.sft import WITConfig, WITTrainer
from tests.stages.sft.test_loss import EIGHT, ROWS, WEIGHTS, assert_gradients, formula, train_one_step
from tests.tiny import byte_tokenizer, tiny_model

PACKED = {"packing": True, "max_length": 120}
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "8 x 1": (8, 1, {}),
    "1 x 8": (1, 8, {}),
    "3 x 3, the last with 2": (3, 3, {}),
    "padded to 64": (8, 1, {"pad_to_multiple_of": 64}),
    "gradient checkpointing": (4, 2, {"activation_checkpointing": True}),
    "packed": (8, 1, PACKED),
    "packed, 1 x 8": (1, 8, PACKED),
    "packed, gradient checkpointing": (8, 1, PACKED | {"activation_checkpointing": True}),
    "without padding": (4, 2, {"padding_free": True}),
    "packed, without padding": (8, 1, PACKED | {"padding_free": True}),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process(tmp_path: Path, layout: str, weights: tuple[float, float]) -> None:
    assert_formula(tmp_path, layout, weights)


def assert_formula(folder: Path, layout: str, weights: tuple[float, float], **device: Any) -> None:
    """Check one step over EIGHT in a layout against the formula; `device` holds fields of the config."""
    batch, accumulation, fields = LAYOUTS[layout]
    model = tiny_model(dtype=torch.float64)
    expected = formula(model, weights, EIGHT)
    expected.backward()
    fields = fields | device
    loss, gradients = train_one_step(folder, weights, batch, accumulation, EIGHT, torch.float32, **fields)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(gradients, model, 1e-5)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_ragged_last_step(tmp_path: Path, weights: tuple[float, float]) -> None:
    """8 rows in steps of 2 x 3: the last step has two rows in one micro-batch. The learning rate is 0."""
    model = tiny_model(dtype=torch.float64)
    expected = formula(model, weights, ROWS[2:])
    expected.backward()
    fields = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential", "learning_rate": 0.0}
    loss, gradients = train_one_step(tmp_path, weights, 2, 3, ROWS * 2, torch.float32, **fields)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert_gradients(gradients, model, 1e-5)


RANKED = [
    {"weights": weights, "batch": batch, "accumulation": accumulation, "rows": 8, "fields": fields}
    for weights in WEIGHTS
    for batch, accumulation, fields in ((4, 1, {}), (1, 4, {}), (8, 1, PACKED))
] + [{"weights": (0.4, 0.6), "batch": 2, "accumulation": 1, "rows": 3, "fields": {}}]
"""Cases that two processes train in turn: 2 ranks x 4 rows, also packed; and 3 rows for 4 places."""


@pytest.mark.long
def test_two_ranks(tmp_path: Path) -> None:
    """Real processes over gloo. Row lengths differ, so a mean of the ranks' means would be wrong; with a row too few
    for the ranks, no row counts twice."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", __name__]
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*call, str(tmp_path)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for index, case in enumerate(RANKED):
        model = tiny_model(dtype=torch.float64)
        expected = formula(model, case["weights"], EIGHT[: case["rows"]])
        expected.backward()
        saved = torch.load(tmp_path / f"{index}.pt")
        assert saved["loss"] == pytest.approx(expected.item(), rel=1e-5), case
        assert_gradients(saved["gradients"], model, 1e-5)


@pytest.mark.parametrize(("weights", "completion_only"), [((0.0, 1.0), True), ((1.0, 1.0), False)])
def test_fifty_steps_of_trls_own_trainer(tmp_path: Path, weights: tuple[float, float], completion_only: bool) -> None:
    """At these weights every step equals the step of TRL's own trainer."""
    rows = [row | {"prompt": f"{n}: {row['prompt']}"} for n in range(10) for row in EIGHT]
    common = {
        "output_dir": str(tmp_path),
        "max_steps": 50,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "activation_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
    }
    trl_args = SFTConfig(**common, completion_only_loss=completion_only)
    wit_args = WITConfig(**common, prompt_loss_weight=weights[0], completion_loss_weight=weights[1])
    losses = []
    for cls, args in ((SFTTrainer, trl_args), (WITTrainer, wit_args)):
        trainer = cls(
            model=tiny_model(), args=args, train_dataset=Dataset.from_list(rows), processing_class=byte_tokenizer()
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert len(losses[0]) == 50
    assert losses[0][-1] < 0.8 * losses[0][0]  # the model learns
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


if __name__ == "__main__":
    for index, case in enumerate(RANKED):
        loss, gradients = train_one_step(
            Path(sys.argv[1]),
            tuple(case["weights"]),
            case["batch"],
            case["accumulation"],
            EIGHT[: case["rows"]],
            torch.float32,
            **case["fields"],
        )
        if os.environ["RANK"] == "0":
            torch.save({"loss": loss, "gradients": gradients}, Path(sys.argv[1]) / f"{index}.pt")
