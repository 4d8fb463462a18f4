"""The report's sentences: the summary at its top, its notes on missing results, and how to read each section."""

from collections.abc import Collection, Sequence
from pathlib import Path

import yaml

from stages.report.grid import Grid
from stages.report.page import render
from stages.report.results import Model, Results
from stages.report.runs import Run

MOST_NAMES = 5
MOST_NOTES = 20

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
    top = max(grids, key=lambda grid: grid.best_improvement or 0.0, default=None)
    incomplete = sum(bool(run.missing) or not run.results.models for run in joined)
    return render("summary.jinja", own=own, joined=joined, grids=grids, top=top, incomplete=incomplete)
