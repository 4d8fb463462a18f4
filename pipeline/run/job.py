"""What a run and the worker process of a step tell each other: job.json, progress and the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """A lock that each worker of the step holds while it works."""
    resources: Resources
    processes: int
    """Number of processes of the step."""

    @property
    def file(self) -> Path:
        return self.folder / JOB_FILE

    def write(self) -> None:
        """Write job.json. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = {name: str(getattr(self, name)) for name in ("folder", "cache", "log", "lock")}
        inputs = {name: source.to_json() for name, source in self.inputs.items()}
        write_json(self.file, {**vars(self), **paths, "inputs": inputs, "resources": self.resources.model_dump()})


def read_job(file: Path) -> Job:
    values = json.loads(file.read_text(encoding="utf-8"))
    paths = {name: Path(values[name]) for name in ("folder", "cache", "log", "lock")}
    inputs = {name: Input.from_json(source) for name, source in values["inputs"].items()}
    resources = Resources.model_validate(values["resources"])
    return Job(**{**values, **paths, "inputs": inputs, "resources": resources})


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

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "metrics": self.metrics.to_json() if self.metrics else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepResult:
        metrics = values["metrics"]
        return cls(**{**values, "metrics": None if metrics is None else Metrics.model_validate(metrics)})


def encode(message: Progress | StepResult) -> str:
    """A message of a worker as one line of text."""
    return json.dumps(message if isinstance(message, Progress) else message.to_json())


def decode(line: str) -> Progress | StepResult:
    values = json.loads(line)
    return Progress(*values) if isinstance(values, list) else StepResult.from_json(values)
