"""The protocol of executors, which run steps on this machine or on a cluster."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pipeline.run.forked_process import ForkedProcess
from pipeline.run.job import Job, StepResult
from stages.base import Resources, StageConfig
from stages.records.run_record import Progress
from stages.system.limits import END_SIGNAL, END_TEXT

CORES = "RUN_RECIPE_CORES"
"""The environment variable with the cores that a worker may use; empty if the system cannot restrict them."""


@dataclass(frozen=True)
class Event:
    """News of a running step: progress, or its result."""

    job: Job
    message: Progress | StepResult


class Executor(Protocol):
    """Runs steps. Only the thread that created it calls it."""

    def unmet_requirement(self, config: StageConfig) -> tuple[str, str] | None:
        """Why a step of this stage can never run here: the key to blame, and the reason; None if it can."""

    def expect(self, kinds: Iterable[str]) -> None:
        """Steps of these kinds will be started soon: import their libraries meanwhile, if that helps."""
        return

    def fork(self, kinds: Iterable[str], module: str, argument: str, log: int) -> ForkedProcess | None:
        """Run main(argument) of a module in a process that has already imported what stages of these kinds need, with
        the file of the descriptor `log` as standard error. None if there is no such process."""
        return None

    def gpu_share(self, memory: int) -> float | None:
        """Return the share of a GPU for a step of one process; None if the executor does not share GPUs by memory, as
        on a cluster, where they differ.

        Args:
            memory: bytes of the GPU that the step needs; 0 if unknown.
        """
        return None

    def has_room(self, resources: Resources, processes: int) -> bool:
        """Whether another step with these resources, in so many processes, can start now."""

    def start(self, job: Job) -> None:
        """Start a step for which there is room. `wait` returns its events."""

    def wait(self, seconds: float | None = None) -> Event | None:
        """Return the next event of any running step; None if there is none within `seconds`."""

    def stop(self) -> None:
        """End all running steps and the processes they started."""

    @property
    def width(self) -> int:
        """Number of steps of one process that run at once, for estimates of time."""


def worker_environment(threads: int) -> dict[str, str]:
    """The environment variables of a worker that libraries read when they are imported."""
    return {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONHASHSEED": "0",
        "TQDM_MININTERVAL": "10",  # seconds between the lines of progress bars in the log, where nobody watches
        "OMP_NUM_THREADS": str(max(1, threads)),
        "MKL_NUM_THREADS": str(max(1, threads)),
    }


def checked_result(result: StepResult | None, status: int) -> StepResult:
    """The result of a worker that ended with exit status `status`; an error if either is one."""
    if status == -END_SIGNAL:
        return StepResult(error=END_TEXT, is_user_error=True)
    if result is None:
        return StepResult(error=f"its process ended with status {status} before it had a result (out of memory?)")
    if status != 0 and result.error is None:
        return StepResult(error=f"its process ended with status {status} after it had a result")
    return result
