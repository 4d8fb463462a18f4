"""The `report` section of a recipe: which benchmarks to show, and against which model."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from stages.base import Need, StageConfig


class ReportStage(StageConfig):
    """Tables, figure and page of a run's benchmarks."""

    kind: ClassVar[str] = "report"
    makes: ClassVar[Literal["report"]] = "report"
    version: ClassVar[int] = 1
    runner: ClassVar[str] = "stages.report.stage:run"

    title: str | None = None
    """Headline of the page; None takes the recipe's name."""
    baseline: str | None = Field(default=None, min_length=1)
    """The model to compare others with; None finds the conventional one: prompt weight 0, completion not."""
    benchmarks: list[str] = Field(default_factory=list)
    """The stages to show that score models; empty shows all of the recipe."""

    @field_validator("benchmarks")
    @classmethod
    def _benchmarks_differ(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"named more than once: {', '.join(repeated)}")
        return names

    def needs(self) -> dict[str, Need]:
        """Every step of the benchmarks; `*` is every stage that scores models."""
        if not self.benchmarks:
            return {"": Need("steps", "*", "benchmarks")}
        return {name: Need("steps", name, f"benchmarks.{i}") for i, name in enumerate(self.benchmarks)}
