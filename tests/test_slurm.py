"""docs/slurm_ray.sh, with fake Slurm commands that start everything on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.pipeline.run.test_command import environment, states, write_world

pytestmark = pytest.mark.long

SCRIPT = Path(__file__).parents[1] / "docs" / "slurm_ray.sh"
SRUN = """\
#!/usr/bin/env bash
# srun --nodes=1 --ntasks=1 --nodelist=NAME COMMAND...: runs the command here, and logs the node
echo "$3 ${*:4}" >> "$SRUN_LOG"
if [ "$4" = hostname ]; then echo 127.0.0.1; exit; fi
exec "${@:4}"
"""
SCONTROL = """\
#!/usr/bin/env bash
[ "$*" = "show hostnames a[1-2]" ] || exit 1
printf 'a1\\na2\\n'
"""
RECIPE = """\
name: small
model: ./model
stages:
  bench:
    kind: lm_eval
    models: [base]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
"""


def test_the_script_runs_a_recipe(tmp_path: Path, model_folder: Path) -> None:
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    slurm = {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_CPUS_PER_TASK": "1", "SLURM_GPUS_ON_NODE": "0"}
    variables = {"PATH": path, "RAY_PORT": str(port), "SRUN_LOG": str(tmp_path / "srun.txt")}
    process = subprocess.run(
        ["bash", str(SCRIPT), "r.yaml"],
        cwd=tmp_path,
        env=environment() | slurm | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert states(tmp_path) == {"bench[base]": "done"}
    started = (tmp_path / "srun.txt").read_text().splitlines()
    assert [line.split(" --")[0] for line in started] == [
        "--nodelist=a1 hostname",
        "--nodelist=a1 ray start",
        "--nodelist=a2 ray start",
    ]
    ray = [p for p in psutil.process_iter(["cmdline"]) if any(f":{port}" in part for part in p.info["cmdline"] or [])]
    _, alive = psutil.wait_procs(ray, timeout=15)
    assert not alive
