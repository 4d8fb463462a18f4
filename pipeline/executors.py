"""Where steps run: each in a process of its own on this machine, with its share of cores and GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.process import module_call

JOBS_WITHOUT_GPU = 4
"""How many steps run side by side at most where --jobs is not given and there is no GPU: each loads a model."""


@dataclass(frozen=True)
class Job:
    """A step ready to run: `folder` holds job.json, and after it ran, out/."""

    step: str
    folder: Path
    log: Path
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
    """{"metrics", "outputs", "machine"} or {"error", "mendable"}; None for mere progress."""


class LocalExecutor:
    """Runs up to `jobs` steps side by side, pinned to equal shares of the cores; one GPU each where there are any.

    A step of several processes takes as many of the shares, or all there are.
    """

    def __init__(self, jobs: int | None = None) -> None:
        self.gpus = visible_gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.jobs = jobs or len(self.gpus) or min(cores, JOBS_WITHOUT_GPU)
        self.threads = max(1, cores // self.jobs)
        self._free = list(range(self.jobs))
        self._events: queue.Queue[Event] = queue.Queue()
        self._running: dict[str, subprocess.Popen[str]] = {}

    def lacks(self, processes: int) -> str | None:
        """Why a step of so many processes can never run here; None where it can."""
        if self.gpus and processes > len(self.gpus):
            return f"{processes} processes need as many GPUs, and there are {len(self.gpus)}; lower num_processes"
        return None

    def has_room(self, processes: int = 1) -> bool:
        """Whether another step, of so many processes, may start."""
        return self._pick(processes) is not None

    def start(self, job: Job) -> None:
        """Start the job's worker; its news come by `wait`."""
        slots = self._pick(job.processes)
        assert slots is not None, "asked for has_room before"
        self._free = [slot for slot in self._free if slot not in slots]
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w", encoding="utf-8") as log:
            call, environment = module_call("pipeline.worker", str(job.folder / "job.json"))
            worker = subprocess.Popen(
                call,
                env=environment | self._share(slots, job.processes),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._running[job.step] = worker
        threading.Thread(target=self._follow, args=(job, worker, slots), daemon=True).start()

    def wait(self, seconds: float | None = None) -> Event | None:
        """The next event of any running step; None where there is none for so many seconds."""
        with contextlib.suppress(queue.Empty):
            return self._events.get(timeout=seconds)
        return None

    def stop(self) -> None:
        """End all workers, and the processes they started."""
        for worker in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def _follow(self, job: Job, worker: subprocess.Popen[str], slots: list[int]) -> None:
        assert worker.stdout is not None
        result: dict[str, Any] = {}
        for line in worker.stdout:
            told = json.loads(line)
            if isinstance(told, dict):
                result = told
            else:
                self._events.put(Event(job, *told))
        status = worker.wait()
        if not result:
            result = {"error": f"its process ended with status {status} before it had a result (out of memory?)"}
        elif status != 0:
            result.setdefault("error", f"its process ended with status {status} after it had a result")
        self._running.pop(job.step, None)
        self._free += slots
        self._events.put(Event(job, result=result))

    def _pick(self, processes: int) -> list[int] | None:
        """Free slots for so many processes, on a GPU each; None where too few are free."""
        wanted = min(processes, self.jobs)
        free = sorted(self._free)
        if self.gpus:
            free = sorted({slot % len(self.gpus): slot for slot in reversed(free)}.values())
        return free[:wanted] if len(free) >= wanted else None

    def _share(self, slots: list[int], processes: int) -> dict[str, str]:
        """The variables that keep a worker to its share of the machine, and to itself."""
        threads = str(max(1, self.threads * len(slots) // processes))
        share = {
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONHASHSEED": "0",
        }
        if self.gpus:  # with fewer slots than processes the step has the machine to itself
            own = [self.gpus[slot % len(self.gpus)] for slot in slots]
            share["CUDA_VISIBLE_DEVICES"] = ",".join(own if len(slots) == processes else self.gpus[:processes])
        return share


def visible_gpus() -> list[str]:
    """The GPUs that steps may use, as CUDA_VISIBLE_DEVICES names them, found without torch."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() and gpu.strip() != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, _ in enumerate(listed.stdout.splitlines())]
