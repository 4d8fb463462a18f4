"""Where steps run: each in a process of its own on this machine, with its share of cores and GPUs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stages.base import Resources, StageConfig
from stages.system.module_command import module_command

CORES = "RUN_RECIPE_CORES"
"""The variable that names the cores that a worker keeps to; none, where the system cannot do that."""
ORDINARY = Resources()
"""What a step takes that says nothing of it."""
KEPT_TO_ITSELF = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONHASHSEED": "0",
    "TQDM_MININTERVAL": "10",
}
"""Variables of every worker's environment. Bars that nobody sees move in the log every 10 s."""
JOBS_WITHOUT_GPU = 4
"""How many steps run side by side at most where --jobs is not given and there is no GPU: each loads a model."""


@dataclass(frozen=True)
class Job:
    """A step ready to run: `folder` holds job.json, and after it ran, out/."""

    step: str
    folder: Path
    log: Path
    takes: Resources = ORDINARY
    processes: int = 1
    """How many processes it runs in."""


@dataclass(frozen=True)
class Event:
    """News of a step: progress while it runs, its result when it ended."""

    job: Job
    done: int = 0
    total: int = 0
    note: str = ""
    result: dict[str, Any] | None = None
    """{"metrics", "outputs", "machine"} or {"error", "is_user_error"}; None for mere progress."""


class Executor(Protocol):
    """Where steps run. Only the thread that made it calls it."""

    def unmet_requirement(self, config: StageConfig) -> tuple[str, str] | None:
        """Why a step of this stage can never run there: the key of the stage to blame, and the reason."""

    def has_room(self, takes: Resources = ..., processes: int = ...) -> bool:
        """Whether another step, which takes so much, may start."""

    def start(self, job: Job) -> None:
        """Start the job, for which there must be room; its news come by `wait`."""

    def wait(self, seconds: float | None = None) -> Event | None:
        """The next event of any running step; None where there is none for so many seconds."""

    def stop(self) -> None:
        """End all running steps, and the processes they started."""

    @property
    def width(self) -> int:
        """How many ordinary steps run side by side, for estimates of time."""


class LocalExecutor:
    """Runs up to `jobs` steps side by side, in slots: equal shares of the cores, with one GPU each where there are any.

    A step takes as many slots as it has processes or as its `resources` ask for; one of more processes than there are
    slots takes them all.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.gpus = visible_gpus()
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        cores = len(self.cores) or os.cpu_count() or 1
        self.jobs = jobs or len(self.gpus) or min(cores, JOBS_WITHOUT_GPU)
        self.threads = max(1, cores // self.jobs)
        self._memory = memory_of_machine()
        self._free = list(range(self.jobs))
        self._free_memory = self._memory
        self._events: queue.Queue[Event] = queue.Queue()
        self._running: dict[str, tuple[subprocess.Popen[str], list[int]]] = {}
        """Step -> its worker and its slots, until its result is handed out."""

    @property
    def width(self) -> int:
        """How many ordinary steps run side by side."""
        return self.jobs

    def unmet_requirement(self, config: StageConfig) -> tuple[str, str] | None:
        """Why a step of this stage can never run here: the key to blame, and the reason."""
        takes = config.resources
        if takes.gpus is None and self.gpus and config.processes > len(self.gpus):
            text = f"{config.processes} processes need as many GPUs, and there are {len(self.gpus)}"
            return "launch.num_processes", f"{text}; lower num_processes"
        if takes.gpus and takes.gpus > len(self.gpus):
            return "resources.gpus", f"asks for {takes.gpus}, and this machine has {len(self.gpus)}"
        if takes.cpus and takes.cpus > self.threads * self.jobs:
            text = f"asks for {takes.cpus}, and this machine has {self.threads * self.jobs}"
            return "resources.cpus", f"{text} for {self.jobs} slots of {self.threads}"
        if takes.bytes > self._memory:
            return "resources.memory", f"asks for {takes.memory}, and this machine has {self._memory / 2**30:.1f}GiB"
        return None

    def has_room(self, takes: Resources = ORDINARY, processes: int = 1) -> bool:
        """Whether another step, which takes so much, may start."""
        return self._pick(takes, processes) is not None

    def start(self, job: Job) -> None:
        """Start the job's worker; its news come by `wait`."""
        slots = self._pick(job.takes, job.processes)
        assert slots is not None, "asked for has_room before"
        self._free = [slot for slot in self._free if slot not in slots]
        self._free_memory -= job.takes.bytes
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w", encoding="utf-8") as log:
            call, environment = module_command("pipeline.run.loop.worker", str(job.folder / "job.json"))
            worker = subprocess.Popen(
                call,
                env=environment | self._share(slots, job),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._running[job.step] = worker, slots
        threading.Thread(target=self._follow, args=(job, worker), daemon=True).start()

    def wait(self, seconds: float | None = None) -> Event | None:
        """The next event of any running step; None where there is none for so many seconds."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event.result is not None:
            self._free += self._running.pop(event.job.step)[1]
            self._free_memory += event.job.takes.bytes
        return event

    def stop(self) -> None:
        """End all workers, and the processes they started."""
        for worker, _ in self._running.values():
            if worker.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()

    def _follow(self, job: Job, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        result: dict[str, Any] = {}
        for line in worker.stdout:
            told = json.loads(line)
            if isinstance(told, dict):
                result = told
            else:
                self._events.put(Event(job, *told))
        status = worker.wait()
        result = ended(result, status)
        self._events.put(Event(job, result=result))

    def _pick(self, takes: Resources, processes: int) -> list[int] | None:
        """Free slots for a step that takes so much, with a GPU of its own each as far as it asks for GPUs; None where
        too little is free."""
        if takes.bytes > self._free_memory:
            return None
        gpus = min(processes if takes.gpus is None else takes.gpus, self.jobs) if self.gpus else 0
        wanted = min(max(processes, gpus, math.ceil((takes.cpus or 1) / self.threads)), self.jobs)
        free = sorted(self._free)
        picked = sorted({slot % len(self.gpus): slot for slot in reversed(free)}.values())[:gpus] if gpus else []
        if len(picked) < gpus:
            return None
        picked += [slot for slot in free if slot not in picked][: wanted - len(picked)]
        return picked if len(picked) >= wanted else None

    def _share(self, slots: list[int], job: Job) -> dict[str, str]:
        """The variables that keep a worker to its share of the machine, and to itself."""
        threads = str(max(1, self.threads * len(slots) // job.processes))
        cores = [core for slot in slots for core in self.cores[slot * self.threads : (slot + 1) * self.threads]]
        share = {
            **KEPT_TO_ITSELF,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            CORES: ",".join(map(str, cores)),
        }
        if self.gpus:  # with fewer slots than processes the step has the machine to itself
            gpus = job.processes if job.takes.gpus is None else job.takes.gpus
            own = [self.gpus[slot % len(self.gpus)] for slot in slots[:gpus]]
            share["CUDA_VISIBLE_DEVICES"] = ",".join(own if len(own) == gpus else self.gpus[:gpus])
        return share


def ended(result: dict[str, Any], status: int) -> dict[str, Any]:
    """The result of a worker that ended with `status`, with an error where that, or the want of a result, is one."""
    if not result:
        return {"error": f"its process ended with status {status} before it had a result (out of memory?)"}
    if status != 0:
        result.setdefault("error", f"its process ended with status {status} after it had a result")
    return result


def memory_of_machine() -> int:
    """Bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def visible_gpus() -> list[str]:
    """The GPUs that steps may use, as CUDA_VISIBLE_DEVICES names them, found without torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() and gpu.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, _ in enumerate(listed.stdout.splitlines())]
