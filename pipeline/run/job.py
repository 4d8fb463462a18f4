"""What a run and the worker process of a step tell each other: job.json, progress and the result."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stages.base import Input, Resources
from stages.records.metrics import Metrics
from stages.records.run_record import Progress
from stages.system.integrity import write_json

JOB_FILE = "job.json"


@dataclass(frozen=True)
class Job:
    """A step that is ready to run, with everything that its worker has to know."""

    recipe: str
    step: str
    kind: str
    config: dict[str, Any]
    """The stage's section of the recipe, resolved."""
    inputs: Mapping[str, Input]
    folder: Path
    """The folder of the unfinished step: job.json, and after the run out/. Absolute."""
    cache: Path
    """The folder that all steps share."""
    log: Path
    """The file for the worker's output. Absolute."""
    lock: Path
    """A lock that each worker of the step holds while it works. Absolute: Ray starts workers in its own folder."""
    resources: Resources
    processes: int
    """Number of processes of the step."""

    @property
    def file(self) -> Path:
        return self.folder / JOB_FILE

    def write(self) -> None:
        """Write job.json, and delete the log of an earlier attempt. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.file, to_json(self))
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.unlink(missing_ok=True)


@dataclass(frozen=True)
class StepResult:
    """How a step ended: with metrics and outputs, or with an error."""

    metrics: Metrics | None = None
    outputs: Mapping[str, str] | None = None
    """Name of each file in out/ -> sha256."""
    machine: Mapping[str, Any] | None = None
    """Device and threads that the step used."""
    error: str | None = None
    is_user_error: bool = False
    """Whether the error message alone tells the user what to do, without the log."""
    gpu_was_full: bool = False
    """Whether the memory of a GPU ran out."""


def to_json(value: Job | StepResult) -> dict[str, Any]:
    """Return `value` as JSON; of metrics only those that the stage set."""
    values: dict[str, Any] = TypeAdapter(type(value)).dump_python(value, mode="json", exclude_unset=True)
    return values


def read_job(file: Path) -> Job:
    return TypeAdapter(Job).validate_json(file.read_bytes())


def read_result(values: Any) -> StepResult:
    return TypeAdapter(StepResult).validate_python(values)


def encode(message: Progress | StepResult) -> str:
    """A message of a worker as one line of text."""
    return json.dumps(message if isinstance(message, Progress) else to_json(message))


def decode(line: str) -> Progress | StepResult:
    values = json.loads(line)
    return Progress(*values) if isinstance(values, list) else read_result(values)
