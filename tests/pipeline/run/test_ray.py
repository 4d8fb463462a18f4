"""Steps on a real Ray cluster of several nodes on this machine: one is lost, one does not see the folder of runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.pipeline.run.test_command import command, environment, write_world

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: ./model
matrix: {prompt: [0, 0.2]}
stages:
  wit:
    kind: sft
    data: {train: ./rows.jsonl}
    weights: {prompt: "${matrix.prompt}", completion: 1}
    train: {max_steps: 150, save_steps: 10, per_device_train_batch_size: 2, learning_rate: 1.0e-3, logging_steps: 10}
  bench:
    kind: lm_eval
    models: [base, wit]
    include_path: ./tasks
    tasks: [{task: colours, metric: acc, data: {test: ./items.jsonl}}]
  report: {kind: report}
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster of one node with one core; tests add to it."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def world(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with the grid."""
    write_world(tmp_path, model_folder)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return tmp_path


def outputs(runs: Path) -> dict[str, dict[str, str]]:
    """Step -> file -> sha256; of the report, which shows times, only results.csv."""
    results = {}
    for step in json.loads((runs / "small" / "run.json").read_text())["steps"]:
        assert step["state"] in ("done", "cached"), step
        files = json.loads((runs / step["path"] / "stage.json").read_text())["outputs"]
        results[step["step"]] = {name: sha for name, sha in files.items() if step["kind"] != "report" or "csv" in name}
    return results


def workers_below(pid: int) -> list[psutil.Process]:
    """The processes of steps among all that a process started."""
    results = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            if "pipeline.run.worker" in process.cmdline():
                results.append(process)
    return results


def test_a_node_is_lost_in_the_middle(cluster: Cluster, world: Path) -> None:
    """Its step goes on elsewhere, from a checkpoint; the results are those of one machine."""
    other = cluster.add_node(num_cpus=1)
    raylet = other.all_processes["raylet"][0].process.pid
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--executor", "ray"]
    log = (world / "said.txt").open("w")
    process = subprocess.Popen(call, cwd=world, env=environment() | os.environ, stdout=log, stderr=log)
    deadline = time.monotonic() + 200
    lost: list[psutil.Process] = []
    while not lost:
        assert time.monotonic() < deadline
        assert process.poll() is None, (world / "said.txt").read_text()
        time.sleep(0.05)
        for worker in workers_below(raylet):
            with contextlib.suppress(psutil.Error):
                if list(Path(worker.cmdline()[-1]).parent.glob("checkpoints/*/sealed.json")):
                    lost.append(worker)
    cluster.remove_node(other, allow_graceful=False)
    assert process.wait(timeout=400) == 0, (world / "said.txt").read_text()
    psutil.wait_procs(lost, timeout=10)
    assert not any(worker.is_running() for worker in lost)
    manifests = [json.loads(file.read_text()) for file in (world / "runs/store/sft").glob("*/stage.json")]
    locks = {file.stem for file in (world / "runs/store/locks").glob("*.worker")}
    assert locks >= {manifest["fingerprint"] for manifest in manifests}, "workers of all nodes hold the same locks"
    assert any("resumed from step" in str(manifest["metrics"]["notes"]) for manifest in manifests)
    alone = command(world, "--runs", "alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    assert outputs(world / "runs") == outputs(world / "alone")


def test_an_interrupt_leaves_no_worker(cluster: Cluster, world: Path) -> None:
    """The state is complete, so that the next run can continue."""
    call = [sys.executable, "-P", "-m", "pipeline.cli", "r.yaml", "--executor", "ray"]
    long = ["--set", "stages.wit.train.max_steps=100000"]
    process = subprocess.Popen([*call, *long], cwd=world, env=environment() | os.environ, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list((world / "runs").glob("store/unfinished/*/checkpoints/*/sealed.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    workers = workers_below(cluster.head_node.all_processes["raylet"][0].process.pid)
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - began < 10
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    assert json.loads((world / "runs/small/run.json").read_text())["status"] == "interrupted"
    plan = command(world, "--plan", *long).stdout
    assert "continues from its checkpoint" in plan


def test_a_node_that_does_not_see_the_folder_of_runs(cluster: Cluster, world: Path) -> None:
    """In a mount namespace of its own, another file system lies over the folder."""
    (world / "runs").mkdir()
    join = f"mount -t tmpfs none {world / 'runs'} && exec {Path(sys.executable).parent / 'ray'} start --block"
    call = ["unshare", "--mount", "sh", "-c", f"{join} --address={cluster.address} --num-cpus=1"]
    with subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as node:
        ray.init(address=cluster.address, log_to_driver=False)
        deadline = time.monotonic() + 60
        while len(ray.nodes()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ray.shutdown()
        said = command(world, "--executor", "ray")
        for child in psutil.Process(node.pid).children(recursive=True):
            child.kill()
        node.kill()
    assert said.returncode == 2, said.stdout
    assert re.search(r"--executor ray: machine \S+: does not see \S*/runs as this machine does", said.stderr)
    assert not (world / "runs" / "small").exists()


def test_more_than_any_node_has(cluster: Cluster, world: Path) -> None:
    for resource, expected in {
        "gpus=8": "resources.gpus: asks for 8 GPUs, and no machine of the cluster has over 0",
        "cpus=3": "resources.cpus: asks for 3 CPUs, and no machine of the cluster has over 1",
        "memory=9000GiB": "resources.memory: asks for 9000 GiB of memory, and no machine of the cluster has over",
    }.items():
        said = command(world, "--executor", "ray", "--set", f"stages.wit.resources.{resource}")
        assert said.returncode == 2, said.stdout
        assert f"--set stages.wit.resources.{resource}: stages.wit.{expected}" in said.stderr


def test_no_cluster_answers(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    began = time.monotonic()
    said = command(world, "--executor", "ray")
    assert time.monotonic() - began < 30
    assert said.returncode == 2
    assert "RAY_ADDRESS: no cluster answers at 127.0.0.1:1: " in said.stderr


def test_more_than_this_machine_has(world: Path) -> None:
    for resource, expected in {
        "gpus=99": "resources.gpus: asks for 99, and this machine has",
        "cpus=999": "resources.cpus: asks for 999, and this machine has",
        "memory=900TiB": "resources.memory: asks for 900TiB, and this machine has",
    }.items():
        said = command(world, "--set", f"stages.bench.resources.{resource}")
        assert said.returncode == 2, said.stdout
        assert f"stages.bench.{expected}" in said.stderr
