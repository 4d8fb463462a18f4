"""Write the report: results.csv, report.md, report.html, tables.tex and figures. Same inputs, same bytes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stages.base import Context
from stages.records.metrics import Metrics
from stages.report import sentences
from stages.report.config import PUBLISHED, ReportStage
from stages.report.correlations import correlation_table
from stages.report.figures import bars, heatmaps, training_curves
from stages.report.grid import Grid, grid_table, read_published_grids
from stages.report.improvements import benchmark_table, best_table, improvements_table, shares_table
from stages.report.page import Page, Picture, Section, html, latex, markdown
from stages.report.preference_tables import preference_table, robustness_table
from stages.report.runs import Run, read_joined_runs, read_own_run
from stages.report.tables import best_first, further_table, main_table, settings_table, training_table

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
            "Best weights against conventional tuning",
            [("", improvements), *tables],
            [sentences.HOW_IMPROVEMENTS, *missing],
        ),
        *_grid_sections(runs, grids, compared),
        _best_weights(runs, grids, with_paper=bool(published)),
        Section("Best prompt weight and characteristics", [("", correlations)], [correlation_note]),
        Section("Preference tuning", [("", preference_table(runs))], [sentences.HOW_PREFERENCE]),
        Section("Sensitivity to wording", [("", robustness_table(runs))], [sentences.HOW_ROBUSTNESS]),
        *(_score_sections(own) if own.results.models else []),
    ]
    page = Page(config.title or context.recipe, sentences.summary(own, joined, grids), list(filter(None, sections)))
    _write_csv(runs, context.recipe, context.out / "results.csv")
    _write_page(page, context.out)
    own_table = best_first(own.results, main_table(own.results, own.baseline))
    table = own_table if own.results.models else improvements
    return Metrics(table=table.plain(), summary=page.summary, notes=missing)


def _grid_sections(runs: Sequence[Run], grids: Sequence[Grid], published: Sequence[Grid]) -> list[Section]:
    """The grids as heatmaps and tables, a single one under each benchmark, too; and the training curves."""
    if not grids:
        return []
    shown = list(grids)
    if len(grids) == 1:
        shown += [replace(grid, title=label) for run in runs if run.grids for label, grid in run.benchmark_grids]
    picture = Picture("heatmap", "The tables below as heatmaps, laid out alike", heatmaps(shown))
    sections = [
        Section("Grid of weights", [(grid.title, grid_table(grid)) for grid in shown], [sentences.HOW_GRIDS], [picture])
    ]
    compared = [grid for grid in published if grid.names in {other.names for other in grids}]
    if compared:
        tables = [(grid.title, grid_table(grid)) for grid in compared]
        picture = Picture("published", "The published grids below as heatmaps, laid out alike", heatmaps(compared))
        sections.append(Section("Published grids", tables, [sentences.HOW_PUBLISHED], [picture]))
    pictures = []
    for i, grid in enumerate(grids, 1):
        if forms := training_curves(grid):
            name = f"curves-{i}" if len(grids) > 1 else "curves"
            pictures.append(Picture(name, f"Training curves of {grid.title}, a line for each pair", forms))
    return [*sections, Section("Training curves", notes=[sentences.HOW_CURVES], pictures=pictures)]


def _best_weights(runs: Sequence[Run], grids: Sequence[Grid], with_paper: bool) -> Section:
    title = "Where the best weights lie"
    if not grids:
        return Section(title)
    with_grids = [run for run in runs if run.grids]
    benchmark_grids = [grid for run in with_grids for _, grid in run.benchmark_grids]
    counts = shares_table(grids, benchmark_grids, with_paper)
    return Section(title, [("", best_table(with_grids)), ("Counted", counts)], [sentences.HOW_BEST])


def _score_sections(own: Run) -> list[Section]:
    """All scores of the recipe's own models, how the models were trained, and the settings of the benchmarks."""
    results, baseline = own.results, own.baseline
    forms = bars(results) if len(results.models) <= MOST_BARS else None
    pictures = [Picture("scores", "The scores as bars, with standard errors", forms)] if forms else []
    return [
        Section("Scores", [("", main_table(results, baseline))], sentences.score_notes(results, baseline), pictures),
        Section("Further metrics", [("", further_table(results))]),
        Section("How each model was made", [("", training_table(results))]),
        Section("Settings that move a score", [("", settings_table(results))]),
    ]


def _write_page(page: Page, folder: Path) -> None:
    for name, text in {"report.md": markdown(page), "report.html": html(page), "tables.tex": latex(page)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    for picture in (picture for section in page.sections for picture in section.pictures):
        (folder / "figures").mkdir(exist_ok=True)
        for form, content in picture.forms.items():
            (folder / "figures" / f"{picture.name}.{form}").write_bytes(content)


def _write_csv(runs: Sequence[Run], recipe: str, path: Path) -> None:
    """Write one line per score, floats with all digits (`repr`), empty for None."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for run in runs:
            for score in run.results.scores:
                model, column, row = score.model, score.column, score.row
                values = [run.recipe or recipe, score.step, model.name, model.stage, *model.weights, model.seed]
                values += [column.task, column.metric_name, row.value, row.stderr]
                writer.writerow([repr(value) if isinstance(value, float) else value for value in values])
