"""What a finished step reports about itself: `metrics` in stage.json, returned by a stage's `run`."""

from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue


class Record(BaseModel):
    """A record that travels between packages or through a file. It does not change once it exists."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoreRow(Record):
    """One score of one model on one task."""

    task: str
    metric: str
    filter: str
    """lm-eval's filter, such as `strict-match`; `none` where there is none."""
    value: float | None
    """In the metric's own unit. None if nothing was scored."""
    stderr: float | None
    """Standard error over the items, in the same unit. None if it is not known."""
    n: int
    """Number of items."""
    headline: bool
    """Whether the report's main table shows it."""
    higher_is_better: bool | None
    """None if the task does not say."""
    members: dict[str, float] = {}
    """Of a group: task -> its weight; the value is the weighted sum of the tasks' own values."""


class ResultTable(Record):
    """The report's main table as text."""

    columns: list[str]
    rows: list[list[str]]


class Metrics(Record):
    """What a step reports. Kinds add further keys, which the manifest keeps as they are."""

    model_config = ConfigDict(extra="allow")

    notes: list[str] = []
    """Sentences that the console shows below the finished step."""
    seconds: float | None = None
    """Time that the stage itself measured, without the start of its process."""

    steps: int | None = None
    """Of a training: optimiser steps."""
    tokens: int | None = None
    """Of a training: tokens that went through the model."""
    train_loss: float | None = None
    data: dict[str, dict[str, JsonValue]] = {}
    """Of a training: counts of rows and tokens by split."""

    results: list[ScoreRow] | None = None
    """Of a stage that scores a model; None for any other."""
    samples: dict[str, str] = {}
    """Task -> the file with one line for each item."""
    resamples: dict[str, str] = {}
    """Task -> a file with metrics on resamples of its items: {"items": hash, "values": {metric: [value, ...]}}."""
    versions: dict[str, JsonValue] = {}
    """Task -> its version."""
    num_fewshot: dict[str, JsonValue] = {}
    """Task -> number of examples in each prompt."""
    environment: dict[str, JsonValue] = {}
    """Libraries and settings that can move a score."""

    table: ResultTable | None = None
    """Of a report."""
    summary: str | None = None
    """Of a report: its sentences about the differences."""

    def number(self, name: str) -> float | None:
        """The metric `name`, such as `eval_loss`; None if the step has no such number."""
        value: Any = self.to_json().get(name)
        return float(value) if isinstance(value, int | float) else None

    def extended(self, **values: Any) -> "Metrics":
        """These metrics with further ones, or other values."""
        return Metrics(**(self.to_json() | values))

    def to_json(self) -> dict[str, Any]:
        """The keys that the stage set, as JSON."""
        return self.model_dump(mode="json", exclude_unset=True)
