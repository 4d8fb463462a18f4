"""Steps are forks of a process that has imported their libraries, as good as started ones, where that is safe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.run.executor import worker_environment
from pipeline.run.forked_process import ForkedProcess, PreparedProcess
from pipeline.run.local_executor import WORKER
from stages.kinds import KINDS
from tests.pipeline.run.test_command import environment, write_world

pytestmark = pytest.mark.long

FORKED = [name for name, kind in KINDS.items() if kind.is_forked]
THREAD = "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
CALL = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--stage", "it", "--stage", "wit"]


def fork_in_vain(prepared: PreparedProcess, kind: str, folder: Path) -> ForkedProcess | None:
    """Ask for a worker that has no job."""
    with (folder / "log.txt").open("ab") as log:
        return prepared.fork([kind], WORKER, str(folder / "job.json"), log.fileno(), {"RUN_RECIPE_CORES": "0"})


def test_imports_leave_it_fit_to_fork(tmp_path: Path) -> None:
    """No library starts a thread or opens a GPU when it is imported. Each worker fails, since there is no job."""
    prepared = PreparedProcess(FORKED[:1], worker_environment(2))
    for kind in [*FORKED, *FORKED]:
        worker = fork_in_vain(prepared, kind, tmp_path)
        assert worker is not None, kind
        assert os.getsid(worker.pid) == worker.pid != os.getsid(0)
        assert worker.wait() == 1
    prepared.stop()
    assert (tmp_path / "log.txt").read_text().count("No such file or directory: ") == 2 * len(FORKED)


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    call = [*CALL, "--jobs", "1", "--json"]
    environ = environment() | variables
    return subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environ, timeout=600, check=True)


@pytest.fixture
def second_thread(tmp_path: Path) -> dict[str, str]:
    """Variables with which every Python process has a second thread."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(THREAD)
    return {"PYTHONPATH": f"{tmp_path / 'site'}:{environment().get('PYTHONPATH', '')}"}


def test_a_process_with_a_second_thread_does_not_fork(tmp_path: Path, second_thread: dict[str, str]) -> None:
    prepared = PreparedProcess(["sft"], worker_environment(1) | second_thread)
    assert fork_in_vain(prepared, "sft", tmp_path) is None
    prepared.stop()


def test_forks_give_the_same_bytes_as_started_workers(
    tmp_path: Path, model_folder: Path, second_thread: dict[str, str]
) -> None:
    """A process that has a second thread cannot fork, so that its steps are started."""
    digests = []
    for name, variables in (("forked", {}), ("started", second_thread)):
        folder = tmp_path / name
        folder.mkdir()
        write_world(folder, model_folder)
        steps = json.loads(run(folder, **variables).stdout)["steps"]
        assert [step["state"] for step in steps if step["step"] in ("it", "wit")] == ["done", "done"]
        manifests = [json.loads((folder / "runs/small" / each / "stage.json").read_text()) for each in ("it", "wit")]
        digests.append([manifest["outputs"] for manifest in manifests])
    assert digests[0] == digests[1]
