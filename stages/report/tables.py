"""Tables as plain data, the same for Markdown, HTML, LaTeX and the console; and the tables of all scores of a run."""

import math
from dataclasses import dataclass
from typing import Any

from stages.base import Input
from stages.report.results import Column, Model, Results, Score
from stages.report.sampling_errors import Estimate, rounded

NO_VALUE = "\u2013"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and whether it is the column's best or within a standard error of it."""

    text: str
    best: bool = False
    tie: bool = False
    link: str | None = None
    """The manifest behind the number, relative to the report."""

    def __str__(self) -> str:
        return self.text + (" ≈" if self.tie else "")


@dataclass(frozen=True)
class Table:
    """Column heads and rows; the first column names the row."""

    columns: list[str]
    rows: list[list[Cell]]


def number(estimate: Estimate | None, points: bool = True, sign: bool = False, decimals: int = 1) -> str:
    """Format as `63.1 ± 1.2` in points, or in the metric's own unit with four significant digits; a dash for None.

    Where all items agree, their number stands in place of the error.
    """
    if estimate is None:
        return NO_VALUE
    value, error = rounded(estimate.value), estimate.stderr
    text = f"{100 * value:{'+' if sign else ''}.{decimals}f}" if points else f"{value:.4g}"
    if error is None:
        return text
    if estimate.is_constant:
        return text if estimate.n is None else f"{text} (n = {estimate.n})"
    return f"{text} ± {100 * error:.{decimals}f}" if points else f"{text} ± {error:.2g}"


def column_labels(results: Results, columns: list[Column], with_metric: bool = False) -> list[str]:
    """Name columns by task and metric; by benchmark stage, too, where two would have the same name."""
    several = len({column.benchmark for column in results.columns(True) + results.columns(False)}) > 1
    labels = []
    for column in columns:
        same_task = [c for c in columns if (c.benchmark, c.task) == (column.benchmark, column.task)]
        label = f"{column.task} {column.metric_name}" if with_metric or len(same_task) > 1 else column.task
        twins = [c for c in columns if c.task == column.task and (not with_metric or c.metric == column.metric)]
        labels.append(f"{label} ({column.benchmark})" if several and len(twins) > 1 else label)
    return labels


def main_table(results: Results, baseline: Model | None) -> Table:
    """One row per model, one column per headline metric, the average, and its difference from the baseline."""
    columns = results.columns(headline=True)
    heads = ["model", *column_labels(results, columns)]
    cells = [[Cell(model.label) for model in results.models]]
    cells += [_score_cells(results, column) for column in columns]
    if results.averaged:
        heads.append("average")
        cells.append(_score_cells(results, None))
        if baseline is not None:
            heads.append(f"vs {baseline.name}")
            differences = {model.name: results.difference(model, baseline) for model in results.models}
            texts = {name: number(difference, sign=True) for name, difference in differences.items()}
            cells.append([Cell(text) for text in (texts | {baseline.name: ""}).values()])
    return Table(heads, [list(row) for row in zip(*cells, strict=True)])


def best_first(results: Results, table: Table) -> Table:
    """Sort the rows of the main table by average, highest first, those without one last."""
    means = [results.estimate(model) for model in results.models]
    order = sorted(range(len(means)), key=lambda i: -rounded(mean.value) if (mean := means[i]) else math.inf)
    return Table(table.columns, [table.rows[i] for i in order])


def _score_cells(results: Results, column: Column | None) -> list[Cell]:
    scores = [results.score(model, column) if column else None for model in results.models]
    estimates = [results.estimate(model, column) for model in results.models]
    values = {
        model.name: rounded(estimate.value)
        for model, estimate in zip(results.models, estimates, strict=True)
        if estimate
    }
    lower_is_better = {score.row.higher_is_better for score in scores if score} == {False}
    best = (min if lower_is_better else max)(values.values(), default=None)
    winner = next((model for model in results.models if values.get(model.name) == best), None)
    # averages over other benchmarks are not compared
    over = {len(results.averaged_for(model)) for model in results.models if model.name in values and column is None}
    cells = []
    for model, score, estimate in zip(results.models, scores, estimates, strict=True):
        if estimate is None or winner is None:
            cells.append(Cell(NO_VALUE))
            continue
        distance = results.difference(winner, model, column)
        is_best = values[model.name] == best and len(values) > 1 and len(over) <= 1
        is_near = bool(distance and distance.stderr and not is_best and abs(distance.value) <= distance.stderr)
        text = number(estimate, results.in_points(column))
        if len(over) > 1:
            text += f" (of {len(results.averaged_for(model))})"
        cells.append(Cell(text, is_best, is_near, results.link(score.step) if score else None))
    return cells


def further_table(results: Results) -> Table:
    """One row per metric that is no headline, one column per model, since there are often many metrics."""
    columns = results.columns(headline=False)
    labels = column_labels(results, columns, with_metric=True)
    rows = [[Cell(label), *_score_cells(results, column)] for column, label in zip(columns, labels, strict=True)]
    return Table(["metric", *(model.label for model in results.models)], rows)


PREFERENCE_METRICS = {
    "reward margin": "reward_margin",
    "accuracy": "reward_accuracy",
    "log p(chosen)": "chosen_logps",
    "log p(rejected)": "rejected_logps",
}
"""Head of a column -> metric of a dpo step."""


def training_table(results: Results) -> Table:
    """One row for each training step that led to a model, with the figures of dpo if there is such a step."""
    heads = ["step", "kind", "from", "prompt weight", "completion weight", "seed", "steps", "tokens", "loss", "seconds"]
    steps: dict[str, Input] = {}
    for model in results.models:
        for step in reversed(model.lineage):
            steps.setdefault(step.step or model.name, step)
    rows, preferences = [], PREFERENCE_METRICS if any(step.kind == "dpo" for step in steps.values()) else {}
    for name, step in steps.items():
        start, metrics = step.inputs.get("model"), step.metrics
        weights = step.config.get("weights") or {}
        origin = (start.step if start else None) or step.config.get("model") or "base"
        row = [name, step.kind, origin, weights.get("prompt"), weights.get("completion"), step.config.get("seed")]
        figures = [metrics.number(name) for name in preferences.values()]
        rows.append([*row, metrics.steps, metrics.tokens, metrics.train_loss, metrics.seconds, *figures])
    return Table([*heads, *preferences], [[Cell(_text(value)) for value in row] for row in rows])


def settings_table(results: Results) -> Table:
    """One row per benchmark and task: the settings that move a score without a better model."""
    heads = ["benchmark", "task", "metric", "version", "few-shot", "items", "chat template", "multi-turn"]
    heads += ["system", "limit", "generation", "dtype", "max length", "seed", "lm-eval", "transformers"]
    rows = []
    for column in results.columns(headline=True):
        settings = [_settings(results, score) for score in results.scores if score.column == column]
        rows.append([Cell(", ".join(dict.fromkeys(map(_text, values)))) for values in zip(*settings, strict=True)])
    return Table(heads, rows)


def _settings(results: Results, score: Score) -> list[Any]:
    evaluation, column = results.evaluations[score.step], score.column
    metrics, options = evaluation.metrics, evaluation.config.get("options") or {}
    template, multiturn = options.get("apply_chat_template"), options.get("fewshot_as_multiturn")
    return [
        *(column.benchmark, column.task, column.metric_name),
        *(metrics.versions.get(column.task), metrics.num_fewshot.get(column.task), score.row.n),
        template,
        template if multiturn is None else multiturn,  # lm-eval's default
        *(options.get(key) for key in ("system_instruction", "limit", "gen_kwargs")),
        *(metrics.environment.get(key) for key in ("dtype", "max_length")),
        evaluation.config.get("seed"),
        *(metrics.environment.get(key) for key in ("lm_eval", "transformers")),
    ]


def _text(value: Any) -> str:
    """Format a setting for a reader: maps flat, True as yes."""
    if value is None or value == {} or value == "":
        return NO_VALUE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if value >= 10_000 else str(value)
    if isinstance(value, dict):
        return "; ".join(f"{key}={_text(item)}" for key, item in value.items())
    return str(value)
