"""Runs each step in a process of its own on this machine, with its share of cores and GPUs."""

import contextlib
import math
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from pipeline.run.executor import CORES, DEFAULT_RESOURCES, WORKER_ENVIRONMENT, Event, checked_result
from pipeline.run.forked_worker import ForkedWorker, PreparedProcess
from pipeline.run.job import Job, StepResult, decode
from stages import KINDS
from stages.base import Resources, StageConfig
from stages.system.module_command import module_command

MAX_JOBS_WITHOUT_GPU = 4
"""Number of steps at once without --jobs and without a GPU: each loads a model."""

LOG_SECONDS = 5.0
"""How long to wait for the end of a worker's log after the worker has ended."""


class LocalExecutor:
    """Runs up to `jobs` steps at once, in slots: equal shares of the cores, with one GPU each if there are GPUs.

    A step occupies as many slots as it has processes or as its `resources` ask for. A step with more processes than
    there are slots occupies all of them.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.gpus = visible_gpus()
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = len(self.cores) or os.cpu_count() or 1
        self.jobs = self.width = jobs or len(self.gpus) or min(cores, MAX_JOBS_WITHOUT_GPU)
        self.threads = max(1, cores // self.jobs)
        self._memory = machine_memory()
        self._free_slots = list(range(self.jobs))
        self._free_memory = self._memory
        self._events: queue.Queue[Event] = queue.Queue()
        self._slots: dict[str, list[int]] = {}
        """Step -> its slots, until `wait` returns its result."""
        self._workers: dict[str, subprocess.Popen[str] | ForkedWorker] = {}
        """Step -> its worker, once that is there."""
        self._prepared: dict[Any, PreparedProcess] = {}
        """Kinds of stages and environment -> the process that is prepared for them."""
        self._is_stopped = False
        self._lock = threading.Lock()
        """Held to change the three above."""

    def unmet_requirement(self, config: StageConfig) -> tuple[str, str] | None:
        resources = config.resources
        if resources.gpus is None and self.gpus and config.processes > len(self.gpus):
            text = f"{config.processes} processes need as many GPUs, and there are {len(self.gpus)}"
            return "launch.num_processes", f"{text}; lower num_processes"
        if resources.gpus and resources.gpus > len(self.gpus):
            return "resources.gpus", f"asks for {resources.gpus}, and this machine has {len(self.gpus)}"
        if resources.cpus and resources.cpus > self.threads * self.jobs:
            text = f"asks for {resources.cpus}, and this machine has {self.threads * self.jobs}"
            return "resources.cpus", f"{text} for {self.jobs} slots of {self.threads}"
        if resources.bytes > self._memory:
            text = f"asks for {resources.memory}, and this machine has {self._memory / 2**30:.1f}GiB"
            return "resources.memory", text
        return None

    def expect(self, kinds: Iterable[str]) -> None:
        for kind in kinds:
            self._prepared_for(kind, self._environment(1, 1))

    def has_room(self, resources: Resources = DEFAULT_RESOURCES, processes: int = 1) -> bool:
        return self._free_slots_for(resources, processes) is not None

    def start(self, job: Job) -> None:
        """Start the job's worker; `wait` returns its events."""
        slots = self._free_slots_for(job.resources, job.processes)
        assert slots is not None, "has_room is asked first"
        self._free_slots = [slot for slot in self._free_slots if slot not in slots]
        self._free_memory -= job.resources.bytes
        job.log.parent.mkdir(parents=True, exist_ok=True)
        job.log.unlink(missing_ok=True)
        with job.log.open("xb") as log:
            call, environment = module_command("pipeline.run.masked_log")
            mask = subprocess.Popen(call, env=environment, stdin=subprocess.PIPE, stdout=log, start_new_session=True)
        self._slots[job.step] = slots
        threading.Thread(target=self._follow, args=(job, slots, mask), daemon=True).start()

    def wait(self, seconds: float | None = None) -> Event | None:
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(event.message, StepResult):
            self._free_slots += self._slots.pop(event.job.step)
            self._workers.pop(event.job.step, None)
            self._free_memory += event.job.resources.bytes
        return event

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
        for worker in list(self._workers.values()):
            kill(worker)
            worker.wait()
        for prepared in self._prepared.values():
            prepared.stop()

    def _follow(self, job: Job, slots: list[int], mask: subprocess.Popen[bytes]) -> None:
        """Start a worker, and turn its output into events. At the last one, its log is complete."""
        assert mask.stdin is not None
        with mask.stdin:
            try:
                worker = self._start_worker(job, slots, mask.stdin)
            except OSError as error:
                self._events.put(Event(job, StepResult(error=f"no process can be started for it: {error}")))
                return
        result: StepResult | None = None
        for line in worker.stdout or ():
            message = decode(line)
            if isinstance(message, StepResult):
                result = message
            else:
                self._events.put(Event(job, message))
        status = worker.wait()
        with contextlib.suppress(subprocess.TimeoutExpired):  # of a process that the worker left behind
            mask.wait(timeout=LOG_SECONDS)
        self._events.put(Event(job, checked_result(result, status)))

    def _start_worker(self, job: Job, slots: list[int], log: IO[bytes]) -> subprocess.Popen[str] | ForkedWorker:
        """Fork a worker from a process that is prepared for its kind, or start one. Raises OSError."""
        worker: subprocess.Popen[str] | ForkedWorker | None = None
        environment, variables = self._environment(len(slots), job.processes), self._variables(slots, job)
        if not job.config.get("launch") and (prepared := self._prepared_for(job.kind, environment)):
            worker = prepared.fork(job.file, variables, log.fileno())
        with self._lock:
            if self._is_stopped:
                if worker:
                    kill(worker)
                raise OSError("the run was stopped")
            if worker is None:
                call, base = module_command("pipeline.run.worker", str(job.file))
                worker = subprocess.Popen(
                    call,
                    env=base | environment | variables,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            self._workers[job.step] = worker
        return worker

    def _prepared_for(self, kind: str, environment: dict[str, str]) -> PreparedProcess | None:
        """The process that is prepared for a kind, a new one if there is none yet; None if it needs none."""
        kinds = KINDS[kind].prepared_with
        if not kinds or not hasattr(os, "pidfd_open"):
            return None
        key = kinds, *environment.items()
        with self._lock:
            if key not in self._prepared and not self._is_stopped:
                self._prepared[key] = PreparedProcess(kinds, environment)
            return self._prepared.get(key)

    def _free_slots_for(self, resources: Resources, processes: int) -> list[int] | None:
        """Free slots for a step, with a different GPU each if it needs GPUs; None if too little is free."""
        if resources.bytes > self._free_memory:
            return None
        gpus = min(processes if resources.gpus is None else resources.gpus, self.jobs) if self.gpus else 0
        count = min(max(processes, gpus, math.ceil((resources.cpus or 1) / self.threads)), self.jobs)
        free = sorted(self._free_slots)
        slots = sorted({slot % len(self.gpus): slot for slot in reversed(free)}.values())[:gpus] if gpus else []
        if len(slots) < gpus:
            return None
        slots += [slot for slot in free if slot not in slots][: count - len(slots)]
        return slots if len(slots) >= count else None

    def _environment(self, slots: int, processes: int) -> dict[str, str]:
        """The variables that libraries read when they are imported."""
        threads = str(max(1, self.threads * slots // processes))
        return WORKER_ENVIRONMENT | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}

    def _variables(self, slots: list[int], job: Job) -> dict[str, str]:
        """The variables that restrict one worker to its cores and GPUs."""
        cores = [core for slot in slots for core in self.cores[slot * self.threads : (slot + 1) * self.threads]]
        variables = {CORES: ",".join(map(str, cores))}
        if self.gpus:  # with fewer slots than processes the step has the machine to itself
            count = job.processes if job.resources.gpus is None else job.resources.gpus
            gpus = [self.gpus[slot % len(self.gpus)] for slot in slots[:count]]
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus if len(gpus) == count else self.gpus[:count])
        return variables


def kill(worker: subprocess.Popen[str] | ForkedWorker) -> None:
    """End a worker and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def machine_memory() -> int:
    """Main memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder, which does not have to exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def visible_gpus() -> list[str]:
    """The GPUs that steps can use, as CUDA_VISIBLE_DEVICES names them. Does not import torch."""
    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in names.split(",") if gpu.strip() and gpu.strip() != "-1"]
    try:
        output = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, _ in enumerate(output.stdout.splitlines())]
