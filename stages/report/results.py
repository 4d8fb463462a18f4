"""The scores of the steps that a report shows, their averages over benchmarks and their differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from statistics import fmean
from types import MappingProxyType
from urllib.parse import quote

from stages.base import BASE, Input, UserError
from stages.evaluation.score_rows import share_scale
from stages.records.manifest import MANIFEST
from stages.records.metrics import ScoreRow
from stages.report.sampling_errors import (
    Estimate,
    ItemValues,
    Residuals,
    read_items,
    residuals_of_error,
    residuals_of_items,
    residuals_of_resamples,
    weighted_sum,
    with_error,
)
from stages.system.file_names import file_name
from stages.system.integrity import read_json


@dataclass(frozen=True)
class Model:
    """One evaluated model and the trainings that led to it."""

    name: str
    """Its name in the benchmark's section (a stage, `base` or a reference), with the cell of the matrix."""
    lineage: tuple[Input, ...]
    """Its training step, the one of the model it started from, and so on; empty if no step trained it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Axis of the matrix -> value, for the axes that it depends on."""

    @property
    def stage(self) -> str:
        """The kind of its training step, or `base`."""
        return (self.lineage[0].kind or BASE) if self.lineage else BASE

    @property
    def weights(self) -> tuple[float | None, float | None]:
        """Prompt and completion weight of the SFT it is or started from."""
        for step in self.lineage:
            if weights := step.config.get("weights"):
                return weights.get("prompt"), weights.get("completion")
        return None, None

    @property
    def seed(self) -> int | None:
        return self.lineage[0].config.get("seed") if self.lineage else None

    @property
    def label(self) -> str:
        """`base`, `wit (0.2, 0.8)`, `dpo from wit`."""
        if self.stage == "sft" and None not in self.weights and not self.labels:
            prompt, completion = self.weights
            return f"{self.name} ({prompt:g}, {completion:g})"
        if len(self.lineage) > 1 and self.lineage[1].step and not self.labels:
            return f"{self.name} from {self.lineage[1].step}"
        return self.name


@dataclass(frozen=True)
class Column:
    """One metric of one task under one benchmark stage's settings. Only scores of one column are comparable."""

    benchmark: str
    task: str
    metric: str
    filter: str

    @property
    def metric_name(self) -> str:
        """`acc`, or `exact_match,letter` for a filter other than lm-eval's default."""
        return self.metric if self.filter in ("", "none") else f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Score:
    step: str
    model: Model
    column: Column
    row: ScoreRow


@dataclass(frozen=True)
class Results:
    """All scores of a run, in the order of the recipe."""

    models: list[Model]
    scores: list[Score]
    evaluations: dict[str, Input]
    folder: str = ".."
    """The run's folder of links to its results, relative to the report's folder below --runs."""
    scales: Mapping[str, float | None] = field(default_factory=dict)
    """Metric -> the value of a perfect score, where the recipe names it."""
    _residuals: dict[tuple[str, Column], Residuals | None] = field(default_factory=dict)
    _item_values: dict[tuple[str, Column], ItemValues] = field(default_factory=dict)

    @property
    def base(self) -> Model | None:
        """The recipe's own model."""
        return next((model for model in self.models if model.name == BASE), None)

    @cached_property
    def _measured(self) -> dict[tuple[str, Column], Score]:
        return {(s.model.name, s.column): s for s in reversed(self.scores) if s.row.value is not None}

    def score(self, model: Model, column: Column) -> Score | None:
        return self._measured.get((model.name, column))

    def link(self, step: str) -> str:
        """Return the path from the report's folder to the manifest of a step."""
        return quote(f"{self.folder}/{file_name(step)}/{MANIFEST}")

    def columns(self, headline: bool) -> list[Column]:
        """Return the columns of the main table, or all others."""
        heads = dict.fromkeys(score.column for score in self.scores if score.row.headline)
        if headline:
            return list(heads)
        return list(dict.fromkeys(s.column for s in self.scores if s.column not in heads))

    def scale(self, column: Column) -> float | None:
        """Return the value of a perfect score where values are shares of it and more is better: 1, or 100 for percent.

        None for any other metric, which is shown in its own unit and is in no average.
        """
        rows = [score.row for score in self.scores if score.column == column]
        scale = self.scales.get(column.metric, share_scale(column.task, column.metric))
        if scale is None or any(row.higher_is_better is False for row in rows):
            return None
        for row in rows:
            if row.value is not None and not -1e-9 <= row.value / scale <= 1 + 1e-9:
                raise UserError(
                    f"{column.task}: {column.metric} is {row.value:g}, but should be from 0 to {scale:g}; name the"
                    f" value of a perfect score: {{{column.metric}: {{scale: 100}}}}",
                    "metrics",
                )
        return scale

    def in_points(self, column: Column | None) -> bool:
        """Whether a column holds shares, shown x 100 and averaged. None is the average."""
        return column is None or self._scales[column] is not None

    @cached_property
    def _scales(self) -> dict[Column, float | None]:
        return {column: self.scale(column) for column in dict.fromkeys(score.column for score in self.scores)}

    @cached_property
    def averaged(self) -> list[Column]:
        """The headline columns that are in the average of any model: of each task the first that holds shares."""
        first: dict[tuple[str, str], Column] = {}
        for column in filter(self.in_points, self.columns(headline=True)):
            first.setdefault((column.benchmark, column.task), column)
        return list(first.values())

    def averaged_for(self, model: Model) -> list[Column]:
        """The headline columns that a model's average is over: those of the stages that scored it.

        So the average does not depend on which other models were scored, and by which stages.
        """
        benchmarks = {score.column.benchmark for score in self.scores if score.model.name == model.name}
        return [column for column in self.averaged if column.benchmark in benchmarks]

    def estimate(self, model: Model, column: Column | None = None) -> Estimate | None:
        """Return a model's score in a column, or its average; shares are of 1.

        The average is None where a benchmark is missing: over fewer benchmarks it would be another quantity.
        """
        if column is None:
            return self._sum([(1.0, model)], None)
        score = self.score(model, column)
        if score is None or score.row.value is None:
            return None
        scale, row = self._scales[column] or 1.0, score.row
        value = score.row.value / scale
        if row.stderr is None or self._has_repeats(score):
            return with_error(value, self.residuals(model, column))
        return Estimate(value, row.stderr / scale, row.n)  # the library's own, to the last digit

    def difference(self, model: Model, other: Model, column: Column | None = None) -> Estimate | None:
        """Return model minus other, in a column or of the averages; None unless both have the same benchmarks.

        Items that both answered are paired (stages/report/sampling_errors.py).
        """
        if column is None and self.averaged_for(model) != self.averaged_for(other):
            return None
        return self._sum([(1.0, model), (-1.0, other)], column)

    def _sum(self, models: Sequence[tuple[float, Model]], column: Column | None) -> Estimate | None:
        """The weighted sum of the models' scores in a column or of their averages; None if one is missing."""
        columns = self.averaged_for(models[0][1]) if column is None else [column]
        parts = [(weight / len(columns), model, each) for weight, model in models for each in columns]
        estimates = [self.estimate(model, each) for _, model, each in parts]
        if not parts or None in estimates:
            return None
        value = math.fsum(w * e.value for (w, _, _), e in zip(parts, estimates, strict=True) if e)
        return with_error(value, weighted_sum((weight, self.residuals(model, each)) for weight, model, each in parts))

    def residuals(self, model: Model, column: Column) -> Residuals | None:
        """Return the residuals of a model's score as a share or in its own unit; None if its error is unknown."""
        score = self._measured[model.name, column]
        key = (score.step, column)
        if key not in self._residuals:
            scale = self._scales[column] or 1.0
            self._residuals[key] = weighted_sum([(1 / scale, self._read_residuals(score))])
        return self._residuals[key]

    def _read_residuals(self, score: Score) -> Residuals | None:
        """The residuals over items, where these give the score; else those of its standard error alone."""
        row, evaluation, column = score.row, self.evaluations[score.step], score.column
        if name := evaluation.metrics.resamples.get(column.task):  # of a fit to all items, whose items have no errors
            resamples = read_json(evaluation.path / name)
            if values := resamples["values"].get(column.metric):
                return residuals_of_resamples(values, resamples["items"], row.n)
        parts = {task: self._items(score.step, replace(column, task=task)) for task in row.members or (column.task,)}
        weights = row.members or {column.task: 1.0}
        if row.value is not None and all(parts.values()):
            means = [w * fmean(chain(*parts[task].values())) for task, w in weights.items()]
            residuals = [residuals_of_items(items) for items in parts.values()]
            if None not in residuals and math.isclose(math.fsum(means), row.value, abs_tol=1e-9):
                return weighted_sum(zip(weights.values(), residuals, strict=True))
        return residuals_of_error(f"{score.step} {column}", row.stderr, row.n)

    def _has_repeats(self, score: Score) -> bool:
        """Whether an item of a task has several values, which the library's error takes for several items."""
        items = {} if score.row.members else self._items(score.step, score.column)
        return any(len(values) > 1 for values in items.values())

    def _items(self, step: str, column: Column) -> ItemValues:
        if (step, column) not in self._item_values:
            evaluation = self.evaluations[step]
            name = evaluation.metrics.samples.get(column.task)
            items = read_items(evaluation.path / name, column.metric, column.filter) if name else {}
            self._item_values[step, column] = items
        return self._item_values[step, column]


def read_results(
    steps: Mapping[str, Input], folder: str = "..", scales: Mapping[str, float | None] = MappingProxyType({})
) -> Results:
    """Collect the scores of `steps`, each of which scored one model."""
    models: dict[str, Model] = {}
    scores = []
    for step, result in steps.items():
        name = result.config["models"][0]
        if result.labels:
            name += f"[{','.join(f'{axis}={value}' for axis, value in result.labels.items())}]"
        model = models.setdefault(name, Model(name, _lineage(result.inputs.get("model")), result.labels))
        for row in result.metrics.results or []:
            column = Column(step.partition("[")[0], row.task, row.metric, row.filter)
            scores.append(Score(step, model, column, row))
    return Results(list(models.values()), scores, dict(steps), folder, scales)


def _lineage(step: Input | None) -> tuple[Input, ...]:
    chain = []
    while step is not None and step.kind is not None:
        chain.append(step)
        step = step.inputs.get("model")
    return tuple(chain)


def find_baseline(models: list[Model], name: str | None) -> Model | None:
    """Return the model `name`, or else the conventionally tuned one: an SFT with prompt weight 0 and completion not 0.

    Of several such, completion weight 1 comes first, then the order of the recipe.
    """
    if name is not None:
        for model in models:
            if model.name == name:
                return model
        raise UserError(f"baseline: {name!r} is in no benchmark; evaluated are {', '.join(m.name for m in models)}")
    conventional = [m for m in models if m.stage == "sft" and m.weights[0] == 0 and m.weights[1]]
    return min(conventional, key=lambda m: m.weights[1] != 1, default=None)
