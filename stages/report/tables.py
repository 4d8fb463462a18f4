"""The report's tables as plain data: which cell says what, the same for Markdown, HTML and the console."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from stages.base import Input
from stages.records.metrics import ResultTable
from stages.report.averages import average, averaged, compare
from stages.report.results import Column, Model, Results

MISSING = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One cell: its text and whether it is a column's best, or within a standard error of it."""

    text: str
    best: bool = False
    tie: bool = False
    link: str | None = None
    """The manifest that its number comes from, seen from the report."""

    def __str__(self) -> str:
        return self.text + (" ≈" if self.tie else "")


@dataclass(frozen=True)
class Table:
    """Column heads and rows; the first column names the row."""

    columns: list[str]
    rows: list[list[Cell]]

    def plain(self) -> ResultTable:
        """Strings only, as the console prints them."""
        return ResultTable(columns=self.columns, rows=[[str(cell) for cell in row] for row in self.rows])


def number(value: float | None, stderr: float | None, points: bool, sign: bool = False) -> str:
    """`63.1 ± 1.2` in points, or the metric's own unit with four significant digits."""
    if value is None:
        return MISSING
    if points:
        text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
        return text if stderr is None else f"{text} ± {100 * stderr:.1f}"
    return f"{value:.4g}" if stderr is None else f"{value:.4g} ± {stderr:.2g}"


def column_labels(results: Results, columns: list[Column], with_metric: bool) -> list[str]:
    """Task and, where asked for or needed to tell two apart, metric and benchmark stage."""
    several = len({column.benchmark for column in results.columns(True) + results.columns(False)}) > 1
    labels = []
    for column in columns:
        label = f"{column.task} {column.metric_name}" if with_metric else column.task
        twins = [c for c in columns if c.task == column.task and (not with_metric or c.metric == column.metric)]
        labels.append(f"{label} ({column.benchmark})" if several and len(twins) > 1 else label)
    return labels


def main_table(results: Results, baseline: Model | None) -> Table:
    """One row per model, one column per headline metric, the average, and its distance from the baseline."""
    columns = results.columns(headline=True)
    heads = ["model", *column_labels(results, columns, with_metric=False)]
    cells = [[Cell(model.label)] for model in results.models]
    for column in columns:
        _add(cells, _score_cells(results, column))
    if averaged(results):
        heads.append("average")
        _add(cells, _average_cells(results))
        if baseline is not None:
            heads.append(f"vs {baseline.name}")
            _add(cells, [_versus(results, model, baseline) for model in results.models])
    return Table(heads, cells)


def best_first(results: Results, table: Table) -> Table:
    """The main table with its rows by their average, highest first; those without one last, equal ones as they were,
    for which what floating point makes of equal sums is rounded away."""
    means = [average(results, model) for model in results.models]
    order = sorted(range(len(means)), key=lambda i: -round(mean.value, 12) if (mean := means[i]) else math.inf)
    return Table(table.columns, [table.rows[i] for i in order])


def _add(rows: list[list[Cell]], column: Iterable[Cell]) -> None:
    for row, cell in zip(rows, column, strict=True):
        row.append(cell)


def _score_cells(results: Results, column: Column) -> list[Cell]:
    scores = {m.name: s for m in results.models if (s := results.score(m, column)) is not None}
    values = {name: s.value for name, s in scores.items() if s.value is not None}
    better = {s.higher_is_better for s in scores.values()}
    best = (min if better == {False} else max)(values.values(), default=None)
    winner = next((m for m in results.models if values.get(m.name) == best), None)
    cells = []
    for model in results.models:
        score = scores.get(model.name)
        if score is None or winner is None:
            cells.append(Cell(MISSING))
            continue
        gap = results.difference(winner, model, column)
        tie = bool(gap and gap.value and gap.stderr is not None and abs(gap.value) <= gap.stderr)
        text = number(score.value, score.stderr, results.in_points(column))
        cells.append(Cell(text, score.value == best and len(values) > 1, tie, results.link(score.step)))
    return cells


def _average_cells(results: Results) -> list[Cell]:
    averages = {model.name: average(results, model) for model in results.models}
    known = [a.value for a in averages.values() if a is not None]
    winner = next((m for m in results.models if (a := averages[m.name]) and a.value == max(known)), None)
    cells = []
    for model in results.models:
        mean = averages[model.name]
        gap = compare(results, winner, model) if winner is not None else None
        tie = bool(gap and gap.value and gap.stderr is not None and abs(gap.value) <= gap.stderr)
        text = MISSING if mean is None else number(mean.value, mean.stderr, points=True)
        cells.append(Cell(text, best=mean is not None and mean.value == max(known) and len(known) > 1, tie=tie))
    return cells


def _versus(results: Results, model: Model, baseline: Model) -> Cell:
    if model is baseline:
        return Cell("")
    gap = compare(results, model, baseline)
    return Cell(MISSING if gap is None else number(gap.value, gap.stderr, points=True, sign=True))


def further_table(results: Results) -> Table:
    """Every other metric, one row each and one column per model, since there are often many."""
    columns = results.columns(headline=False)
    rows = []
    for column, label in zip(columns, column_labels(results, columns, with_metric=True), strict=True):
        rows.append([Cell(label), *_score_cells(results, column)])
    return Table(["metric", *(model.label for model in results.models)], rows)


def making_table(results: Results) -> Table:
    """How each model was made, the steps it came by included."""
    heads = ["step", "kind", "from", "prompt weight", "completion weight", "seed", "steps", "tokens", "loss"]
    steps: dict[str, Input] = {}
    for model in results.models:
        for made in reversed(model.lineage):
            steps.setdefault(made.step or model.name, made)
    return Table([*heads, "seconds"], [_making_row(name, made) for name, made in steps.items()])


def _making_row(name: str, made: Input) -> list[Cell]:
    start = made.inputs.get("model")
    weights = made.config.get("weights") or {}
    values = [
        name,
        made.kind,
        (start.step if start is not None and start.step else made.config.get("model") or "base"),
        weights.get("prompt"),
        weights.get("completion"),
        made.config.get("seed"),
        made.metrics.steps,
        made.metrics.tokens,
        made.metrics.train_loss,
        made.metrics.seconds,
    ]
    return [Cell(_text(value)) for value in values]


def settings_table(results: Results) -> Table:
    """What moves a score without the model being any better, one row per benchmark and task."""
    heads = ["benchmark", "task", "metric", "version", "few-shot", "items", "chat template", "multi-turn"]
    heads += ["system", "limit", "generation", "dtype", "max length", "seed", "lm-eval", "transformers"]
    rows = []
    for column in results.columns(headline=True):
        scores = [score for score in results.scores if score.column == column]
        runs = [results.evaluations[score.step] for score in scores]
        options = [run.config.get("options") or {} for run in runs]
        environments = [run.metrics.environment for run in runs]
        values: list[list[Any]] = [
            [column.benchmark],
            [column.task],
            [column.metric_name],
            [run.metrics.versions.get(column.task) for run in runs],
            [run.metrics.num_fewshot.get(column.task) for run in runs],
            [score.n for score in scores],
            [o.get("apply_chat_template") for o in options],
            [_multiturn(o) for o in options],
            *([o.get(key) for o in options] for key in ("system_instruction", "limit", "gen_kwargs")),
            *([e.get(key) for e in environments] for key in ("dtype", "max_length")),
            [run.config.get("seed") for run in runs],
            *([e.get(key) for e in environments] for key in ("lm_eval", "transformers")),
        ]
        rows.append([Cell(", ".join(dict.fromkeys(_text(v) for v in each))) for each in values])
    return Table(heads, rows)


def _multiturn(options: dict[str, Any]) -> bool | None:
    """Left open, worked examples are turns exactly when a chat template is applied."""
    asked = options.get("fewshot_as_multiturn")
    return options.get("apply_chat_template") if asked is None else asked


def _text(value: Any) -> str:
    """A setting as a person reads it: lists and maps flat, True as yes."""
    if value is None or value == {} or value == "":
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if value >= 10_000 else str(value)
    if isinstance(value, dict):
        return "; ".join(f"{key}={_text(item)}" for key, item in value.items())
    return str(value)
