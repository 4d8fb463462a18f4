"""The scores of the steps that a report shows, their averages over benchmarks and their differences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from urllib.parse import quote

from stages.base import BASE, Input, UserError
from stages.records.manifest import MANIFEST
from stages.records.metrics import ScoreRow
from stages.system.file_names import file_name

ItemScores = dict[tuple[int, str], float]
"""(doc_id, doc_hash) -> the score of one item."""


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
class Estimate:
    """A number with its standard error, in the same unit; the error is None if it is not known."""

    value: float
    stderr: float | None


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
    _items: dict[tuple[str, Column], ItemScores] = field(default_factory=dict)

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

    def in_points(self, column: Column | None) -> bool:
        """Whether a column holds shares of 1 where more is better: shown x 100 and averaged. None is the average."""
        rows = [score.row for score in self.scores if score.column == column]
        return all(0 <= row.value <= 1 and row.higher_is_better is not False for row in rows if row.value is not None)

    @cached_property
    def averaged(self) -> list[Column]:
        """The headline columns that the average is over."""
        return [column for column in self.columns(headline=True) if self.in_points(column)]

    def estimate(self, model: Model, column: Column | None = None) -> Estimate | None:
        """Return a model's score in a column, or its average over `averaged`.

        The average is None where a benchmark is missing: over fewer benchmarks it would be another quantity.
        """
        if column is None:
            return _mean([self.estimate(model, averaged) for averaged in self.averaged])
        score = self.score(model, column)
        return Estimate(score.row.value, score.row.stderr) if score and score.row.value is not None else None

    def difference(self, model: Model, other: Model, column: Column | None = None) -> Estimate | None:
        """Return model minus other, in a column or of the averages. Paired if both answered the very same items.

        Paired: the standard deviation (n - 1) of the items' differences, divided by sqrt(n). Otherwise
        sqrt(a^2 + b^2) of the two standard errors, which assumes that they are independent and so overstates it.
        """
        if column is None:
            return _mean([self.difference(model, other, averaged) for averaged in self.averaged])
        mine, theirs = self.estimate(model, column), self.estimate(other, column)
        if mine is None or theirs is None:
            return None
        value = mine.value - theirs.value
        a, b = self.items(model, column), self.items(other, column)
        if a and a.keys() == b.keys() and len(a) > 1:
            deltas = [a[key] - b[key] for key in sorted(a)]
            return Estimate(value, stdev(deltas) / math.sqrt(len(deltas)))
        if mine.stderr is None or theirs.stderr is None:
            return Estimate(value, None)
        return Estimate(value, math.hypot(mine.stderr, theirs.stderr))

    def items(self, model: Model, column: Column) -> ItemScores:
        """Return the scores of single items; empty unless their mean is the model's score."""
        score = self._measured[model.name, column]
        key = (score.step, column)
        if key not in self._items:
            evaluation = self.evaluations[score.step]
            name = evaluation.metrics.samples.get(column.task)
            items = read_items(evaluation.path / name, column) if name else {}
            mean = fmean(items.values()) if items else math.nan
            is_mean = score.row.value is not None and math.isclose(mean, score.row.value, abs_tol=1e-9)
            self._items[key] = items if is_mean else {}
        return self._items[key]


def _mean(estimates: Sequence[Estimate | None]) -> Estimate | None:
    """Average independent estimates: sum(x) / k, with standard error sqrt(sum(se^2)) / k. None if one is missing."""
    known = [estimate for estimate in estimates if estimate is not None]
    if not known or len(known) < len(estimates):
        return None
    errors = [estimate.stderr for estimate in known if estimate.stderr is not None]
    stderr = math.sqrt(math.fsum(e * e for e in errors)) / len(known) if len(errors) == len(known) else None
    return Estimate(fmean(estimate.value for estimate in known), stderr)


def read_items(path: Path, column: Column) -> ItemScores:
    """Read the scores of single items from a sample file; empty if an item's score is not one number."""
    items: ItemScores = {}
    if not path.is_file():
        return items
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if sample.get("filter", "none") != column.filter:
                continue
            value = sample.get(column.metric)
            if not isinstance(value, int | float):
                return {}
            items[sample["doc_id"], str(sample.get("doc_hash", ""))] = float(value)
    return items


def read_results(steps: Mapping[str, Input], folder: str = "..") -> Results:
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
    return Results(list(models.values()), scores, dict(steps), folder)


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
