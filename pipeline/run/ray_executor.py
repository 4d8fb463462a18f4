"""Runs each step as a task of a Ray cluster, on any of its machines.

The machines share only the runs folder, under the same path, and the installed project: a task starts the step's
worker, which reads its job from the store and writes its result there. If a machine is lost, Ray starts the task on
another one, and the worker continues from the step's last checkpoint.
"""

import contextlib
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
from pipeline.run import ray_task
from pipeline.run.executor import Event, Executor, checked_result, worker_environment
from pipeline.run.job import Job, StepResult, decode
from stages.base import Resources, StageConfig
from stages.records.run_record import Progress
from stages.system.module_command import module_command
from stages.system.terminal_text import first_line

cloudpickle.register_pickle_by_value(ray_task)

ADDRESS = "RAY_ADDRESS"
CONNECT_SECONDS = 5.0
"""Timeout for the head of a cluster to answer at its port."""
NODE_SECONDS = 60.0
"""Timeout for all machines together to show that they see the runs folder."""
POLL_SECONDS = 0.5
"""Interval between looks at the progress of steps."""
PYTHON_PATH = module_command("pipeline.run.worker")[1]["PYTHONPATH"]
"""The search path of workers: first the place where this process found the project, if it exists there, too."""
MAX_RESTARTS = 5
"""Number of times that a step starts again because its machine, or its process there, was lost."""
TASKS_AHEAD = 2
"""Tasks handed to Ray for each that can run at once, so that no machine waits for the next one."""


class RayExecutor(Executor):
    """Runs steps on the cluster at RAY_ADDRESS, or on one that it starts on this machine.

    Args:
        runs: the folder given by --runs, which every machine has to see.
        jobs: number of steps that the cluster gets at most; None leaves it to the size of the cluster.

    Raises:
        RecipeError: if the cluster does not answer, or one of its machines does not see `runs` or lacks this project.
    """

    def __init__(self, runs: Path, jobs: int | None = None) -> None:
        self.jobs = jobs
        self._tasks: dict[Any, Job] = {}
        self._last_progress: dict[str, str] = {}
        self._events: deque[Event] = deque()
        _connect()
        try:
            _check_machines(runs.resolve())
        except BaseException:
            ray.shutdown()
            raise
        self._task = ray.remote(ray_task.run)

    @property
    def width(self) -> int:
        available = ray.cluster_resources()
        fit = available.get("GPU") or available.get("CPU") or 1
        return max(1, min(int(fit), self.jobs or int(fit)))

    def unmet_requirement(self, config: StageConfig) -> tuple[str, str] | None:
        cpus, gpus = self._cores_and_gpus(config.resources, config.processes)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        amounts = {
            "launch.num_processes" if config.resources.gpus is None else "resources.gpus": ("GPU", gpus),
            "resources.cpus" if config.resources.cpus else "launch.num_processes": ("CPU", cpus),
            "resources.memory": ("memory", config.resources.bytes),
        }
        for key, (name, amount) in amounts.items():
            most = max((node.get(name, 0) for node in nodes), default=0)
            if amount > most:
                unit, size = (" GiB of memory", 2**30) if name == "memory" else (f" {name}s", 1)
                return key, f"asks for {amount / size:g}{unit}, and no machine of the cluster has over {most / size:g}"
        if not any(all(node.get(name, 0) >= amount for name, amount in amounts.values()) for node in nodes):
            return "resources", "asks for more than any one machine of the cluster has at once"
        return None

    def has_room(self, resources: Resources, processes: int) -> bool:
        """Whether the cluster can get another step. Ray decides when and where it runs."""
        return len(self._tasks) < (self.jobs or TASKS_AHEAD * self.width)

    def start(self, job: Job) -> None:
        cpus, gpus = self._cores_and_gpus(job.resources, job.processes)
        environment = worker_environment(cpus // job.processes) | {"PYTHONPATH": PYTHON_PATH}
        options = {"num_cpus": cpus, "num_gpus": gpus, "memory": job.resources.bytes or None, "name": job.step}
        task = self._task.options(max_retries=MAX_RESTARTS, **options).remote(
            str(job.folder), str(job.log), environment
        )
        self._tasks[task] = job
        self._events.append(Event(job, Progress(note="handed to the cluster")))

    def wait(self, seconds: float | None = None) -> Event | None:
        until = None if seconds is None else time.monotonic() + seconds
        while not self._events:
            timeout = POLL_SECONDS if until is None else min(POLL_SECONDS, until - time.monotonic())
            if timeout <= 0:
                return None
            ended, _ = ray.wait(list(self._tasks), num_returns=1, timeout=timeout)
            for task in ended:
                self._events.append(Event(self._tasks.pop(task), _result(task)))
            for job in self._tasks.values():
                self._read_progress(job)
        return self._events.popleft()

    def stop(self) -> None:
        for task in self._tasks:
            with contextlib.suppress(RayError, ValueError):
                ray.cancel(task, force=True)
        ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=2) if self._tasks else None
        self._tasks.clear()
        ray.shutdown()

    def _cores_and_gpus(self, resources: Resources, processes: int) -> tuple[int, float]:
        gpus = processes if resources.gpus is None and ray.cluster_resources().get("GPU") else resources.gpus or 0
        return resources.cpus or processes, gpus

    def _read_progress(self, job: Job) -> None:
        """Add an event if the step's progress changed since the last look."""
        with contextlib.suppress(OSError, ValueError):
            text = (job.folder / ray_task.PROGRESS_FILE).read_text(encoding="utf-8")
            if text != self._last_progress.get(job.step):
                self._last_progress[job.step] = text
                self._events.append(Event(job, decode(text)))


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


def _check_machines(runs: Path) -> None:
    """Let every machine read and write a file in the runs folder. Raises RecipeError that names those that cannot."""
    runs.mkdir(parents=True, exist_ok=True)
    file = runs / f".seen-{uuid.uuid4().hex}"
    file.touch()
    try:
        nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        check = ray.remote(ray_task.unmet_requirement)
        tasks = {}
        for node in nodes:
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": on_node}
            tasks[check.options(**options).remote(str(file), PYTHON_PATH)] = node
        done, late = ray.wait(list(tasks), num_returns=len(tasks), timeout=NODE_SECONDS)
        problems = {nodes[tasks[task]]: "does not answer" for task in late}
        for task in done:
            try:
                if problem := ray.get(task):
                    problems[nodes[tasks[task]]] = problem
            except RayError as error:
                problems[nodes[tasks[task]]] = f"cannot run a task: {str(error).strip().splitlines()[-1]}"
    finally:
        file.unlink(missing_ok=True)
    if problems:
        remedy = "every machine needs the folder of runs under the same path (--runs), and this project installed"
        raise RecipeError([f"--executor ray: machine {node}: {text}; {remedy}" for node, text in problems.items()])


def _result(task: Any) -> StepResult:
    try:
        line, status = ray.get(task)
    except RayError as error:
        return StepResult(error=f"the cluster could not run it ({type(error).__name__}): {first_line(error)}")
    result = decode(line) if line else None
    assert not isinstance(result, Progress)
    return checked_result(result, status)
