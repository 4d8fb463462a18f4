"""Runs each step in a process of its own on this machine, with its share of cores and GPUs."""

import contextlib
import math
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pipeline.run.executor import CORES, Event, checked_result, worker_environment
from pipeline.run.forked_process import ForkedProcess, PreparedProcess, kill
from pipeline.run.job import Job, StepResult, decode
from stages.base import Resources, StageConfig
from stages.kinds import KINDS
from stages.system.module_command import module_command

MAX_JOBS = 4
"""Number of steps at once without --jobs, on each GPU or without one: each loads a model."""

GPU_PROCESS = 2**30
"""Bytes of a GPU that each process takes for itself, beside what its estimate counts."""
ESTIMATE_MARGIN = 1.2
"""By how much more than its estimate a step may take."""

LOG_SECONDS = 5.0
"""How long to wait for the end of a worker's log after the worker has ended."""

WORKER = "pipeline.run.worker"
"""The module that runs a step."""

ROUNDING = 1e-6
"""Shares of a GPU that differ by less are equal."""


@dataclass(frozen=True)
class _Share:
    """What a step occupies of this machine: slots, GPUs or the share `of_each` of them, and bytes of main memory."""

    slots: list[int]
    gpus: list[str]
    of_each: float
    memory: int


class LocalExecutor:
    """Runs up to `jobs` steps at once, in slots: equal shares of the cores.

    A step occupies as many slots as it has processes or as its `resources` ask for. A step with more processes than
    there are slots occupies all of them. Where there are GPUs, it also takes one for each of its processes, or a share
    of one, with as many slots as belong to that.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.gpus, self.gpu_memory = visible_gpus()
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = len(self.cores) or os.cpu_count() or 1
        self.jobs = jobs or max(len(self.gpus), min(cores, MAX_JOBS * max(1, len(self.gpus))))
        self.width = jobs or len(self.gpus) or self.jobs
        self.threads = max(1, cores // self.jobs)
        self._memory = machine_memory()
        self._events: queue.Queue[Event] = queue.Queue()
        self._shares: dict[str, _Share] = {}
        """Step -> what it occupies, until `wait` returns its result."""
        self._workers: dict[str, subprocess.Popen[str] | ForkedProcess] = {}
        """Step -> its worker, once that is there."""
        self._expected: list[str] = []
        """Kinds whose libraries a prepared process imports without being asked."""
        self._prepared: dict[tuple[tuple[str, str], ...], PreparedProcess] = {}
        """Environment -> the process that is prepared in it."""
        self._is_stopped = False
        self._lock = threading.Lock()
        """Held to change the workers, the prepared processes and `_is_stopped`."""

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
        self._expected = [kind for kind in kinds if KINDS[kind].is_forked]
        if self._expected:
            self._prepared_in(worker_environment(self.threads))

    def fork(self, kinds: Iterable[str], module: str, argument: str, log: int) -> ForkedProcess | None:
        prepared = next(iter(self._prepared.values()), None)
        kinds = [kind for kind in kinds if KINDS[kind].is_forked]
        return prepared.fork(kinds, module, argument, log) if prepared else None

    def gpu_share(self, memory: int) -> float | None:
        if not self.gpus:
            return None
        if not memory or not self.gpu_memory:
            return min(1.0, len(self.gpus) / self.width)
        return min(1.0, (ESTIMATE_MARGIN * memory + GPU_PROCESS) / self.gpu_memory)

    def has_room(self, resources: Resources, processes: int) -> bool:
        return self._free_share(resources, processes) is not None

    def start(self, job: Job) -> None:
        """Start the job's worker; `wait` returns its events."""
        share = self._free_share(job.resources, job.processes)
        assert share is not None, "has_room is asked first"
        with job.log.open("xb") as log:
            call, environment = module_command("pipeline.run.masked_log")
            mask = subprocess.Popen(call, env=environment, stdin=subprocess.PIPE, stdout=log, start_new_session=True)
        self._shares[job.step] = share
        threading.Thread(target=self._follow, args=(job, share, mask), daemon=True).start()

    def wait(self, seconds: float | None = None) -> Event | None:
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(event.message, StepResult):
            del self._shares[event.job.step]
            self._workers.pop(event.job.step, None)
        return event

    def stop(self) -> None:
        with self._lock:
            self._is_stopped = True
        for worker in list(self._workers.values()):
            kill(worker)
            worker.wait()
        for prepared in self._prepared.values():
            prepared.stop()

    def _follow(self, job: Job, share: _Share, mask: subprocess.Popen[bytes]) -> None:
        """Start a worker, and turn its output into events. At the last one, its log is complete."""
        assert mask.stdin is not None
        with mask.stdin:
            try:
                worker = self._start_worker(job, share, mask.stdin)
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

    def _start_worker(self, job: Job, share: _Share, log: IO[bytes]) -> subprocess.Popen[str] | ForkedProcess:
        """Fork a worker from a process that is prepared for its kind, or start one. Raises OSError."""
        worker: subprocess.Popen[str] | ForkedProcess | None = None
        environment = worker_environment(self.threads * len(share.slots) // job.processes)
        variables = self.variables(share.slots, share.gpus)
        # a model's own code gets a process whose libraries have not read where they copy such code to
        is_started = job.config.get("launch") or job.config.get("trust_remote_code")
        if KINDS[job.kind].is_forked and not is_started and (prepared := self._prepared_in(environment)):
            worker = prepared.fork([job.kind], WORKER, str(job.file), log.fileno(), variables)
        with self._lock:
            if self._is_stopped:
                if worker:
                    kill(worker)
                raise OSError("the run was stopped")
            if worker is None:
                call, base = module_command(WORKER, str(job.file))
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

    def _prepared_in(self, environment: dict[str, str]) -> PreparedProcess | None:
        """The process that is prepared in this environment, a new one if there is none yet; None if none can fork."""
        if not hasattr(os, "pidfd_open"):
            return None
        key = tuple(environment.items())
        with self._lock:
            if key not in self._prepared and not self._is_stopped:
                self._prepared[key] = PreparedProcess(self._expected, environment)
            return self._prepared.get(key)

    def _free_share(self, resources: Resources, processes: int) -> _Share | None:
        """What a step would occupy; None if too little is free. Of GPUs that fit, it gets those with the most room."""
        shares = list(self._shares.values())
        if resources.bytes > self._memory - sum(share.memory for share in shares):
            return None
        asked = processes if resources.gpus is None else resources.gpus
        whole = int(asked) if asked >= 1 else bool(asked)
        of_each = min(1.0, asked)
        used = {gpu: sum(share.of_each for share in shares if gpu in share.gpus) for gpu in self.gpus}
        free = [gpu for gpu in sorted(used, key=used.__getitem__) if used[gpu] + of_each < 1 + ROUNDING]
        if self.gpus and len(free) < whole:
            return None
        slots_of_gpus = int(asked * self.jobs / len(self.gpus)) if self.gpus else 0
        count = min(max(processes, slots_of_gpus, math.ceil((resources.cpus or 1) / self.threads)), self.jobs)
        occupied = {slot for share in shares for slot in share.slots}
        slots = [slot for slot in range(self.jobs) if slot not in occupied][:count]
        return _Share(slots, free[:whole], of_each, resources.bytes) if len(slots) == count else None

    def variables(self, slots: list[int], gpus: list[str]) -> dict[str, str]:
        """The variables that restrict one worker to its cores and GPUs."""
        cores = [core for slot in slots for core in self.cores[slot * self.threads : (slot + 1) * self.threads]]
        variables = {CORES: ",".join(map(str, cores))}
        return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if self.gpus else {})


def machine_memory() -> int:
    """Main memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_disk(folder: Path) -> int:
    """Free bytes on the disk of a folder, which does not have to exist yet."""
    folder = folder.absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def visible_gpus() -> tuple[list[str], int]:
    """The GPUs that steps can use, as CUDA_VISIBLE_DEVICES names them, and the bytes of the smallest, 0 if unknown.

    Does not import torch.
    """
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [gpu for gpu in (variable or "").split(",") if gpu.strip() and gpu.strip() != "-1"]
    if variable is not None and not names:
        return [], 0
    these = [f"--id={','.join(names)}"] if names else []
    call = ["nvidia-smi", *these, "--query-gpu=index,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(call, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return names, 0
    rows = [line.partition(", ") for line in output.splitlines()]
    memory = min((int(size) if size.isdecimal() else 0 for _, _, size in rows), default=0)
    return names or [index for index, _, _ in rows], memory * 2**20
