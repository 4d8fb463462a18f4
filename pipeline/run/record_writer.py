"""Keeps run.json up to date while a run goes on."""

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
    _has_changed: bool = False
    """Whether a step has another state than run.json says."""

    def write(self, status: str) -> None:
        """Write run.json. Raises OSError."""
        started = time.monotonic()
        steps = list(self.steps.values())
        write_run_record(self.folder, self.recipe, status, self.width, steps, self.recipe_file)
        ended = time.monotonic()
        self._has_changed = False
        self._next_write = ended + max(INTERVAL_SECONDS, (ended - started) / MAX_SHARE)

    def update(self, step: StepRecord) -> None:
        """Replace the state of a step. `write_if_due` writes it."""
        self.steps[step.step] = step
        self._has_changed = True

    def taken_over_from(self) -> str | None:
        """The file of another recipe whose record of the same name this run replaces."""
        try:
            file = read_run_record(self.folder).recipe_file
        except (OSError, ValueError):
            return None
        return file if file not in ("", self.recipe_file) else None

    def write_if_due(self) -> bool:
        """Write run.json if a step has changed, but not a moment after the last write; return whether it did."""
        if is_due := self.seconds_until_due() == 0:
            self.write("running")
        return is_due

    def seconds_until_due(self) -> float | None:
        """Return the seconds until run.json may be written again; None if no step has changed since."""
        return max(0.0, self._next_write - time.monotonic()) if self._has_changed else None

    def without_result(self) -> list[str]:
        """The steps that were selected and have no result."""
        return [step.step for step in self.steps.values() if step.state in WITHOUT_RESULT]
