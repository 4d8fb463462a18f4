"""`run-recipe --estimate` as a user calls it: counts against hand formulas and real models, memory against the measured
peak of a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers.training_args import OptimizerNames

from benchmarks.estimate import CASES, MOST, TASK, estimated, make_world, peak
from stages.models.model_size import STORED_CHECKPOINTS, ModelSize, build, model_size, optimiser_bytes
from stages.training.checkpoints import CHECKPOINTS_KEPT
from stages.training.estimate import shards
from stages.training.launch import Launch
from tests.pipeline.run.test_command import command
from tests.tiny import tiny_model

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
matrix: {prompt: [0.0, 0.2, 0.4]}
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: "${matrix.prompt}", completion: 1}
    train: {num_train_epochs: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_length: 256}
  large:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {per_device_train_batch_size: 512, gradient_checkpointing: false}
    resources: {memory: 1GiB}
  hopeless:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    resources: {memory: 8MiB}
  plain:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    train: {max_steps: 2, activation_checkpointing: false}
  sharded:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
    launch: {num_processes: 2, use_fsdp: true}
  dpo: &dpo
    kind: dpo
    data: {train: ./rows.jsonl, rejected: other_row}
    train: {max_steps: 2, per_device_train_batch_size: 2, max_length: 64}
  ahead:
    <<: *dpo
    train: {max_steps: 2, per_device_train_batch_size: 2, max_length: 64, precompute_ref_log_probs: true}
  bench:
    kind: lm_eval
    models: [base]
    include_path: ./tasks
    tasks: [{task: ends, metric: acc, data: {test: ./rows.jsonl}}]
    options: {batch_size: 262144, dtype: float32}
    resources: {memory: 700MiB}
  chosen:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.2, completion: 1}
    train: {num_train_epochs: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 2, max_length: 256}
    select: {task: ends, metric: acc, data: {test: ./dev.jsonl}, include_path: ./tasks, every: 100}
  far:
    kind: sft
    model: org/nowhere
    data: {train: ./rows.jsonl}
    weights: {prompt: 0, completion: 1}
"""
TINY = 258 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
"""Parameters of tests.tiny's Llama, by hand: embeddings shared with the head; in each layer the query and output, key
and value of half as many heads, three matrices of the MLP and two norms; the last norm."""
ROWS, LENGTH, DEV_ROWS = 600, 256, 4
"""Each row of 5 + 494 + 1 tokens, bytes and EOS, is truncated to LENGTH."""


@pytest.fixture(scope="module")
def estimates(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Any]:
    """Stage -> its entry in `--estimate --json`."""
    folder = tmp_path_factory.mktemp("estimated")
    (folder / "model").symlink_to(model_folder)
    (folder / "r.yaml").write_text(RECIPE)
    rows = ({"prompt": "Sky? ", "completion": "ab"[number % 2] * 494} for number in range(ROWS))
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "dev.jsonl").write_text("".join(lines[:DEV_ROWS]))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "ends.yaml").write_text(TASK)
    done = command(folder, "--estimate", "--json")
    assert done.returncode == 0, done.stderr
    assert not (folder / "runs" / "small").exists()
    return {each["steps"][0].partition("[")[0]: each for each in json.loads(done.stdout)["steps"]}


def test_counts_of_parameters_rows_and_steps(estimates: dict[str, Any]) -> None:
    """600 rows in micro-batches of 2 are 300, of which 2 make a step: 150 steps an epoch, over 2 epochs."""
    wit = estimates["wit"]
    assert wit["parameters"] == wit["trainable"] == TINY
    assert wit["tokens"] == 2 * ROWS * LENGTH
    assert wit["steps"] == ["wit[prompt=0]", "wit[prompt=0.2]", "wit[prompt=0.4]"]
    assert wit["optimiser_steps"] == 300
    assert wit["flops"] == 8 * TINY * wit["tokens"]  # with gradient checkpointing, TRL's default
    assert wit["seconds"] > 0
    parts = wit["memory"]
    assert (parts["weights"], parts["gradients"], parts["optimiser"]) == (4 * TINY, 4 * TINY, 8 * TINY)
    assert wit["fits"]


def test_a_training_that_selects_by_a_task_scores_it_at_each_point(estimates: dict[str, Any]) -> None:
    """300 steps have three points. All rows have as many tokens, and each asks for two answers."""
    chosen, bench = estimates["chosen"], estimates["bench"]
    requests = 2 * DEV_ROWS
    tokens = 3 * requests * bench["tokens"] // (2 * ROWS)
    assert chosen["flops"] == estimates["wit"]["flops"] + 2 * TINY * tokens
    assert chosen["formula"] == f"8 N for each token; 3 x {requests} requests of select, 2 N for each token"


def test_a_training_that_does_not_fit_names_changes_that_fit(estimates: dict[str, Any]) -> None:
    """1 GiB suffices with checkpointing or smaller batches of the same rows per step."""
    large = estimates["large"]
    assert not large["fits"]
    assert large["memory_total"] > 2**30 == large["room"]
    assert large["remedies"]
    assert all(remedy["memory"] <= 2**30 for remedy in large["remedies"])
    first = dict(change.split(": ") for change in large["remedies"][0]["changes"])
    assert first["train.activation_checkpointing"] == "true"
    assert large["remedies"][0]["same_result"]
    size = int(first.get("train.per_device_train_batch_size", 512))
    assert size * int(first.get("train.gradient_accumulation_steps", 1)) == 512
    assert not estimates["hopeless"]["fits"]
    assert estimates["hopeless"]["remedies"] == []


def test_an_evaluation_that_does_not_fit_names_a_smaller_batch(estimates: dict[str, Any]) -> None:
    bench = estimates["bench"]
    assert not bench["fits"]
    assert bench["requests"] == 2 * ROWS
    assert bench["memory"]["activations"] + bench["memory"]["logits"] > 4 * 2**18 * 258, "at least the logits"
    (change,) = bench["remedies"][0]["changes"]
    key, size = change.split(": ")
    assert key == "options.batch_size"
    assert 64 <= int(size) < 2**18
    assert bench["remedies"][0]["same_result"]
    assert bench["remedies"][0]["memory"] <= 700 * 2**20


def test_options_that_decide_memory(estimates: dict[str, Any]) -> None:
    """transformers' name of checkpointing, DPO's reference with and without precomputing, shards without GPUs."""
    assert estimates["plain"]["flops"] == 6 * TINY * estimates["plain"]["tokens"]
    assert estimates["dpo"]["memory"]["weights"] == 8 * TINY
    assert estimates["ahead"]["memory"]["weights"] == 4 * TINY
    assert estimates["sharded"]["fits"] is None
    assert estimates["sharded"]["memory"]["weights"] == 2 * TINY
    assert any("it runs on GPUs, and there is none here" in line for line in estimates["sharded"]["unknown"])


def test_a_missing_model_leaves_values_unknown(estimates: dict[str, Any]) -> None:
    far = estimates["far"]
    assert [far[name] for name in ("parameters", "memory", "flops", "seconds", "fits")] == [None] * 5
    assert any("org/nowhere: cannot be fetched from the hub" in line for line in far["unknown"])


def size_of(
    folder: Path, dtype: str, lora: dict[str, Any] | None = None, quantization: dict[str, Any] | None = None
) -> ModelSize:
    return model_size(build(folder, dtype, False, lora and json.dumps(lora)), quantization)


def test_counts_equal_those_of_the_real_model_and_of_peft(model_folder: Path) -> None:
    model = tiny_model()
    assert size_of(model_folder, "float32").parameters == sum(p.numel() for p in model.parameters()) == TINY
    options = {"r": 4, "target_modules": "all-linear"}
    trainable, everything = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", **options)
    ).get_nb_trainable_parameters()
    size = size_of(model_folder, "bfloat16", options)
    assert (size.trainable, size.parameters, size.base) == (trainable, everything, TINY)
    assert size.weights == 2 * TINY + 4 * trainable  # PEFT keeps an adapter in float32
    linear = TINY - 258 * 32 - 5 * 32
    four_bits = size_of(model_folder, "float32", options, {"load_in_4bit": True})
    assert four_bits.weights == 4 * (TINY - linear) + linear // 2 + linear // 64 * 4 + 4 * trainable


def test_optimiser_states_and_shards(model_folder: Path) -> None:
    size = size_of(model_folder, "float32")
    states = {name.value: optimiser_bytes(name.value, size) for name in OptimizerNames}  # all that a recipe may name
    some = {name: states[name] for name in ("adamw_torch_fused", "adamw_bnb_8bit", "lion_32bit", "sgd", "lomo")}
    assert some == {
        "adamw_torch_fused": 8 * TINY,
        "adamw_bnb_8bit": 2 * TINY,
        "lion_32bit": 4 * TINY,
        "sgd": 0,
        "lomo": 0,
    }
    assert 0 < states["adafactor"] < TINY
    assert STORED_CHECKPOINTS == CHECKPOINTS_KEPT + 1
    assert shards(Launch(num_processes=4)) == (1, 1, 1)
    assert shards(Launch(num_processes=4, use_fsdp=True)) == (4, 4, 4)
    assert shards(Launch(num_processes=4, use_fsdp=True, fsdp_sharding_strategy="SHARD_GRAD_OP")) == (1, 4, 4)
    assert shards(Launch(num_processes=4, use_deepspeed=True, zero_stage=1)) == (1, 1, 4)
    assert shards(Launch(num_processes=4, use_deepspeed=True, zero_stage=3)) == (4, 4, 4)


@pytest.mark.parametrize("case", ["full 1M", "full 30M"])
def test_memory_is_within_a_quarter_of_the_measured_peak(tmp_path: Path, case: str) -> None:
    make_world(tmp_path, *CASES[case])
    assert estimated(tmp_path)["memory_total"] / peak(tmp_path) == pytest.approx(1, abs=MOST)
