"""Steps share the GPUs of a machine: its number is declared, since a step that finds none computes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.run.job import Job
from pipeline.run.local_executor import LocalExecutor
from stages.base import Resources
from stages.push.config import PushStage
from tests.pipeline.run.test_command import environment, states, write_world

GIB = 2**30
OWN_CODE = """\
import os
from pathlib import Path
import torch
from transformers import LlamaForCausalLM

class Own(LlamaForCausalLM):
    def to(self, *arguments, **options):
        assert os.environ.setdefault("SET_BY_A_STEP", str(os.getpid())) == str(os.getpid())  # no step sees another's
        file = Path(os.environ["LOADED"])
        loaded = file.read_text().split() if file.exists() else []
        file.write_text(" ".join([*loaded, os.environ["CUDA_VISIBLE_DEVICES"]]))
        if len(loaded) < int(os.environ["FULL"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().to(*arguments, **options)
"""


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> LocalExecutor:
    """Two GPUs of 80 GiB."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    executor = LocalExecutor(jobs=8)
    executor.gpu_memory = 80 * GIB
    return executor


def start(executor: LocalExecutor, folder: Path, gpus: float | None) -> None:
    """Start a step that fails, since it has no job file; it takes its share until `wait` returns its result."""
    name = f"step-{len(list(folder.iterdir()))}"
    (folder / name).mkdir()
    resources = Resources(gpus=gpus)
    log = folder / name / "log.txt"
    executor.start(Job("r", name, "push", {}, {}, folder / name, folder, log, folder / "lock", resources, 1))


def room(executor: LocalExecutor) -> list[bool]:
    """Whether steps that need no GPU, 0.3, 0.5, 0.8 or a whole one have room."""
    return [executor.has_room(Resources(gpus=gpus), 1) for gpus in (0, 0.3, 0.5, 0.8, 1)]


def test_shares_of_gpus_add_up(executor: LocalExecutor, tmp_path: Path) -> None:
    assert room(executor) == [True] * 5
    start(executor, tmp_path, 0.5)
    assert room(executor) == [True] * 5, "the other GPU is free"
    start(executor, tmp_path, 0.3)
    assert room(executor) == [True, True, True, False, False], "the second step got the GPU with more room"
    start(executor, tmp_path, 0.5)
    assert room(executor) == [True, True, True, False, False], "0.2 are free of the one, 0.5 of the other"
    start(executor, tmp_path, 0.5)
    assert room(executor) == [True, False, False, False, False]
    while executor.wait(0.1) or executor._shares:
        pass
    assert room(executor) == [True] * 5
    start(executor, tmp_path, 1)
    start(executor, tmp_path, None)
    assert room(executor) == [False] * 5, "the cores belong to the GPUs"
    executor.stop()


def test_a_share_follows_from_the_estimated_memory(executor: LocalExecutor) -> None:
    """A fifth more than the estimate, and 1 GiB for the process."""
    assert executor.gpu_share(10 * GIB) == pytest.approx(13 / 80)
    assert executor.gpu_share(79 * GIB) == 1
    assert executor.gpu_share(0) == 2 / 8, "nothing is known of it, and --jobs asks for four on each GPU"


def test_a_share_of_several_gpus_is_refused() -> None:
    for gpus in (None, 0, 0.25, 1, 8):
        assert PushStage.model_validate(PUSH | {"resources": {"gpus": gpus}}).resources.gpus == gpus
    with pytest.raises(ValueError, match="is a whole number, or a share of one GPU below 1"):
        PushStage.model_validate(PUSH | {"resources": {"gpus": 1.5}})


PUSH = {"model": "wit", "repo": "me/wit"}


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", *arguments]
    environ = environment() | {"CUDA_VISIBLE_DEVICES": "7"} | variables
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environ, timeout=300, check=False)


@pytest.mark.long
@pytest.mark.parametrize("gpus", [0.5, 0.7])
def test_two_steps_on_one_gpu_if_their_shares_fit(tmp_path: Path, model_folder: Path, gpus: float) -> None:
    write_world(tmp_path, model_folder)
    shares = [f"--set=stages.{stage}.resources.gpus={gpus}" for stage in ("it", "wit")]
    done = run(tmp_path, "--jobs=2", "--stage=it", "--stage=wit", *shares)
    assert done.returncode == 0, done.stderr
    manifests = [json.loads((tmp_path / f"runs/small/{name}/stage.json").read_text()) for name in ("it", "wit")]
    starts = [datetime.fromisoformat(manifest["started"]).timestamp() for manifest in manifests]
    first_end = min(start + manifest["seconds"] for start, manifest in zip(starts, manifests, strict=True))
    assert (max(starts) < first_end - 1) == (gpus == 0.5), manifests


@pytest.mark.long
def test_the_check_estimates_the_memory_of_each_step(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    assert run(tmp_path, "--check").returncode == 0
    findings = json.loads((tmp_path / "runs/cache/checks.json").read_text()).values()
    needed = [each["gpu_memory"] for each in findings if each["passed"] and "files" not in each["passed"]]
    estimates = json.loads(run(tmp_path, "--estimate", "--json").stdout)["steps"]
    expected = [group["memory_total"] for group in estimates for _ in group["steps"]]
    assert sorted(needed) == sorted(expected)
    assert min(expected) > 0


@pytest.mark.long
@pytest.mark.parametrize("full", [1, 2])
def test_a_full_gpu_lets_a_step_run_again_alone_once(tmp_path: Path, model_folder: Path, full: int) -> None:
    write_world(tmp_path, model_folder)
    (tmp_path / "model/own.py").write_text(OWN_CODE)
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "own-llama", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Own"}}
    code = OWN_CODE + "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'own-llama'\n"
    (tmp_path / "model/own.py").write_text(code + "Own.config_class = Config\n")
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    sets = ["bench.models=[base]", "bench.trust_remote_code=true", "bench.resources.gpus=0.5"]
    loaded = tmp_path / "loaded.txt"
    arguments = [f"--set=stages.{each}" for each in sets]
    done = run(tmp_path, "--stage=bench", *arguments, LOADED=str(loaded), FULL=str(full))
    assert loaded.read_text() == "7 7"
    assert (
        "again  bench[base]: the GPU that it shared ran out of memory; it runs again on one of its own" in done.stdout
    )
    assert done.returncode == full - 1, done.stdout + done.stderr
    if full == 2:
        assert "a GPU's memory is full; --estimate shows what needs it" in done.stdout
    assert states(tmp_path)["bench[base]"] == ("failed" if full == 2 else "done")


def test_a_share_on_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    stage = PushStage.model_validate(PUSH | {"resources": {"gpus": 0.5}})
    assert LocalExecutor().unmet_requirement(stage) == ("resources.gpus", "asks for 0.5, and this machine has 0")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
