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
    """A step ready to run: `folder` holds job.json, and after it ran, result.json and out/."""

    step: str
    folder: Path
    log: Path


@dataclass(frozen=True)
class Event:
    """News of a step: progress while it runs, its result when it ended."""

    job: Job
    done: int = 0
    total: int = 0
    note: str = ""
    result: dict[str, Any] | None = None
    """{"metrics": ...} or {"error": ...}; None for mere progress."""


class LocalExecutor:
    """Runs up to `jobs` steps side by side, pinned to equal shares of the cores; one GPU each where there are any."""

    def __init__(self, jobs: int | None = None) -> None:
        self.gpus = visible_gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.jobs = jobs or len(self.gpus) or min(cores, JOBS_WITHOUT_GPU)
        self.threads = max(1, cores // self.jobs)
        self._free = list(range(self.jobs))
        self._events: queue.Queue[Event] = queue.Queue()
        self._running: dict[str, subprocess.Popen[str]] = {}

    @property
    def has_room(self) -> bool:
        """Whether another step may start."""
        return bool(self._free)

    def start(self, job: Job) -> None:
        """Start the job's worker; its news come by `wait`."""
        slot = self._free.pop(0)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w", encoding="utf-8") as log:
            call, environment = module_call("pipeline.worker", str(job.folder / "job.json"))
            worker = subprocess.Popen(
                call,
                env=environment | self._share(slot),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._running[job.step] = worker
        threading.Thread(target=self._follow, args=(job, worker, slot), daemon=True).start()

    def wait(self) -> Event:
        """The next event of any running step."""
        return self._events.get()

    def stop(self) -> None:
        """End all workers, and the processes they started."""
        for worker in list(self._running.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def _follow(self, job: Job, worker: subprocess.Popen[str], slot: int) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            done, total, note = json.loads(line)
            self._events.put(Event(job, done, total, note))
        status = worker.wait()
        try:
            result = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
        except OSError:
            result = {"error": f"its process ended with status {status} before it had a result (out of memory?)"}
        if status != 0:
            result.setdefault("error", f"its process ended with status {status} after it had a result")
        self._running.pop(job.step, None)
        self._free.append(slot)
        self._events.put(Event(job, result=result))

    def _share(self, slot: int) -> dict[str, str]:
        """The variables that keep a worker to its share of the machine, and to itself."""
        share = {
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONHASHSEED": "0",
        }
        if self.gpus:
            share["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
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
