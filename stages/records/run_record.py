"""run.json: the state of every step of a run, while it runs and afterwards."""

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import TypeAdapter, ValidationError

from stages.system.integrity import read_json, write_json

RUN_RECORD = "run.json"
STATES = ("done", "cached", "failed", "skipped", "interrupted", "running", "waiting", "not asked for")
"""States of a step, in the order in which summaries list them."""
WITHOUT_RESULT = ("failed", "skipped", "interrupted", "waiting")
"""States of steps that were selected and have no result."""


class Progress(NamedTuple):
    """How far a running step is."""

    done: int = 0
    total: int = 0
    note: str = ""
    """Such as `loss 1.234`."""


@dataclass(frozen=True)
class StepRecord:
    """The state of one step."""

    step: str
    kind: str
    labels: Mapping[str, str]
    """The axes of the matrix on which the step depends -> the values of its cell."""
    state: str
    """One of STATES."""
    fingerprint: str | None
    path: str | None
    """Folder of the result, relative to the runs folder."""
    seconds: float | None = None
    error: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json."""

    recipe: str
    status: str
    """`running`, `done`, `failed` or `interrupted`."""
    host: str
    process: int
    written: str
    """Time of day, ISO 8601, UTC."""
    side_by_side: int
    """How many steps run at once."""
    steps: list[StepRecord]
    recipe_file: str = ""
    """Path of the recipe, relative to the folder of the runs folder; empty in records of older versions."""

    @property
    def was_killed(self) -> bool:
        """Whether the file says that the run goes on, but its process on this machine has ended."""
        is_ours = self.status == "running" and self.host == socket.gethostname()
        return is_ours and not psutil.pid_exists(self.process)


def read_run_record(folder: Path) -> RunRecord:
    """Read run.json in `folder`. Raises OSError or ValueError."""
    body = read_json(folder / RUN_RECORD)
    try:
        return TypeAdapter(RunRecord).validate_python(body)
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"wrong or missing key {key}" if key else "it is no JSON object"
        raise ValueError(f"unknown form, perhaps of an older version: {reason}") from None


def write_run_record(
    folder: Path, recipe: str, status: str, side_by_side: int, steps: list[StepRecord], recipe_file: str
) -> None:
    """Write run.json into `folder`, in this process's name. Raises OSError."""
    written = datetime.now(UTC).isoformat(timespec="seconds")
    record = RunRecord(recipe, status, socket.gethostname(), os.getpid(), written, side_by_side, steps, recipe_file)
    write_json(folder / RUN_RECORD, asdict(record))
