"""The `report` section of a recipe: which benchmarks and runs to show, and what to compare them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from stages.base import Config, Need, StageConfig

PUBLISHED = "file:published"
"""The name of the input that holds published grids; no step has it, for no stage's name has a colon."""
RUN = "run:"
"""What the names of the inputs begin with that are other recipes' runs."""


class JoinedRun(Config):
    """Another recipe's run."""

    run: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """The name of the recipe."""
    model_name: str | None = Field(default=None, min_length=1)
    """What to call its model."""
    data_name: str | None = Field(default=None, min_length=1)
    """What to call the data that it was tuned on."""


class ReportStage(StageConfig):
    """Tables, figures and page of a run's benchmarks, and of other runs beside it."""

    kind: ClassVar[str] = "report"
    output_kind: ClassVar[Literal["report"]] = "report"
    version: ClassVar[int] = 3

    title: str | None = None
    """Headline of the page; None takes the recipe's name."""
    model_name: str | None = Field(default=None, min_length=1)
    """What to call the recipe's model."""
    data_name: str | None = Field(default=None, min_length=1)
    """What to call the data that it was tuned on."""
    baseline: str | None = Field(default=None, min_length=1)
    """The model to compare others with; None finds the conventional one: prompt weight 0, completion not."""
    benchmarks: list[str] = Field(default_factory=list)
    """The stages to show that score models; empty shows all of the recipe."""
    runs: list[JoinedRun] = Field(default_factory=list)
    """Other recipes whose last run is shown, too: a name, or {run, model_name, data_name}."""
    published: str | None = None
    """A CSV file of grids measured elsewhere, with the columns model, dataset, prompt_weight, response_weight and
    average_score (in points; (0, 0) is the base model). A grid of the same model and data is shown beside its own."""

    @field_validator("benchmarks")
    @classmethod
    def _benchmarks_differ(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"named more than once: {', '.join(repeated)}")
        return names

    @field_validator("runs", mode="before", json_schema_input_type=list[str | JoinedRun])
    @classmethod
    def _a_name_is_a_run(cls, runs: Any) -> Any:
        return [{"run": each} if isinstance(each, str) else each for each in runs] if isinstance(runs, list) else runs

    @field_validator("runs")
    @classmethod
    def _runs_differ(cls, runs: list[JoinedRun]) -> list[JoinedRun]:
        names = [each.run for each in runs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"named more than once: {', '.join(repeated)}")
        return runs

    def needs(self) -> dict[str, Need]:
        """Every step of the benchmarks (`*` is every stage that scores models), and what lies elsewhere."""
        elsewhere = {f"{RUN}{each.run}": Need("run", each.run, f"runs.{i}.run") for i, each in enumerate(self.runs)}
        if self.published:
            elsewhere[PUBLISHED] = Need("data", self.published, "published")
        if not self.benchmarks:
            return {"": Need("steps", "*", "benchmarks", optional=bool(elsewhere)), **elsewhere}
        return {name: Need("steps", name, f"benchmarks.{i}") for i, name in enumerate(self.benchmarks)} | elsewhere

    def check(self, files: dict[str, Path]) -> None:
        """Read the published grids. Raises UserError."""
        from stages.report.published import read_grids

        if PUBLISHED in files:
            read_grids(files[PUBLISHED])
