"""Where steps run: each as a task of a Ray cluster, on any of its machines.

All that machines share is the folder of runs, under the same path, and the installed project: a task starts the step's
worker there, and that reads its job from the store and leaves its result in it. A task whose machine is lost is started
by Ray on another one, and the worker goes on from the step's last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import uuid
from collections import deque
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import cloudpickle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.recipe.loader import RecipeError
from pipeline.run import ray_task as remote
from pipeline.run.local_executor import KEPT_TO_ITSELF, ORDINARY, Event, Job, ended
from stages.base import Resources, StageConfig
from stages.system.module_command import module_command

cloudpickle.register_pickle_by_value(remote)

ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 5.0
"""How long the head of a cluster may take to answer at its port."""
NODE_SECONDS = 60.0
"""How long all machines together may take to show that they see the folder of runs."""
POLL_SECONDS = 0.5
"""How often it is looked whether a step got on."""
LOST_MACHINES = 5
"""How often one step is started anew because its machine, or its process there, was lost."""
AHEAD = 2
"""Tasks handed to Ray for each that can run at once, so that no machine waits for the next one."""


class RayExecutor:
    """Runs steps on the cluster at RAY_ADDRESS, or on one that it starts on this machine.

    Args:
        runs: the folder given by --runs, which every machine has to see.
        jobs: how many steps are handed to the cluster at most; None leaves that to the size of the cluster.

    Raises:
        RecipeError: the cluster does not answer, or a machine of it does not see `runs` or lacks this project.
    """

    def __init__(self, runs: Path, jobs: int | None = None) -> None:
        self.jobs = jobs
        self._tasks: dict[Any, Job] = {}
        self._told: dict[str, str] = {}
        self._events: deque[Event] = deque()
        _connect()
        try:
            _require_shared(runs.resolve())
        except BaseException:
            ray.shutdown()
            raise
        self._task = ray.remote(remote.run)

    @property
    def width(self) -> int:
        """How many ordinary steps run side by side."""
        has = ray.cluster_resources()
        fit = has.get("GPU") or has.get("CPU") or 1
        return max(1, min(int(fit), self.jobs or int(fit)))

    def unmet_requirement(self, config: StageConfig) -> tuple[str, str] | None:
        """Why a step of this stage can never run here: the key to blame, and the reason."""
        cpus, gpus = self._wants(config.resources, config.processes)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked = {
            "launch.num_processes" if config.resources.gpus is None else "resources.gpus": ("GPU", gpus),
            "resources.cpus" if config.resources.cpus else "launch.num_processes": ("CPU", cpus),
            "resources.memory": ("memory", config.resources.bytes),
        }
        for key, (name, amount) in asked.items():
            most = max((node.get(name, 0) for node in nodes), default=0)
            if amount > most:
                unit, size = (" GiB of memory", 2**30) if name == "memory" else (f" {name}s", 1)
                return key, f"asks for {amount / size:g}{unit}, and no machine of the cluster has over {most / size:g}"
        if not any(all(node.get(name, 0) >= amount for name, amount in asked.values()) for node in nodes):
            return "resources", "asks for more than any one machine of the cluster has at once"
        return None

    def has_room(self, takes: Resources = ORDINARY, processes: int = 1) -> bool:
        """Whether the cluster may be handed another step; when and where it runs is the cluster's to say."""
        return len(self._tasks) < (self.jobs or AHEAD * self.width)

    def start(self, job: Job) -> None:
        """Hand the step to the cluster."""
        cpus, gpus = self._wants(job.takes, job.processes)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.unlink(missing_ok=True)
        threads = str(max(1, cpus // job.processes))
        environment = {**KEPT_TO_ITSELF, "PYTHONPATH": _paths(), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        options = {"num_cpus": cpus, "num_gpus": gpus, "memory": job.takes.bytes or None, "name": job.step}
        task = self._task.options(max_retries=LOST_MACHINES, **options).remote(
            str(job.folder), str(job.log), environment
        )
        self._tasks[task] = job
        self._events.append(Event(job, note="handed to the cluster"))

    def wait(self, seconds: float | None = None) -> Event | None:
        """The next event of any step; None where there is none for so many seconds."""
        until = None if seconds is None else time.monotonic() + seconds
        while not self._events:
            left = POLL_SECONDS if until is None else min(POLL_SECONDS, until - time.monotonic())
            if left <= 0:
                return None
            ended, _ = ray.wait(list(self._tasks), num_returns=1, timeout=left)
            for task in ended:
                self._events.append(Event(self._tasks.pop(task), result=_result(task)))
            for job in self._tasks.values():
                self._look(job)
        return self._events.popleft()

    def stop(self) -> None:
        """End all steps, and let go of the cluster."""
        for task in self._tasks:
            with contextlib.suppress(RayError, ValueError):
                ray.cancel(task, force=True)
        ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=2) if self._tasks else None
        ray.shutdown()

    def _wants(self, takes: Resources, processes: int) -> tuple[int, int]:
        """Cores and GPUs of a step."""
        gpus = processes if takes.gpus is None and ray.cluster_resources().get("GPU") else takes.gpus or 0
        return takes.cpus or processes, gpus

    def _look(self, job: Job) -> None:
        """Note what a step has told of its progress since it was looked at last."""
        with contextlib.suppress(OSError, ValueError):
            told = (job.folder / remote.PROGRESS).read_text(encoding="utf-8")
            if told != self._told.get(job.step):
                self._told[job.step] = told
                self._events.append(Event(job, *json.loads(told)))


def _connect() -> None:
    """Join the cluster at RAY_ADDRESS, or start one. Raises RecipeError."""
    address = os.environ.get(ADDRESS)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address and address not in ("auto", "local"):
        place = urlsplit(address if "//" in address else f"//{address}")
        try:
            socket.create_connection((place.hostname or "", place.port or 6379), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise RecipeError(
                [f"{ADDRESS}: no cluster answers at {address}: {error}; is 'ray start' running?"]
            ) from None
    try:
        ray.init(include_dashboard=None if address else False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise RecipeError([f"{ADDRESS}: no cluster answers at {address or 'this machine'}: {error}"]) from None


def _paths() -> str:
    """Where workers look for the project first: where this process found it, if it lies there on their machine, too."""
    return module_command("pipeline.run.loop.worker")[1]["PYTHONPATH"]


def _require_shared(runs: Path) -> None:
    """Let every machine read a file of this folder. Raises RecipeError naming those that cannot."""
    runs.mkdir(parents=True, exist_ok=True)
    token, name = uuid.uuid4().hex, runs / f".seen-{uuid.uuid4().hex}"
    name.write_text(token, encoding="utf-8")
    try:
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        look = ray.remote(remote.unmet_requirement)
        asked = {}
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            asked[look.options(**options).remote(str(name), token, _paths())] = node
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        wrong = {nodes[asked[task]]: "does not answer" for task in late}
        for task in done:
            try:
                if said := ray.get(task):
                    wrong[nodes[asked[task]]] = said
            except RayError as error:
                wrong[nodes[asked[task]]] = f"cannot run a task: {str(error).strip().splitlines()[-1]}"
    finally:
        name.unlink(missing_ok=True)
    if wrong:
        told = [f"machine {node}: {text}" for node, text in wrong.items()]
        remedy = "every machine needs the folder of runs under the same path (--runs), and this project installed"
        raise RecipeError([f"--executor ray: {text}; {remedy}" for text in told])


def _result(task: Any) -> dict[str, Any]:
    try:
        return ended(*ray.get(task))
    except RayError as error:
        first = str(error).strip().splitlines()[0]
        return {"error": f"the cluster could not run it ({type(error).__name__}): {first}", "is_user_error": False}
