"""Standard errors over shared items: against hand calculation, and against a bootstrap of the items."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.base import Input
from stages.records.metrics import ScoreRow
from stages.report.results import Column, Results, read_results
from stages.report.sampling_errors import residuals_of_resamples, weighted_sum, with_error
from stages.report.tables import number
from tests.stages.report.test_report import bench, row, sft

Samples = Mapping[str, Sequence[Mapping[str, Any]]]
"""Task -> one line for each item."""
RESAMPLES = 10_000


def evaluation(folder: Path, name: str, samples: Samples, rows: list[ScoreRow], stage: str = "bench") -> Input:
    """A benchmark step with sample files."""
    folder.mkdir()
    for task, lines in samples.items():
        text = "".join(json.dumps({"doc_id": i, "filter": "none"} | dict(line)) + "\n" for i, line in enumerate(lines))
        (folder / f"samples_{task}.jsonl").write_text(text)
    return bench(name, sft(name, 0.2 if name == "b" else 0, 1), rows, folder)


def lines(values: Sequence[float], prefix: str, metric: str = "acc") -> list[dict[str, Any]]:
    return [{"doc_hash": f"{prefix}{i}", metric: value} for i, value in enumerate(values)]


def two_models(tmp_path: Path, steps: Mapping[str, Mapping[str, tuple[Samples, list[ScoreRow]]]]) -> Results:
    """Stage -> model -> its samples and scores."""
    return read_results(
        {
            f"{stage}[{name}]": evaluation(tmp_path / f"{stage}{name}", name, *content)
            for stage, models in steps.items()
            for name, content in models.items()
        }
    )


def difference_error(results: Results, column: Column | None = None) -> float:
    a, b = results.models
    difference = results.difference(b, a, column)
    assert difference
    assert difference.stderr is not None
    return difference.stderr


def correlated(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Right answers (0 or 1) of two models to the same items, of which some are easy and some hard."""
    generator = np.random.default_rng(seed)
    ease = generator.normal(size=count)
    a, b = (ease + generator.normal(size=count) > threshold for threshold in (0.2, 0.0))
    return a.astype(float), b.astype(float)


def test_a_group_is_paired_through_its_members_by_hand(tmp_path: Path) -> None:
    """Tasks of 4 and 2 items, weighted by size. Differences of one: 0, 0, 1, 0; of two: 1, 0."""
    a, b = {"one": [1, 1, 0, 0], "two": [0, 0]}, {"one": [1, 1, 1, 0], "two": [1, 0]}
    members = {"one": 4 / 6, "two": 2 / 6}
    results = two_models(
        tmp_path,
        {
            "bench": {
                name: (
                    {task: lines(values, task) for task, values in scores.items()},
                    [row("g", sum(map(sum, scores.values())) / 6, 0.2, members=members)],
                )
                for name, scores in (("a", a), ("b", b))
            }
        },
    )
    one, two = math.sqrt(0.25 / 4), math.sqrt(0.5 / 2)  # stdev / sqrt(n) of the differences of each task
    assert difference_error(results) == pytest.approx(math.hypot(4 / 6 * one, 2 / 6 * two))
    difference = results.difference(*reversed(results.models))
    assert difference
    assert difference.value == pytest.approx(2 / 6)
    assert difference.n == 6


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_agrees_with_a_bootstrap(tmp_path: Path, by_size: bool) -> None:
    sizes = {"one": 150, "two": 400}
    scores = {task: correlated(i, size) for i, (task, size) in enumerate(sizes.items())}
    weights = {task: size / 550 if by_size else 0.5 for task, size in sizes.items()}
    content = {
        name: (
            {task: lines(list(scores[task][i]), task) for task in sizes},
            [row("g", float(sum(weights[t] * scores[t][i].mean() for t in sizes)), 0.2, members=weights)],
        )
        for i, name in enumerate("ab")
    }
    results = two_models(tmp_path, {"bench": content})
    generator, draws = np.random.default_rng(1), np.zeros(RESAMPLES)
    for task, size in sizes.items():
        delta = scores[task][1] - scores[task][0]
        draws += weights[task] * delta[generator.integers(0, size, (RESAMPLES, size))].mean(1)
    assert difference_error(results) == pytest.approx(draws.std(ddof=1), rel=0.05)


def test_columns_over_the_same_items_are_clustered_by_item(tmp_path: Path) -> None:
    """Two stages over the same 300 items, one more over 200 others: average, difference, and the bootstrap of each."""
    first, other = correlated(3, 300), correlated(4, 200)
    second = tuple(np.where(np.arange(300) % 3 == 0, 1 - values, values) for values in first)  # another metric of them
    steps = {
        stage: {
            name: ({task: lines(list(values[i]), prefix)}, [row(task, float(values[i].mean()), 0.03)])
            for i, name in enumerate("ab")
        }
        for stage, task, prefix, values in (
            ("bench", "t", "x", first),
            ("again", "t", "x", second),
            ("more", "u", "y", other),
        )
    }
    results = two_models(tmp_path, steps)
    generator = np.random.default_rng(5)
    rows, others = generator.integers(0, 300, (RESAMPLES, 300)), generator.integers(0, 200, (RESAMPLES, 200))
    averages = [(first[i][rows] + second[i][rows]).mean(1) / 3 + other[i][others].mean(1) / 3 for i in (0, 1)]
    average = results.estimate(results.models[0])
    assert average
    assert average.stderr == pytest.approx(averages[0].std(ddof=1), rel=0.05)
    assert average.n == 500
    assert difference_error(results) == pytest.approx((averages[1] - averages[0]).std(ddof=1), rel=0.05)


def test_repeats_of_an_item_are_one_cluster(tmp_path: Path) -> None:
    """Items x, y, z with two answers each: the error is that of three item means, not of six answers."""
    answers = [("x", 1), ("x", 1), ("y", 0), ("y", 1), ("z", 0), ("z", 0)]
    samples = {"t": [{"doc_hash": item, "acc": value} for item, value in answers]}
    results = two_models(tmp_path, {"bench": {"a": (samples, [row("t", 0.5, 0.224)])}})
    estimate = results.estimate(results.models[0])
    assert estimate
    assert estimate.stderr == pytest.approx(np.std([1, 0.5, 0], ddof=1) / math.sqrt(3))
    assert estimate.n == 3


def test_scores_on_the_same_resamples_are_paired() -> None:
    """The error of one is the standard deviation over resamples, and that of a difference that of the differences."""
    a, b = [0.5, 0.6, 0.4, 0.55], [0.52, 0.66, 0.41, 0.6]
    residuals = [residuals_of_resamples(values, "items", 805) for values in (a, b)]
    assert with_error(0.5, residuals[0]).stderr == pytest.approx(np.std(a, ddof=1))
    assert with_error(0.5, residuals[0]).n == 805
    paired = with_error(0.0, weighted_sum([(1, residuals[1]), (-1, residuals[0])]))
    assert paired.stderr == pytest.approx(np.std(np.subtract(b, a), ddof=1))
    apart = with_error(0.0, weighted_sum([(1, residuals[1]), (-1, residuals_of_resamples(a, "other items", 805))]))
    assert apart.stderr == pytest.approx(math.hypot(np.std(a, ddof=1), np.std(b, ddof=1)))


def test_unscored_items_leave_the_others_paired(tmp_path: Path) -> None:
    """Of model a item y was not read: it has n = 2, b has n = 3."""
    a, b = [1, None, 0], [1, 1, 1]
    steps = {
        name: ({"t": [{"doc_hash": h, "acc": v} for h, v in zip("xyz", values, strict=True)]}, [row("t", mean, 0.1)])
        for name, values, mean in (("a", a, 0.5), ("b", b, 1.0))
    }
    results = two_models(tmp_path, {"bench": steps})
    # residuals of a: (1/2, -1/2) * sqrt(2) / 2; b is constant
    assert difference_error(results) == pytest.approx(math.sqrt(2 * (0.5 * math.sqrt(2) / 2) ** 2))


def test_a_constant_difference_is_no_certainty(tmp_path: Path) -> None:
    steps = {name: ({"t": lines([value] * 5, "x")}, [row("t", value, 0.0)]) for name, value in (("a", 0.0), ("b", 1.0))}
    results = two_models(tmp_path, {"bench": steps})
    difference = results.difference(*reversed(results.models))
    assert difference
    assert difference.is_constant
    assert number(difference, sign=True) == "+100.0 (n = 5)"
    assert number(results.estimate(results.models[1])) == "100.0 (n = 5)"
