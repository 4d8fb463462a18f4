"""The longest batch is tried before a training, and leaves no trace in it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from stages.base import UserError
from stages.sft import WITConfig, WITTrainer
from stages.training import loop
from stages.training.probe import try_longest_batch
from tests.pipeline.run.test_command import command
from tests.stages.sft.test_loss import EIGHT
from tests.stages.training.test_lora import TRAIN, dpo, sft
from tests.tiny import byte_tokenizer, tiny_model

LONGEST = max(len(row["prompt"] + row["completion"]) + 1 for row in EIGHT)


class Try(TrainerCallback):
    """Tries the longest batch as a training on a GPU does."""

    trainer: Any
    batch: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        self.batch = try_longest_batch(self.trainer)
        assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
        assert all(parameter.grad is None for parameter in self.trainer.model.parameters())


def trainer(folder: Path, cls: type[WITTrainer] = WITTrainer, dropout: float = 0.1, **fields: Any) -> WITTrainer:
    model = tiny_model()
    model.config.attention_dropout = dropout
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = dropout
    fields = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "activation_checkpointing": False,
        "logging_steps": 1,
    } | fields
    fields |= {"report_to": "none", "bf16": False, "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2}
    args = WITConfig(output_dir=str(folder), prompt_loss_weight=0.5, **fields)
    return cls(model, args, Dataset.from_list(EIGHT), processing_class=byte_tokenizer())


@pytest.mark.parametrize("fields", [{}, {"packing": True, "max_length": 90}, {"activation_checkpointing": True}])
def test_a_training_ends_with_the_same_bytes(tmp_path: Path, fields: dict[str, Any]) -> None:
    """With dropout, whose random numbers the pass uses."""
    callback, logs, weights = Try(), [], []
    for callbacks in ([], [callback]):
        training = trainer(tmp_path, **fields)
        callback.trainer = training
        for each in callbacks:
            training.add_callback(each)
        training.train()
        logs.append([loop._without_times(row) for row in training.state.log_history])
        weights.append(training.model.state_dict())
    assert callback.batch.rows == 2
    assert logs[0] == logs[1]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("run", [sft, dpo])
def test_stages_publish_the_same_bytes(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    plain = run(tmp_path / "plain", model_folder, train=TRAIN, lora=None)

    class Tried(loop.Checkpoints):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            super().on_train_begin(*args, **kwargs)
            try_longest_batch(self.trainer)

    monkeypatch.setattr(loop, "Checkpoints", Tried)
    tried = run(tmp_path / "tried", model_folder, train=TRAIN, lora=None)
    assert (tried / "training_log.jsonl").read_bytes() == (plain / "training_log.jsonl").read_bytes()
    first, second = (load_file(folder / "model.safetensors") for folder in (plain, tried))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Small(WITTrainer):
    """Runs out of memory beyond a number of positions, as a GPU does."""

    positions = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if inputs["input_ids"].numel() > self.positions:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    ("positions", "key", "text"),
    [
        (
            2 * LONGEST,
            "train.per_device_train_batch_size",
            "; 2 fit, .* set it to 2 and train.gradient_accumulation_steps to 8",
        ),
        (
            LONGEST,
            "train.per_device_train_batch_size",
            "; 1 fit, .* set it to 1 and train.gradient_accumulation_steps to 16",
        ),
        (LONGEST - 1, "train.max_length", f"nor does one of them; a row of {LONGEST // 2} tokens does"),
        (3, "model", "nor does a row of .* use lora"),
    ],
)
def test_what_would_fit(tmp_path: Path, positions: int, key: str, text: str) -> None:
    training = trainer(tmp_path, Small, per_device_train_batch_size=8)
    training.positions = positions
    callback = Try()
    callback.trainer = training
    training.add_callback(callback)
    with pytest.raises(
        UserError, match=f"^a step with the 8 longest rows, of up to {LONGEST} tokens, .*{text}"
    ) as caught:
        training.train()
    assert caught.value.key == key


RECIPE = """\
name: r
model: {model}
matrix: {{prompt: [0, 0.5]}}
stages:
  wit:
    kind: sft
    data: {{train: ./rows.jsonl}}
    weights: {{prompt: "${{matrix.prompt}}", completion: 1}}
    train: {{per_device_train_batch_size: 3, max_steps: 1, use_cpu: true, bf16: false, report_to: tensorboard}}
  dpo:
    kind: dpo
    model: wit
    data: {{train: ./pairs.jsonl}}
    train: {{per_device_train_batch_size: 2, max_steps: 1, use_cpu: true, bf16: false}}
"""


@pytest.mark.long
def test_check_with_probe(tmp_path: Path, model_folder: Path) -> None:
    """Each training is tried once, also that of a model which does not exist yet; nothing is published."""
    (tmp_path / "r.yaml").write_text(RECIPE.format(model=model_folder))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EIGHT if row["prompt"]))
    pairs = [{"prompt": "Sky? ", "chosen": "It is blue.", "rejected": f"No {n}."} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    done = command(tmp_path, "--check", "--probe", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    probes = json.loads(done.stdout)["probes"]
    assert list(probes) == ["wit[prompt=0]", "dpo[prompt=0]"]
    assert probes["wit[prompt=0]"]["rows"] == 3
    assert probes["wit[prompt=0]"]["tokens"] == LONGEST
    assert probes["wit[prompt=0]"]["seconds"] > 0
    assert probes["dpo[prompt=0]"]["memory"].endswith("GiB")
    assert not list(tmp_path.glob("runs/store/*"))
    assert not list(tmp_path.rglob("events.out*"))
    shown = command(tmp_path, "--check", "--probe").stdout
    assert f"wit[prompt=0]: 3 longest rows, up to {LONGEST} tokens: " in shown
    alone = command(tmp_path, "--probe")
    assert alone.returncode == 2
    assert "write --check --probe" in alone.stderr
