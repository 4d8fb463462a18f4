"""The dpo stage: its reference is the model that training starts from, with and without LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.base import Context, Input
from stages.dpo.config import DPOStage
from stages.dpo.stage import run

PAIRS = [
    {"prompt": "Sky? ", "chosen": "blue", "rejected": "a green one"},
    {"prompt": "Snow? ", "chosen": "white", "rejected": "red"},
]


def run_stage(folder: Path, model: Path, **section: Any) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    """Run the stage for 20 steps on both pairs; return its metrics, its log and the folder that it publishes."""
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    train = {
        "max_steps": 20, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3,
        "activation_checkpointing": False, "use_cpu": True,
    }  # fmt: skip
    for name in ("out", "scratch"):
        (folder / name).mkdir()
    context = Context(
        recipe="r",
        step="dpo",
        config=DPOStage.model_validate({"data": {"train": "./pairs.jsonl"}, "train": train, **section}),
        inputs={"model": Input(model), "train": Input(pairs)},
        out=folder / "out",
        scratch=folder / "scratch",
        checkpoints=folder / "checkpoints",
        cache=folder / "cache",
        progress=lambda *_: None,
    )
    metrics = run(context)
    log = [json.loads(line) for line in (folder / "out" / "training_log.jsonl").read_text().splitlines()]
    return metrics.to_json(), log, folder / "out"


LORA = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear"}


@pytest.mark.parametrize("section", [{}, {"lora": LORA}], ids=["full", "lora"])
def test_reference_is_the_starting_point(tmp_path: Path, model_folder: Path, section: dict[str, Any]) -> None:
    """While model and reference agree, the loss is -log sigmoid(0) = ln 2 and margins are 0; then the loss falls."""
    metrics, log, out = run_stage(tmp_path, model_folder, **section)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert log[19]["loss"] < 0.9 * math.log(2)
    assert metrics["reward_margin"] > 0
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
