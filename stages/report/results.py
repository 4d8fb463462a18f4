"""The steps that a report shows -> typed models, scores and comparisons; pages are others' work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stages.base import BASE, Input, UserError
from stages.records.manifest import MANIFEST
from stages.system.file_names import file_name


@dataclass(frozen=True)
class Model:
    """One evaluated model and how it came about."""

    name: str
    """As the benchmark's section calls it, a stage's name, `base` or a reference, with the cell of the matrix."""
    lineage: tuple[Input, ...]
    """The step that made it, the one that made what that started from, and so on; empty for a given model."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The cell: axis of the matrix -> value, for those on which it depends."""

    @property
    def stage(self) -> str:
        """The kind of stage that made it."""
        return (self.lineage[0].kind or BASE) if self.lineage else BASE

    @property
    def weights(self) -> tuple[float | None, float | None]:
        """Prompt and completion weight of the SFT it is or started from."""
        for made in self.lineage:
            if weights := made.config.get("weights"):
                return weights.get("prompt"), weights.get("completion")
        return None, None

    @property
    def seed(self) -> int | None:
        """The seed of the step that made it."""
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
    """One metric of one task under one benchmark stage's settings: what scores can be compared by."""

    benchmark: str
    task: str
    metric: str
    filter: str

    @property
    def metric_name(self) -> str:
        """`acc`, or with the filter where it is not lm-eval's plain one: `exact_match,letter`."""
        return self.metric if self.filter in ("", "none") else f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Score:
    """One number of one model."""

    step: str
    model: Model
    column: Column
    value: float | None
    stderr: float | None
    n: int
    headline: bool
    higher_is_better: bool | None


@dataclass(frozen=True)
class Difference:
    """How far one model is from another, in the metric's own unit."""

    value: float
    stderr: float | None
    """Standard error of the difference; None where one of the two has none."""
    paired: bool


@dataclass(frozen=True)
class Results:
    """Everything measured, in the order of the recipe."""

    models: list[Model]
    scores: list[Score]
    evaluations: dict[str, Input]
    folder: str = ".."
    """Where the run's links to its results lie, seen from the report's folder below --runs."""
    _items: dict[tuple[str, Column], dict[Any, float]] = field(default_factory=dict)

    @cached_property
    def _known(self) -> dict[tuple[str, Column], Score]:
        return {(s.model.name, s.column): s for s in reversed(self.scores) if s.value is not None}

    def score(self, model: Model, column: Column) -> Score | None:
        """A model's number in a column; None where it was not measured."""
        return self._known.get((model.name, column))

    def link(self, step: str) -> str:
        """From the report's folder to the manifest of a step."""
        return quote(f"{self.folder}/{file_name(step)}/{MANIFEST}")

    def columns(self, headline: bool) -> list[Column]:
        """The columns of the main table, or all others."""
        heads = dict.fromkeys(score.column for score in self.scores if score.headline)
        if headline:
            return list(heads)
        return list(dict.fromkeys(s.column for s in self.scores if s.column not in heads))

    def in_points(self, column: Column) -> bool:
        """Whether a column holds shares of 1, more being better: shown x 100, and part of the average."""
        scores = [s for s in self.scores if s.column == column and s.value is not None]
        return all(0 <= s.value <= 1 and s.higher_is_better is not False for s in scores if s.value is not None)

    def difference(self, model: Model, other: Model, column: Column) -> Difference | None:
        """Model minus other. Paired over items where both have answers to the very same ones.

        Paired: the standard deviation (n - 1) of the items' differences, divided by sqrt(n). Otherwise
        sqrt(a^2 + b^2) of the two standard errors, which takes the two for independent and so overstates it.
        """
        mine, theirs = self.score(model, column), self.score(other, column)
        if mine is None or theirs is None or mine.value is None or theirs.value is None:
            return None
        value = mine.value - theirs.value
        a, b = self.items(mine), self.items(theirs)
        if a and a.keys() == b.keys() and len(a) > 1:
            deltas = [a[key] - b[key] for key in sorted(a)]
            mean = math.fsum(deltas) / len(deltas)
            variance = math.fsum((delta - mean) ** 2 for delta in deltas) / (len(deltas) - 1)
            return Difference(value, math.sqrt(variance / len(deltas)), paired=True)
        if mine.stderr is None or theirs.stderr is None:
            return Difference(value, None, paired=False)
        return Difference(value, math.hypot(mine.stderr, theirs.stderr), paired=False)

    def items(self, score: Score) -> dict[Any, float]:
        """(doc_id, doc_hash) -> an item's own score; empty unless their plain mean is the score itself."""
        key = (score.step, score.column)
        if key not in self._items:
            evaluation = self.evaluations[score.step]
            name = evaluation.metrics.samples.get(score.column.task)
            found = read_items(evaluation.path / name, score.column) if name else {}
            mean = math.fsum(found.values()) / len(found) if found else None
            same = mean is not None and score.value is not None and math.isclose(mean, score.value, abs_tol=1e-9)
            self._items[key] = found if same else {}
        return self._items[key]


def read_items(path: Path, column: Column) -> dict[Any, float]:
    """The scores of single items in a sample file; empty where an item's score is not one number."""
    found: dict[Any, float] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            if sample.get("filter", "none") != column.filter:
                continue
            value = sample.get(column.metric)
            if not isinstance(value, int | float):
                return {}
            found[sample["doc_id"], str(sample.get("doc_hash", ""))] = float(value)
    return found


def read(inputs: Mapping[str, Input], folder: str = "..") -> Results:
    """Every step among `inputs` that scored a model."""
    evaluations = dict(inputs)
    models: dict[str, Model] = {}
    scores = []
    for step, given in evaluations.items():
        name = given.config["models"][0]
        if given.labels:
            name += f"[{','.join(f'{axis}={value}' for axis, value in given.labels.items())}]"
        model = models.setdefault(name, Model(name, _lineage(given.inputs.get("model")), given.labels))
        for row in given.metrics.results or []:
            column = Column(step.partition("[")[0], row.task, row.metric, row.filter)
            numbers = (row.value, row.stderr, row.n, row.headline, row.higher_is_better)
            scores.append(Score(step, model, column, *numbers))
    return Results(list(models.values()), scores, evaluations, folder)


def _lineage(given: Input | None) -> tuple[Input, ...]:
    chain = []
    while given is not None and given.kind is not None:
        chain.append(given)
        given = given.inputs.get("model")
    return tuple(chain)


def find_baseline(models: list[Model], name: str | None) -> Model | None:
    """The model named, or the conventionally tuned one: an SFT with prompt weight 0 and completion not 0.

    With several such, the one with completion weight 1 comes first, then the order of the recipe.
    """
    if name is not None:
        for model in models:
            if model.name == name:
                return model
        raise UserError(f"baseline: {name!r} is in no benchmark; evaluated are {', '.join(m.name for m in models)}")
    conventional = [m for m in models if m.stage == "sft" and m.weights[0] == 0 and m.weights[1]]
    return min(conventional, key=lambda m: m.weights[1] != 1, default=None)
