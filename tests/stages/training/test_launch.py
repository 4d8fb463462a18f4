"""Training in several processes: the same numbers as in one process, one error if one fails, none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pipeline.run.local_executor import LocalExecutor
from stages.base import Context, Input, Resources, UserError
from stages.sft.config import SFTStage
from stages.training.launch import Launch, run_ranks
from tests.pipeline.run.test_command import command, environment, write_world

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
stages:
  one: &one
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: 0.5, completion: 1}
    train: &train {max_steps: 5, per_device_train_batch_size: 4, learning_rate: 1.0e-3, logging_steps: 1}
  two:
    <<: *one
    train: {<<: *train, per_device_train_batch_size: 2}
    launch: {num_processes: 2}
"""
ROWS = [{"prompt": "ab" * n, "completion": "cde" * (9 - n)} for n in range(1, 9)]

FAILS_ON_RANK_1 = """\
import os
if os.environ.get("RANK") == "1":
    import stages.training.loop
    from stages.base import UserError
    def train(*_):
        raise UserError("rows.jsonl:3: rank 1 cannot use this row; correct it")
    stages.training.loop.train = train
"""


def write(folder: Path, model: Path) -> None:
    write_world(folder, model)
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A folder in which the recipe has run once."""
    folder = tmp_path_factory.mktemp("launch")
    write(folder, model_folder)
    done = command(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log rows of a published training's steps."""
    rows = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def assert_same_training(one: Path, other: Path) -> None:
    """Losses, gradient norms and weights agree to 1e-4. Rows differ in length, so means of means would not agree."""
    logs = log_of(one), log_of(other)
    assert len(logs[0]) == len(logs[1]) == 5
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in logs[1]] == pytest.approx([row[key] for row in logs[0]], abs=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert (weights[1][name] - weight).abs().max() < 1e-4, name


def processes_of(folder: Path) -> list[psutil.Process]:
    """The processes that work on a job in `folder`."""
    processes = []
    for process in psutil.process_iter():
        try:
            if any(part.startswith(f"{folder}{os.sep}") and part.endswith("job.json") for part in process.cmdline()):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


def assert_none_left(folder: Path, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while processes := processes_of(folder):
        assert time.monotonic() < deadline, [process.cmdline() for process in processes]
        time.sleep(0.05)


def test_two_processes_train_as_one(world: Path) -> None:
    """A batch of 4 rows on one process is 2 rows on each of two. Only one of them publishes."""
    results = world / "runs" / "small"
    assert_same_training(results / "one", results / "two")
    assert {file.name for file in (results / "one").iterdir()} == {file.name for file in (results / "two").iterdir()}
    assert len(log_of(results / "two")) == 5
    metrics = [json.loads((results / name / "stage.json").read_text())["metrics"] for name in ("one", "two")]
    assert metrics[0]["tokens"] == metrics[1]["tokens"]
    assert metrics[0]["steps"] == metrics[1]["steps"] == 5
    assert not list((world / "runs" / "store" / "unfinished").iterdir())


def test_sharded_by_fsdp2_training_is_the_same(world: Path) -> None:
    """accelerate's FSDP2 over gloo: the model is trained sharded, gathered, and published as one model.

    accelerate shards on accelerators only (AcceleratorState needs MULTI_GPU or the like, and silently gives CPU
    processes plain DDP), so the processes below present gloo as a GPU's backend. The rest is accelerate's code.
    """
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", __name__]
    sharding = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [*call, str(world)], cwd=root, env=environment() | sharding, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_same_training(world / "runs" / "small" / "one", world / "fsdp-0" / "out")
    assert not (world / "fsdp-1" / "out" / "model.safetensors").exists()


def test_one_failing_process_fails_the_step(tmp_path: Path, model_folder: Path) -> None:
    """The step has that process's error, and the processes that wait for it end as well."""
    write(tmp_path, model_folder)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(FAILS_ON_RANK_1)
    paths = os.pathsep.join([environment()["PYTHONPATH"], str(tmp_path / "hook")])
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--stage", "two"]
    done = subprocess.run(
        call, cwd=tmp_path, env=environment() | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    steps = json.loads((tmp_path / "runs" / "small" / "run.json").read_text())["steps"]
    two = next(step for step in steps if step["step"] == "two")
    assert (two["state"], two["error"]) == ("failed", "rows.jsonl:3: rank 1 cannot use this row; correct it")
    assert "Traceback" not in done.stdout + done.stderr
    assert_none_left(tmp_path)


def test_a_killed_run_leaves_no_process(tmp_path: Path, model_folder: Path) -> None:
    write(tmp_path, model_folder)
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--stage", "two"]
    run = subprocess.Popen(
        [*call, "--set", "stages.two.train.max_steps=50000"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    log = tmp_path / "runs" / "small" / "logs" / "two.txt"
    deadline = time.monotonic() + 300
    while not (log.exists() and "'loss'" in log.read_text()):
        assert run.poll() is None
        assert time.monotonic() < deadline, "training never began"
        time.sleep(0.2)
    assert len(processes_of(tmp_path)) == 3, "the worker and two ranks"
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert_none_left(tmp_path)


def test_more_processes_than_gpus(tmp_path: Path, model_folder: Path) -> None:
    """The error names the place in the recipe, before anything runs."""
    write(tmp_path, model_folder)
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--set", "stages.two.launch.num_processes=4"]
    gpus = {"CUDA_VISIBLE_DEVICES": "0,1"}
    done = subprocess.run(
        call, cwd=tmp_path, env=environment() | gpus, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2, done.stdout
    assert "stages.two.launch.num_processes: 4 processes need as many GPUs, and there are 2" in done.stderr
    assert not (tmp_path / "runs" / "small" / "logs").exists()


def test_a_step_waits_for_as_many_gpus_as_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    executor = LocalExecutor()
    assert executor.jobs == 4
    assert [executor.has_room(Resources(), processes) for processes in (1, 4)] == [True, True]
    assert executor.unmet_requirement(stage(4)) is None
    assert executor.unmet_requirement(stage(5))
    shared = LocalExecutor(jobs=8)  # two steps per GPU: four processes still use four GPUs
    assert shared.has_room(Resources(), 4)
    assert not shared.has_room(Resources(), 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert LocalExecutor(jobs=2).has_room(Resources(), 16)


def stage(processes: int) -> SFTStage:
    data, weights = {"train": "./rows.jsonl"}, {"prompt": 0.2, "completion": 0.8}
    return SFTStage.model_validate({"data": data, "weights": weights, "launch": {"num_processes": processes}})


def test_sharding_needs_gpus(tmp_path: Path) -> None:
    """accelerate would silently train unsharded copies."""
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match="accelerate shards a model on GPUs only"):
        run_ranks(Launch.model_validate({"num_processes": 2, "use_fsdp": True}), "stages", [], tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "num_processes"),
        ({"num_processes": 0}, "greater than or equal to 1"),
        ({"num_processes": 3, "num_machines": 2}, "multiple of num_machines 2"),
        ({"num_processes": 2, "fsdp_version": 2}, "has no effect unless use_fsdp is set"),
        ({"num_processes": 2, "use_fsdp": True, "fsdp_version": 3}, "'1', '2', 1 or 2"),
        ({"num_processes": 2, "use_fsdp": True, "use_deepspeed": True}, "cannot be set together with use_fsdp"),
        ({"num_processes": 2, "config_file": "a.yaml"}, "config_file"),
        ({"num_procs": 2}, "num_procs"),
    ],
)
def test_the_section_is_checked(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Launch.model_validate(section)
    assert message in str(caught.value)


if __name__ == "__main__":  # one rank of the sharded training
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from stages.sft.stage import run

    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    folder = Path(sys.argv[1])
    rank_folder = folder / f"fsdp-{os.environ['RANK']}"
    for name in ("out", "scratch"):
        (rank_folder / name).mkdir(parents=True)
    stage = json.loads((folder / "runs" / "small" / "two" / "stage.json").read_text())["config"]
    inputs = {"model": Input(folder / "model"), "train": Input(folder / "rows.jsonl")}
    run(
        Context(
            recipe="small",
            step="two",
            config=SFTStage.model_validate(stage),
            inputs=inputs,
            out=rank_folder / "out",
            scratch=rank_folder / "scratch",
            checkpoints=rank_folder / "checkpoints",
            cache=folder / "cache",
            progress=lambda *_: None,
        )
    )
