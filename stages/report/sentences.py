"""The report's sentences: the summary at its top, its notes on missing results, and how to read each section."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from stages.base import BASE
from stages.report.grid import CONVENTIONAL, Grid
from stages.report.improvements import mean_improvement, pair_text, percent
from stages.report.results import Model, Results
from stages.report.runs import Run

MOST_NAMES = 5
"""How many names a sentence lists."""

LUCK = "The best of many is above the rest by luck, too."
HOW_TO_READ = (
    "Scores that are shares are in points (x 100), each ± its standard error over the benchmark's items. "
    "Bold is the best of a column; ≈ marks what lies within one standard error of the difference from it, "
    "where calling a winner would be guessing. The errors are those of drawing items: they do not cover what "
    "another training seed would change."
)
AVERAGE = (
    "The average weighs all benchmarks alike; its standard error is the square root of the sum of the "
    "squared standard errors, divided by their number."
)
DIFFERENCE = (
    "is the difference of the averages. Where both models answered the very same items, its standard error "
    "is paired: per benchmark, the standard deviation of the items' differences divided by the square root "
    "of their number; otherwise the root of the sum of both squared standard errors. Benchmarks are then put "
    "together as for the average."
)
HOW_IMPROVEMENTS = (
    "IT is conventional instruction tuning, (0, 1); a pair is (prompt weight, completion weight). The gain is "
    "relative: (best - IT) / IT of the averages. p is how likely a difference at least as large is where there is "
    "none, two-sided: over the same items, paired, by the normal distribution; where both pairs have several seeds, by "
    f"Welch's t test over these. It is not corrected for the best pair having been chosen after the fact. {LUCK}"
)
HOW_GRIDS = (
    "Prompt weight down, completion weight across, points (x 100), ± the standard deviation over seeds where there "
    "are several. Colour: the gain over conventional instruction tuning, IT at (0, 1), relative to it; the scale "
    "ends at the third quartile of the gains. The best cell is circled; grey was not measured."
)
HOW_PUBLISHED = "As the file of published grids has them, drawn in the same way."
HOW_CURVES = (
    "The mean loss of a token of each side, whatever it weighs; a side of weight 0 takes no part in training, and its "
    "loss is not logged. The colour is the weight of the other side."
)
HOW_BEST = (
    "Of equal pairs the one with the lower prompt weight, then the lower completion weight counts. With few grids "
    "these shares say little: each is one draw."
)
HOW_PREFERENCE = (
    "Averages over the benchmarks, in points; “change” is the difference from the start, ± its standard error, paired "
    "where the items are the same."
)
HOW_ROBUSTNESS = (
    "POSIX, the prompt sensitivity index: how far the log-probability of an answer moves, per token, when a prompt is "
    "put in other words. Less is better."
)


def score_notes(results: Results, baseline: Model | None) -> list[str]:
    """Return how to read the main table."""
    columns = results.averaged
    if not columns:
        return [HOW_TO_READ]
    left_out = [c.task for c in results.columns(headline=True) if c not in columns]
    exception = f" Left out, being no share of which more is better: {', '.join(left_out)}." if left_out else ""
    notes = [HOW_TO_READ, AVERAGE + exception]
    return notes if baseline is None else [*notes, f"“vs {baseline.name}” {DIFFERENCE}"]


def correlation_note(counts: Collection[int]) -> str:
    """Return how to read the correlations; `counts` has the number of points of each."""
    points = " to ".join(f"{count}" for count in sorted({min(counts, default=0), max(counts, default=0)}))
    return (
        "Rank correlations over data sets, benchmarks or models, of a characteristic and the mean best prompt weight "
        f"of each, over all grids and benchmarks. Here they are over {points} of these. With fewer than three there is "
        "none; with ten or fewer, a Spearman coefficient between -0.64 and 0.64 is no evidence (p > 0.05). "
        "What each characteristic is: stages/characteristics/stage.py."
    )


def missing_notes(joined: Sequence[Run]) -> list[str]:
    """Return which results of other recipes' runs are missing."""
    empty = [run.recipe or "" for run in joined if not run.results.models]
    notes = [f"nothing is measured yet of {_join(empty)}; run-recipe makes it"] if empty else []
    incomplete = [run for run in joined if run.missing and run.results.models]
    return notes + [f"{run.recipe}: no result of {_join(run.missing)}" for run in incomplete]


def _join(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def summary(own: Run, joined: Sequence[Run], grids: Sequence[Grid]) -> str:
    """Return the sentences at the top of the page."""
    sentences = []
    if own.results.models:
        in_grids = {model.name for grid in own.grids for models in grid.models.values() for model in models}
        sentences.append(models_summary(own.results, own.baseline, in_grids))
    if len(grids) == 1 and grids[0].results:
        sentences.append(grid_summary(grids[0]))
    elif grids:
        top = max(grids, key=lambda grid: grid.best_improvement or 0.0)
        best = f"{percent(top.best_improvement)} with {pair_text(top.best)}"
        sentences.append(
            f"Over {len(grids)} grids the best pair gains {percent(mean_improvement(grids))} over conventional tuning "
            f"(0, 1) on average; most in {top.title}: {best}. {LUCK}"
        )
    if missing_notes(joined):
        incomplete = sum(bool(run.missing) or not run.results.models for run in joined)
        sentences.append(f"Not complete: {incomplete} of {len(joined)} runs lack results.")
    return " ".join(filter(None, sentences)) or "There is nothing to compare yet."


def models_summary(results: Results, baseline: Model | None, in_grids: Collection[str]) -> str:
    """Return a comparison of each model with the baseline, except for those whose names are in `in_grids`."""
    if baseline is None:
        return "No conventionally tuned model (prompt weight 0) was evaluated to compare the others with."
    sentences = []
    base = next((model for model in results.models if model.name == BASE), None)
    if base is not None and base is not baseline:
        sentences.append(_compare(results, baseline, base))
    others = [model for model in results.models if model not in (baseline, base) and model.name not in in_grids]
    sentences += [_compare(results, model, baseline) for model in others]
    if not sentences and not in_grids:
        return f"Only {baseline.label} was evaluated, so there is nothing to compare."
    return " ".join(sentences)


def _compare(results: Results, model: Model, other: Model) -> str:
    difference = results.difference(model, other)
    if difference is None:
        return f"{model.label} and {other.label} were not measured on the same benchmarks."
    points = 100 * difference.value
    side = "above" if points > 0 else "below"
    sentence = f"{model.label} averages {abs(points):.1f} points {side} {other.label}"
    if points == 0:
        sentence = f"{model.label} and {other.label} average the same"
    if difference.stderr is None:
        return f"{sentence}; without a standard error, the difference can be chance."
    error = f"standard error of the difference {100 * difference.stderr:.1f}"
    if abs(difference.value) > 2 * difference.stderr:
        return f"{sentence} ({error}): more than two standard errors."
    return f"{sentence} ({error}): within two standard errors, so no difference is shown."


def grid_summary(grid: Grid) -> str:
    """Return what the grid shows and what it does not."""
    it, best, improvement = grid.baseline, grid.best, grid.best_improvement
    if it is None or improvement is None:
        return f"{grid.title}: (0, 1), conventional instruction tuning, was not measured, so there is no gain to show."
    others = [pair for pair in grid.cells if pair != CONVENTIONAL]
    above = [pair for pair in others if grid.cells[pair].mean > it.mean]
    clear = [
        pair for pair in above if (d := grid.difference_from_baseline(pair)) and d.stderr and d.value > 2 * d.stderr
    ]
    sentences = [
        f"{grid.title}: the best of {len(grid.cells)} pairs of weights (prompt, completion) is {pair_text(best)} "
        f"with {100 * grid.cells[best].mean:.1f}, conventional tuning (0, 1) has {100 * it.mean:.1f}: "
        f"a relative gain of {100 * improvement:+.1f} %.",
        f"{len(above)} of the other {len(others)} pairs average above (0, 1), {len(clear)} of them by more than two "
        "standard errors.",
        LUCK,
    ]
    scaled = sorted(pair for pair in others if pair[0] == 0 < pair[1])  # (0, 1) times a factor
    if scaled:
        distance = max(abs(grid.cells[pair].mean - it.mean) for pair in scaled)
        sentences.append(
            f"{', '.join(map(pair_text, scaled))} and (0, 1) differ in a common factor, which Adam all but cancels; "
            f"they are up to {100 * distance:.1f} points apart, and a smaller difference than that shows nothing."
        )
    spreads = [cell.spread for cell in grid.cells.values() if cell.spread is not None]
    if spreads:
        pooled = math.sqrt(math.fsum(s * s for s in spreads) / len(spreads))
        sentences.append(f"Over seeds, one pair varies by {100 * pooled:.1f} points (standard deviation, pooled).")
    else:
        sentences.append("There is one seed of each; what another would change is not known.")
    return " ".join(sentences)
