"""Write the report: results.csv, report.md, report.html, tables.tex and figures. Same inputs, same bytes."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stages.base import Context
from stages.records.metrics import Metrics, ResultTable
from stages.report import sentences
from stages.report.config import PUBLISHED, ReportStage
from stages.report.correlations import correlation_table
from stages.report.figures import bars, heatmaps, training_curves
from stages.report.grid import Grid, grid_table, read_published_grids
from stages.report.improvements import (
    benchmark_table,
    best_table,
    improvements_table,
    preference_table,
    robustness_table,
    shares_table,
)
from stages.report.page import Picture, Section, render
from stages.report.runs import Run, read_joined_runs, read_own_run, runs_table
from stages.report.sentences import NOTES
from stages.report.tables import best_first, further_table, main_table, settings_table, training_table
from stages.system.terminal_text import csv_cell

MOST_BARS = 12
"""The most models that one figure shows as bars."""
CSV_COLUMNS = ["recipe", "step", "model", "stage", "prompt_weight", "completion_weight", "seed"]
CSV_COLUMNS += ["task", "metric", "value", "stderr"]


def run(context: Context) -> Metrics:
    """Report on the steps that scored a model and on the runs of other recipes; the table is the console's."""
    config: ReportStage = context.config
    own, joined = read_own_run(context.inputs, config), read_joined_runs(context.inputs, config)
    published = read_published_grids(context.inputs[PUBLISHED].path) if config.published else []
    runs = [*([own] if own.results.models else []), *joined]
    grids = [grid for run in runs for grid in run.grids] if runs else published
    compared = published if runs else []
    without_grid = [run.names for run in joined if not run.grids and all(run.names)]
    improvements = improvements_table(grids, compared, without_grid)
    tables = [(grid.title, benchmark_table(grid, grid.results)) for grid in grids if grid.results]
    missing = sentences.missing_notes(joined)
    correlations = correlation_table(runs, with_paper=bool(published))
    correlation_note = sentences.correlation_note([int(row[2].text) for row in correlations.rows])
    sections = [
        Section(
            "Best weights against conventional tuning", [("", improvements), *tables], [NOTES["improvements"], *missing]
        ),
        *(_grid_sections(runs, grids, compared, with_paper=bool(published)) if grids else []),
        Section("Best prompt weight and characteristics", [("", correlations)], [correlation_note]),
        Section("Preference tuning", [("", preference_table(runs))], [NOTES["preference"]]),
        Section("Sensitivity to wording", [("", robustness_table(runs))], [NOTES["robustness"]]),
        *(_score_sections(own) if own.results.models else []),
        Section("Where the numbers of other runs come from", [("", runs_table(joined))]),
    ]
    summary = sentences.summary(own, joined, grids)
    _write_csv(runs, context.recipe, context.out / "results.csv")
    page = {"title": config.title or context.recipe, "summary": summary, "sections": list(filter(None, sections))}
    for name in ("report.md", "report.html", "tables.tex"):
        text = render(f"{name}.jinja", **page)
        (context.out / name).write_text(text, encoding="utf-8")
    for picture in (picture for section in sections for picture in section.pictures):
        (context.out / "figures").mkdir(exist_ok=True)
        for form, content in picture.forms.items():
            (context.out / "figures" / f"{picture.name}.{form}").write_bytes(content)
    table = best_first(own.results, main_table(own.results, own.baseline)) if own.results.models else improvements
    text_table = ResultTable(columns=table.columns, rows=[[str(cell) for cell in row] for row in table.rows])
    return Metrics(table=text_table, summary=summary, notes=missing)


def _grid_sections(
    runs: Sequence[Run], grids: Sequence[Grid], published: Sequence[Grid], with_paper: bool
) -> list[Section]:
    shown = list(grids)
    if len(grids) == 1:
        shown += [replace(grid, title=label) for run in runs if run.grids for label, grid in run.benchmark_grids]
    picture = Picture("heatmap", "The tables below as heatmaps, laid out alike", heatmaps(shown))
    notes = [NOTES["grids"], *(f"{grid.title}: {sentence}" for grid in grids for sentence in grid.left_out)]
    sections = [Section("Grid of weights", [(grid.title, grid_table(grid)) for grid in shown], notes, [picture])]
    compared = [grid for grid in published if grid.names in {other.names for other in grids}]
    if compared:
        tables = [(grid.title, grid_table(grid)) for grid in compared]
        picture = Picture("published", "The published grids below as heatmaps, laid out alike", heatmaps(compared))
        sections.append(Section("Published grids", tables, [NOTES["published"]], [picture]))
    pictures = []
    for i, grid in enumerate(grids, 1):
        if forms := training_curves(grid):
            name = f"curves-{i}" if len(grids) > 1 else "curves"
            pictures.append(Picture(name, f"Training curves of {grid.title}, a line for each pair", forms))
    with_grids = [run for run in runs if run.grids]
    benchmark_grids = [grid for run in with_grids for _, grid in run.benchmark_grids]
    tables = [("", best_table(with_grids)), ("Counted", shares_table(grids, benchmark_grids, with_paper))]
    return [
        *sections,
        Section("Training curves", notes=[NOTES["curves"]], pictures=pictures),
        Section("Where the best weights lie", tables, [NOTES["best"]]),
    ]


def _score_sections(own: Run) -> list[Section]:
    results, baseline = own.results, own.baseline
    forms = bars(results) if len(results.models) <= MOST_BARS else None
    pictures = [Picture("scores", "The scores as bars, with standard errors", forms)] if forms else []
    notes = sentences.score_notes(results, baseline) + sentences.evaluation_notes(results)
    return [
        Section("Scores", [("", main_table(results, baseline))], notes, pictures),
        Section("Further metrics", [("", further_table(results))]),
        Section("How each model was made", [("", training_table(results))]),
        Section("Settings that move a score", [("", settings_table(results))]),
    ]


def _write_csv(runs: Sequence[Run], recipe: str, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for run in runs:
            for score in run.results.scores:
                model, column, row = score.model, score.column, score.row
                texts = map(csv_cell, (run.recipe or recipe, score.step, model.name, model.stage))
                benchmark = map(csv_cell, (column.task, column.metric_name))
                writer.writerow([*texts, *model.weights, model.seed, *benchmark, row.value, row.stderr])
