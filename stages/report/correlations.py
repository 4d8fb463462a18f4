"""Rank correlations of the best prompt weight with what training data, benchmarks and models are like."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence

from stages.report.runs import Part
from stages.report.tables import MISSING, Cell, Table

FEWEST = 3
"""Points of a rank correlation that says anything."""
PAPER = {
    ("training prompts", "generation_ratio"): (0.50, 0.33),
    ("training prompts", "ngram_diversity"): (-0.50, -0.33),
    ("training prompts", "parse_tree_depth"): (-0.50, -0.33),
    ("training prompts", "prompt_length"): (-0.50, -0.33),
    ("benchmark prompts", "ngram_diversity"): (0.40, 0.40),
    ("benchmark prompts", "parse_tree_depth"): (-0.50, -0.20),
    ("benchmark prompts", "prompt_length"): (-0.70, -0.60),
    ("model", "parameters"): (0.20, 0.20),
    ("model", "log-probability of training prompts"): (0.50, 0.20),
    ("model", "log-probability of benchmark prompts"): (0.50, 0.20),
}
"""Spearman's and Kendall's coefficients of the paper (arXiv 2507.07817, its table of correlations)."""

Point = tuple[str, str, str, float, float]
"""Of what, the characteristic, which one of them, its value, and the best prompt weight."""


def correlation_table(parts: Sequence[Part], with_paper: bool) -> Table:
    """Over data sets, benchmarks and models, each with its mean best prompt weight: of how many, Spearman's rho and
    Kendall's tau-b. A row for each of what was measured; empty where nothing was."""
    points: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = {key: {} for key in PAPER}
    for of, what, which, value, weight in (point for part in parts for point in _points(part)):
        points.setdefault((of, what), {}).setdefault(which, []).append((value, weight))
    heads = ["of", "characteristic", "how many", "Spearman", "Kendall"] + ["the paper's"] * with_paper
    rows = []
    for (of, what), found in points.items():
        if not found:
            continue
        pairs = [(_mean([x for x, _ in values]), _mean([y for _, y in values])) for values in found.values()]
        spearman, kendall = ranks(pairs)
        row = [of, what, str(len(pairs)), _text(spearman), _text(kendall)]
        paper = PAPER.get((of, what))
        row += [f"{paper[0]:+.2f}, {paper[1]:+.2f}" if paper else ""] * with_paper
        rows.append([Cell(text) for text in row])
    return Table(heads, rows)


def ranks(pairs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """Spearman's rho and Kendall's tau-b of x and y; None for too few pairs, or where either is the same for all."""
    from scipy.stats import kendalltau, spearmanr

    if len(pairs) < FEWEST:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of constant values, which give nan
        found = [float(test(*zip(*pairs, strict=True)).statistic) for test in (spearmanr, kendalltau)]
    spearman, kendall = (None if math.isnan(value) else value for value in found)
    return spearman, kendall


def _points(part: Part) -> Iterator[Point]:
    """What one run says of its data, its benchmarks and its model."""
    grids = part.by_benchmark
    if not grids:
        return
    weight = _mean([panel.best[0] for _, panel in grids])
    model, data = part.called[0] or part.run or "", part.called[1] or part.run or ""
    for step, given in part.results.evaluations.items():
        if given.kind != "characteristics":
            continue
        roles = {each["name"]: each["role"] for each in given.config["sets"]}
        for score in (s for s in part.results.scores if s.step == step and s.value is not None):
            name, metric, value = score.column.task, score.column.metric, float(score.value or 0.0)
            role = roles.get(name)
            if role is None:
                yield "model", metric, model, value, weight
            elif metric == "prompt_logprob":
                prompts = "training" if role == "train" else "benchmark"
                yield "model", f"log-probability of {prompts} prompts", model, value, weight
            elif role == "train":
                yield "training prompts", metric, data, value, weight
            else:
                for label, panel in grids:
                    if label == name:
                        yield "benchmark prompts", metric, name, value, panel.best[0]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _text(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}"
