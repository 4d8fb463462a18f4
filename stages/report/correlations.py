"""Rank correlations of the best prompt weight with characteristics of training data, benchmarks and models."""

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from stages.data.files import read_rows
from stages.report.runs import Run
from stages.report.sampling_errors import rounded
from stages.report.tables import NO_VALUE, Cell, Table

FEWEST_POINTS = 3
PAPER_CORRELATIONS = Path(__file__).with_name("paper_correlations.csv")
"""Spearman's and Kendall's coefficients of the paper (arXiv 2507.07817, its table of correlations)."""

Key = tuple[str, str]
"""Whose characteristic (`training prompts`, `benchmark prompts` or `model`), and which."""
Point = tuple[float, float]
"""The value of a characteristic, and the best prompt weight."""


def correlation_table(runs: Sequence[Run], with_paper: bool) -> Table:
    """One row per characteristic: how many data sets, benchmarks or models have it, and their rank correlations."""
    coefficients = [row for _, row in read_rows(PAPER_CORRELATIONS)]
    paper = {(row["subject"], row["characteristic"]): f"{row['spearman']}, {row['kendall']}" for row in coefficients}
    groups: dict[Key, dict[str, list[Point]]] = {key: {} for key in paper}
    for key, name, point in (observation for run in runs for observation in _observations(run)):
        groups.setdefault(key, {}).setdefault(name, []).append(point)
    heads = ["of", "characteristic", "how many", "Spearman", "Kendall"] + ["the paper's"] * with_paper
    rows = []
    for key, by_name in groups.items():
        if not by_name:
            continue
        means = [(fmean(value for value, _ in each), fmean(best for _, best in each)) for each in by_name.values()]
        row = [*key, str(len(means)), *map(_coefficient, rank_correlations(means))]
        row += [paper.get(key, "")] * with_paper
        rows.append([Cell(text) for text in row])
    return Table(heads, rows)


def rank_correlations(points: Sequence[Point]) -> tuple[float | None, float | None]:
    """Return Spearman's rho and Kendall's tau-b of (x, y) points; None for too few points, or if x or y is constant."""
    from scipy.stats import kendalltau, spearmanr

    if len(points) < FEWEST_POINTS:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant values, which give nan
        sides = [list(map(rounded, side)) for side in zip(*points, strict=True)]
        rho, tau = (float(test(*sides).statistic) for test in (spearmanr, kendalltau))
    return None if math.isnan(rho) else rho, None if math.isnan(tau) else tau


def _observations(run: Run) -> Iterator[tuple[Key, str, Point]]:
    grids = run.benchmark_grids
    if not grids:
        return
    weight = fmean(grid.best[0] for _, grid in grids)
    model, data = (name or run.recipe or "" for name in run.names)
    for score in run.results.scores:
        step = run.results.evaluations[score.step]
        if step.kind != "characteristics" or score.row.value is None:
            continue
        name, metric, value = score.column.task, score.column.metric, score.row.value
        role = next((entry["role"] for entry in step.config["sets"] if entry["name"] == name), None)
        if role is None:
            yield ("model", metric), model, (value, weight)
        elif metric == "prompt_logprob":
            prompts = "training" if role == "train" else "benchmark"
            yield ("model", f"log-probability of {prompts} prompts"), model, (value, weight)
        elif role == "train":
            yield ("training prompts", metric), data, (value, weight)
        else:
            for label, grid in grids:
                if label == name:
                    yield ("benchmark prompts", metric), name, (value, grid.best[0])


def _coefficient(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:+.2f}"
