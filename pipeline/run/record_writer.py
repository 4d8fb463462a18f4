"""Keeps run.json up to date while a run goes on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from stages.records.run_record import WITHOUT_RESULT, StepRecord, read_run_record, write_run_record

INTERVAL_SECONDS = 1.0
"""Time between two writes while steps run."""
MAX_SHARE = 0.05
"""Share of the run's time that writing may take; the interval grows if the file is large."""


@dataclass
class RecordWriter:
    """The states of a run's steps, and the file they are written to."""

    folder: Path
    recipe: str
    recipe_file: str
    width: int = 1
    """How many steps run at once."""
    steps: dict[str, StepRecord] = field(default_factory=dict)
    """Step -> its state, in the order of the plan."""
    _next_write: float = 0.0
    _is_late: bool = False
    """Whether something happened that is not written yet."""

    def write(self, status: str) -> None:
        """Write run.json. Raises OSError."""
        started = time.monotonic()
        steps = list(self.steps.values())
        write_run_record(self.folder, self.recipe, status, self.width, steps, self.recipe_file)
        ended = time.monotonic()
        self._is_late = False
        self._next_write = ended + max(INTERVAL_SECONDS, (ended - started) / MAX_SHARE)

    def taken_over_from(self) -> str | None:
        """The file of another recipe whose record of the same name this run replaces."""
        try:
            file = read_run_record(self.folder).recipe_file
        except (OSError, ValueError):
            return None
        return file if file not in ("", self.recipe_file) else None

    def write_if_due(self) -> bool:
        """Write run.json unless that happened a moment ago; return whether it was written."""
        is_due = time.monotonic() >= self._next_write
        if is_due:
            self.write("running")
        self._is_late = not is_due
        return is_due

    def seconds_until_due(self) -> float | None:
        """When to write what came too soon after the last write; None if everything is written."""
        return max(0.0, self._next_write - time.monotonic()) if self._is_late else None

    def without_result(self) -> list[str]:
        """The steps that were selected and have no result."""
        return [step.step for step in self.steps.values() if step.state in WITHOUT_RESULT]
