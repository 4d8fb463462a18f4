"""Write the report of a run: results.csv, report.md, report.html and the figure. Same inputs, same bytes."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.base import Context
from stages.report.averages import averaged, summary
from stages.report.config import ReportStage
from stages.report.figure import scores_svg
from stages.report.grid import Panel, grid_summary, grid_table, panels
from stages.report.heatmap import heatmaps
from stages.report.page import Page, html, markdown
from stages.report.results import Model, Results, find_baseline, read
from stages.report.tables import column_labels, further_table, main_table, making_table, settings_table

MOST_BARS = 12
"""Models beyond which bars side by side tell nothing."""
CSV_COLUMNS = ["recipe", "step", "model", "stage", "prompt_weight", "completion_weight", "seed"]
CSV_COLUMNS += ["task", "metric", "value", "stderr"]


def run(context: Context) -> dict[str, Any]:
    """Report on the benchmark steps among the inputs; returns {"table": {"columns", "rows"}, "summary"}."""
    config: ReportStage = context.config
    results = read(context.inputs)
    baseline = find_baseline(results.models, config.baseline)
    grids = panels(results)
    in_grids = {model.name for grid in grids for models in grid.models.values() for model in models}
    said = [summary(results, baseline, in_grids), *(grid_summary(results, grid) for grid in grids)]
    shown = [*grids, *(_by_benchmark(results) if len(grids) == 1 else [])]
    page = Page(
        title=config.title or context.recipe,
        summary=" ".join(filter(None, said)),
        notes=_notes(results, baseline),
        main=main_table(results, baseline),
        further=further_table(results),
        making=making_table(results),
        settings=settings_table(results),
        grids=[(grid.title, grid_table(grid)) for grid in shown],
        figure=scores_svg(results) if len(results.models) <= MOST_BARS else None,
        heatmap=heatmaps(shown) if shown else None,
    )
    write_csv(context.recipe, results, context.out / "results.csv")
    (context.out / "report.md").write_text(markdown(page), encoding="utf-8")
    (context.out / "report.html").write_text(html(page), encoding="utf-8")
    figures = {"scores.svg": page.figure, "heatmap.svg": page.heatmap}
    figures["heatmap.png"] = heatmaps(shown, "png") if shown else None
    for name, content in figures.items():
        if content:
            (context.out / "figures").mkdir(exist_ok=True)
            (context.out / "figures" / name).write_bytes(content)
    return {"table": page.main.plain(), "summary": page.summary}


def _by_benchmark(results: Results) -> list[Panel]:
    """The grid under each benchmark that the average is made of."""
    columns = averaged(results)
    found = [(label, panels(results, column)) for label, column in zip(_labels(results), columns, strict=True)]
    return [replace(grid, title=label) for label, grids in found for grid in grids]


def _labels(results: Results) -> list[str]:
    return column_labels(results, averaged(results), with_metric=False)


def write_csv(recipe: str, results: Results, path: Path) -> None:
    """One line per number, floats in full (`repr`), empty where there is nothing."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for score in results.scores:
            model = score.model
            made = [model.name, model.stage, *model.weights, model.seed]
            measured = [score.column.task, score.column.metric_name, score.value, score.stderr]
            writer.writerow([_field(value) for value in (recipe, score.step, *made, *measured)])


def _field(value: Any) -> str:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


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


def _notes(results: Results, baseline: Model | None) -> list[str]:
    """How to read the main table, with the formulas in words."""
    columns = averaged(results)
    if not columns:
        return [HOW_TO_READ]
    left_out = [c.task for c in results.columns(headline=True) if c not in columns]
    also = f" Left out, being no share of which more is better: {', '.join(left_out)}." if left_out else ""
    notes = [HOW_TO_READ, AVERAGE + also]
    return notes if baseline is None else [*notes, f"“vs {baseline.name}” {DIFFERENCE}"]
