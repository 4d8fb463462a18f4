"""The `report` section of a recipe: which benchmarks and runs to show, and what to compare them with."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator

from stages.base import Config, Need, StageConfig
from stages.evaluation.config import unique, unique_by

PUBLISHED = "file:published"
"""The name of the input with published grids; the colon keeps it apart from names of steps."""
RUN_PREFIX = "run:"
"""The prefix of the names of inputs that are other recipes' runs."""


class JoinedRun(Config):
    """Another recipe's run."""

    run: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """The name of the recipe."""
    model_name: str | None = Field(default=None, min_length=1)
    """The display name of its model."""
    data_name: str | None = Field(default=None, min_length=1)
    """The display name of its training data."""


class MetricScale(Config):
    """How to show a metric."""

    scale: Annotated[float, Field(gt=0)] | None
    """The value of a perfect score: 1, or 100 for percent. The metric is then shown in points and enters the average.
    None: it is shown in its own unit and enters no average."""


class ReportStage(StageConfig):
    """Tables, figures and a page of the benchmarks of this recipe and of other recipes' runs."""

    kind: ClassVar[str] = "report"
    output_kind: ClassVar[Literal["report"]] = "report"
    version: ClassVar[int] = 7
    is_forked: ClassVar[bool] = True

    title: str | None = None
    """Headline of the page. Default: the recipe's name."""
    model_name: str | None = Field(default=None, min_length=1)
    """The display name of the recipe's model."""
    data_name: str | None = Field(default=None, min_length=1)
    """The display name of its training data."""
    baseline: str | None = Field(default=None, min_length=1)
    """The model to compare the others with. Default: the one with prompt weight 0 and completion weight not 0."""
    benchmarks: Annotated[list[str], AfterValidator(unique)] = Field(default_factory=list)
    """The stages to show that score models. Default: all of the recipe."""
    runs: Annotated[list[JoinedRun], unique_by("run")] = Field(default_factory=list)
    """Other recipes whose last run the report shows, too: a name, or {run, model_name, data_name}."""
    metrics: dict[str, MetricScale] = Field(default_factory=dict)
    """Metric -> its scale, such as `chrf: {scale: 100}`, for metrics that the report does not know, or whose task
    counts in percent. stages/evaluation/metric_scales.yaml has those that it knows."""
    published: str | None = None
    """A CSV file of published grids with the columns model, dataset, prompt_weight, response_weight and average_score
    (in points; (0, 0) is the base model). The report compares each grid with the published one of the same model and
    data."""

    @field_validator("runs", mode="before", json_schema_input_type=list[str | JoinedRun])
    @classmethod
    def _expand_names(cls, runs: Any) -> Any:
        if not isinstance(runs, list):
            return runs
        return [{"run": entry} if isinstance(entry, str) else entry for entry in runs]

    @property
    def scales(self) -> dict[str, float | None]:
        """Metric -> the value of a perfect score."""
        return {name: metric.scale for name, metric in self.metrics.items()}

    def needs(self) -> dict[str, Need]:
        others = {
            f"{RUN_PREFIX}{entry.run}": Need("run", entry.run, f"runs.{i}.run") for i, entry in enumerate(self.runs)
        }
        if self.published:
            others[PUBLISHED] = Need("data", self.published, "published")
        if not self.benchmarks:
            return {"": Need("steps", "*", "benchmarks", optional=bool(others)), **others}
        return {name: Need("steps", name, f"benchmarks.{i}") for i, name in enumerate(self.benchmarks)} | others

    def check(self, files: dict[str, Path]) -> None:
        from stages.report.grid import read_published_grids

        if PUBLISHED in files:
            read_published_grids(files[PUBLISHED])
