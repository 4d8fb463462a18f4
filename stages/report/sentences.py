"""The report's sentences: the summary at its top, its notes on missing results, and how to read each section."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from stages.base import BASE
from stages.report.grid import CONVENTIONAL, Grid
from stages.report.improvements import mean_improvement, pair_text, percent
from stages.report.results import Model, Results
from stages.report.runs import Run
from stages.report.sampling_errors import rounded

MOST_NAMES = 5
MOST_NOTES = 20

LUCK = "The best of many is above the rest by luck, too."
NOTES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("notes.yaml").read_text(encoding="utf-8"))


def score_notes(results: Results, baseline: Model | None) -> list[str]:
    """Return how to read the main table."""
    columns = results.averaged
    if not columns:
        return [NOTES["scores"]]
    left_out = [c.task for c in results.columns(headline=True) if c not in columns]
    exception = f" Left out, being no share of which more is better: {', '.join(left_out)}." if left_out else ""
    notes = [NOTES["scores"], NOTES["average"] + exception]
    return notes if baseline is None else [*notes, NOTES["difference"].format(baseline=baseline.name)]


def evaluation_notes(results: Results) -> list[str]:
    """Return what the steps behind the scores noted, such as judgements that could not be read."""
    notes = [f"{step}: {note}" for step, result in results.evaluations.items() for note in result.metrics.notes]
    more = len(notes) - MOST_NOTES
    return notes[:MOST_NOTES] + ([f"{more} more notes are in the steps' stage.json"] if more > 0 else [])


def correlation_note(counts: Collection[int]) -> str:
    """Return how to read the correlations; `counts` has the number of points of each."""
    points = " to ".join(f"{count}" for count in sorted({min(counts, default=0), max(counts, default=0)}))
    return NOTES["correlations"].format(points=points)


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
    if not results.averaged:
        return (
            "No benchmark has a metric that is a share of which more is better, so there is no average to compare:"
            " the scores are in their own units."
        )
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
    points = 100 * rounded(difference.value)
    side = "above" if points > 0 else "below"
    sentence = f"{model.label} averages {abs(points):.1f} points {side} {other.label}"
    if points == 0:
        sentence = f"{model.label} and {other.label} average the same"
    if difference.stderr is None:
        return f"{sentence}; without a standard error, the difference can be chance."
    if difference.is_constant:
        return f"{sentence}; each of the {difference.n} items says the same, and none what other items would."
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
        pair
        for pair in above
        if (d := grid.difference_from_baseline(pair)) and d.stderr and not d.is_constant and d.value > 2 * d.stderr
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
    sentences += grid.left_out
    spreads = [cell.spread for cell in grid.cells.values() if cell.spread is not None]
    if spreads:
        pooled = math.sqrt(math.fsum(s * s for s in spreads) / len(spreads))
        sentences.append(f"Over seeds, one pair varies by {100 * pooled:.1f} points (standard deviation, pooled).")
    else:
        sentences.append("There is one seed of each; what another would change is not known.")
    return " ".join(sentences)
