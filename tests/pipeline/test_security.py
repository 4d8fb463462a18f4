"""What a recipe, a model, a task or a data file of others could do to whoever runs it: through the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.pipeline.test_command import command, plan, write_world

CODE = """\
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from .helper_own import MARKER

with Path(MARKER).open("a") as file:
    file.write("imported\\n")

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        if output.logits is not None:
            output.logits = output.logits * 0.5
        return output
"""
RECIPE = """\
name: small
model: ./own
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
    train: &train {max_steps: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 1}
    trust_remote_code: true
  lora:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 0.8}
    train: *train
    lora: {r: 2, target_modules: [q_proj]}
    trust_remote_code: true
  dpo:
    kind: dpo
    model: wit
    data: {train: ./rows.jsonl, rejected: other_row}
    train: *train
    trust_remote_code: true
  bench:
    kind: lm_eval
    models: [base, dpo, lora]
    include_path: ./tasks
    tasks: [{task: colours, data: {test: ./items.jsonl}}]
    trust_remote_code: true
"""


def own_model(folder: Path, model: Path) -> Path:
    """The tiny model as one that only the Python files in its folder load; returns what those write to."""
    marker = folder / "marker.txt"
    shutil.copytree(model, folder / "own")
    (folder / "own" / "modeling_own.py").write_text(CODE)
    (folder / "own" / "helper_own.py").write_text(f"MARKER = {str(marker)!r}\n")
    config = json.loads((folder / "own" / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "own" / "config.json").write_text(json.dumps(config))
    return marker


@pytest.fixture
def world(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small recipe's files, and a cache of its own for the code of models."""
    write_world(tmp_path, model_folder)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def test_remote_code_runs_where_its_key_is_set(world: Path, model_folder: Path) -> None:
    marker = own_model(world, model_folder)
    (world / "r.yaml").write_text(RECIPE)
    assert plan(world)["bench[dpo]"]["runs_code"] == ["trust_remote_code: the model's own Python files run"]
    assert not marker.exists()
    done = command(world)
    assert done.returncode == 0, done.stdout + done.stderr
    assert marker.exists()
    for name in ("wit", "lora", "dpo"):
        folder = world / "runs" / "small" / name
        assert {"modeling_own.py", "helper_own.py"} <= {file.name for file in folder.iterdir()}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
    log = [json.loads(line) for line in (world / "runs/small/dpo/training_log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # ln 2: the reference is the same model
