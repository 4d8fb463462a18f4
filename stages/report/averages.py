"""Averages over benchmarks, their comparison with the baseline, and the sentences that say what was found."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from stages.base import BASE
from stages.report.results import Column, Difference, Model, Results


@dataclass(frozen=True)
class Average:
    """Mean over the columns that hold shares, as a share, with its standard error."""

    value: float
    stderr: float | None


def averaged(results: Results) -> list[Column]:
    """The headline columns that make up the average."""
    return [column for column in results.columns(headline=True) if results.in_points(column)]


def average(results: Results, model: Model) -> Average | None:
    """sum(x) / k with standard error sqrt(sum(se^2)) / k: benchmarks are independent samples of items.

    None where a benchmark is missing: an average over fewer benchmarks is another quantity.
    """
    scores = [results.score(model, column) for column in averaged(results)]
    values = [score.value for score in scores if score is not None and score.value is not None]
    if not scores or len(values) < len(scores):
        return None
    errors = [score.stderr for score in scores if score is not None]
    return Average(math.fsum(values) / len(values), _mean_error(errors))


def compare(results: Results, model: Model, other: Model) -> Difference | None:
    """Difference of two averages, its standard error put together from those of the columns' differences."""
    parts = [results.difference(model, other, column) for column in averaged(results)]
    whole = [part for part in parts if part is not None]
    if not parts or len(whole) < len(parts):
        return None
    return Difference(
        math.fsum(part.value for part in whole) / len(whole),
        _mean_error([part.stderr for part in whole]),
        paired=all(part.paired for part in whole),
    )


def _mean_error(errors: list[float | None]) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(e * e for e in known)) / len(known) if len(known) == len(errors) else None


def summary(results: Results, baseline: Model | None, told: Collection[str] = ()) -> str:
    """What the averages say, and what they do not; nothing of the models named in `told`."""
    if baseline is None:
        return "No conventionally tuned model (prompt weight 0) was evaluated to compare the others with."
    sentences = []
    base = next((model for model in results.models if model.name == BASE), None)
    if base is not None and base is not baseline:
        sentences.append(_against(results, baseline, base))
    others = [model for model in results.models if model not in (baseline, base) and model.name not in told]
    sentences += [_against(results, model, baseline) for model in others]
    return " ".join(sentences) or (
        "" if told else f"Only {baseline.label} was evaluated, so there is nothing to compare."
    )


def _against(results: Results, model: Model, other: Model) -> str:
    difference = compare(results, model, other)
    if difference is None:
        return f"{model.label} and {other.label} were not measured on the same benchmarks."
    points = 100 * difference.value
    side = "above" if points > 0 else "below"
    found = f"{model.label} averages {abs(points):.1f} points {side} {other.label}"
    if points == 0:
        found = f"{model.label} and {other.label} average the same"
    if difference.stderr is None:
        return f"{found}; without a standard error, chance cannot be told from a difference."
    error = f"standard error of the difference {100 * difference.stderr:.1f}"
    if abs(difference.value) > 2 * difference.stderr:
        return f"{found} ({error}): more than two standard errors."
    return f"{found} ({error}): within two standard errors, so no difference is shown."
