"""A training that is killed and run again ends with the bytes of one that was never interrupted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.pipeline.run.test_command import command, environment, write_world

pytestmark = pytest.mark.long

TRAIN = "max_steps: 60, save_steps: 7, logging_steps: 10, learning_rate: 1.0e-3, per_device_train_batch_size"
"""Logs (every 10 steps) and epochs (of 2 or 4 steps) do not end where checkpoints are saved (every 7 steps)."""
KINDS = {
    "full": (
        f"kind: sft, data: {{train: ./rows.jsonl}}, weights: {{prompt: 0.2, completion: 0.8}}, train: {{{TRAIN}: 2}}"
    ),
    "accumulated and packed": (
        "kind: sft, data: {train: ./rows.jsonl, eval: ./rows.jsonl}, weights: {prompt: 0.2, completion: 0.8},"
        f" train: {{{TRAIN}: 1, gradient_accumulation_steps: 2, packing: true, max_length: 32, eval_strategy: steps,"
        " eval_steps: 20}"
    ),
    "LoRA with dropout": (
        "kind: sft, data: {train: ./rows.jsonl, eval: ./rows.jsonl}, weights: {prompt: 0, completion: 1},"
        f" train: {{{TRAIN}: 2}}, select: {{metric: eval_prompt_loss, every: 8}},"
        " lora: {r: 2, lora_dropout: 0.3, target_modules: all-linear, init_lora_weights: olora}"
    ),
    "DPO": f"kind: dpo, data: {{train: ./rows.jsonl, rejected: other_row}}, train: {{{TRAIN}: 2}}",
    "DPO with a reference adapter": (
        "kind: dpo, data: {train: ./rows.jsonl, rejected: other_row}, lora: {r: 2, target_modules: all-linear,"
        f" init_lora_weights: pissa_niter_2}}, train: {{{TRAIN}: 2}}"
    ),
    "two processes": (
        "kind: sft, data: {train: ./rows.jsonl}, weights: {prompt: 0.2, completion: 0.8},"
        f" train: {{{TRAIN}: 1}}, launch: {{num_processes: 2}}"
    ),
}


KILLED_AT = {"full": (14, 28)}
"""Kind -> steps after which it is killed; the others are killed once, after 21."""


def write_recipe(folder: Path, model: Path, kind: str) -> None:
    write_world(folder, model)
    (folder / "r.yaml").write_text(f"name: small\nmodel: ./model\nstages:\n  it: {{{KINDS[kind]}}}\n")


def start(folder: Path, runs: str) -> subprocess.Popen[str]:
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--runs", runs]
    return subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, text=True, env=environment())


def wait_for_checkpoint(process: subprocess.Popen[str], store: Path, step: int) -> Path:
    """The folder of the first sealed checkpoint of at least `step` steps."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        for seal in store.glob("unfinished/*/checkpoints/checkpoint-*/sealed.json"):
            if int(seal.parent.name.partition("-")[2]) >= step:
                return seal.parent
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError("no checkpoint")


def outcome(folder: Path, runs: str) -> tuple[dict[str, str], dict[str, Any]]:
    """The hashes of the step's files, and its metrics."""
    manifest = json.loads((folder / runs / "small" / "it" / "stage.json").read_text())
    return manifest["outputs"], manifest["metrics"]


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_run_again(tmp_path: Path, model_folder: Path, kind: str) -> None:
    write_recipe(tmp_path, model_folder, kind)
    assert command(tmp_path, "--runs", "uninterrupted").returncode == 0
    store = tmp_path / "killed" / "store"
    for killed_at in KILLED_AT.get(kind, (21,)):
        process = start(tmp_path, "killed")
        wait_for_checkpoint(process, store, killed_at)
        process.kill()
        process.wait()
    planned = command(tmp_path, "--runs", "killed", "--plan")
    assert "continues from its checkpoint" in planned.stdout
    done = command(tmp_path, "--runs", "killed")
    assert done.returncode == 0, done.stdout
    step = re.search(r"resumed from step (\d+)", done.stdout)
    assert step
    assert int(step[1]) >= 21
    (files, metrics), (expected_files, expected_metrics) = (
        outcome(tmp_path, "killed"),
        outcome(tmp_path, "uninterrupted"),
    )
    assert files == expected_files
    assert "model.safetensors" in files
    for name in ("seconds", "notes"):
        del metrics[name], expected_metrics[name]
    assert metrics == expected_metrics
    assert not list((store / "unfinished").iterdir())


def test_a_damaged_checkpoint_is_reported_and_not_used(tmp_path: Path, model_folder: Path) -> None:
    """One bit of the last checkpoint's optimiser state is flipped: training resumes from the one before."""
    write_recipe(tmp_path, model_folder, "full")
    assert command(tmp_path, "--runs", "uninterrupted").returncode == 0
    process = start(tmp_path, "killed")
    last = wait_for_checkpoint(process, tmp_path / "killed" / "store", 21)
    process.kill()
    process.wait()
    (lock,) = (tmp_path / "killed" / "store" / "locks").glob("*.worker")
    with FileLock(lock):  # the worker has ended too
        pass
    sealed = sorted(last.parent.glob("*/sealed.json"), key=lambda seal: int(seal.parent.name.partition("-")[2]))
    last = sealed[-1].parent
    flipped = bytearray((last / "optimizer.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (last / "optimizer.pt").write_bytes(flipped)
    done = command(tmp_path, "--runs", "killed")
    assert done.returncode == 0
    assert f"{last.name} is not used: optimizer.pt was changed after it was written" in done.stdout
    assert f"resumed from step {sealed[-2].parent.name.partition('-')[2]}," in done.stdout
    assert outcome(tmp_path, "killed")[0] == outcome(tmp_path, "uninterrupted")[0]
