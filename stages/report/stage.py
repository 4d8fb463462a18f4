"""Write the report of a run, or of several: results.csv, report.md, report.html, tables.tex and figures. Same inputs,
same bytes."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

from stages.base import Context
from stages.records.metrics import Metrics
from stages.report.averages import averaged, summary
from stages.report.config import PUBLISHED, ReportStage
from stages.report.correlations import correlation_table
from stages.report.curves import curves
from stages.report.figure import bars
from stages.report.grid import LUCK, Panel, grid_summary, grid_table
from stages.report.heatmap import heatmaps
from stages.report.improvements import (
    Grid,
    benchmark_table,
    best_table,
    gains_table,
    mean_gain,
    pair_text,
    percent,
    shares_table,
)
from stages.report.page import Page, Picture, Section, html, latex, markdown
from stages.report.preference_tables import preference_table, robustness_table
from stages.report.published import read_grids
from stages.report.runs import Part, joined_parts, own_part
from stages.report.tables import Table, best_first, further_table, main_table, making_table, settings_table

MOST_BARS = 12
"""Models beyond which bars side by side tell nothing."""
SHOWN = 5
"""How many names a line lists."""
CSV_COLUMNS = ["recipe", "step", "model", "stage", "prompt_weight", "completion_weight", "seed"]
CSV_COLUMNS += ["task", "metric", "value", "stderr"]


def run(context: Context) -> Metrics:
    """Report on the benchmark steps among the inputs and on the runs that are joined.

    The result: {"table": {"columns", "rows"}, "summary", "notes"}; the table is the console's, best first.
    """
    config: ReportStage = context.config
    own, joined = own_part(context.inputs, config), joined_parts(context.inputs, config)
    published = read_grids(context.inputs[PUBLISHED].path) if config.published else []
    parts = [*([own] if own.results.models else []), *joined]  # runs without results included
    found = [Grid(panel, part) for part in parts for panel in part.grids]
    grids = found if parts else [Grid(panel, None) for panel in published]
    beside = published if parts else []
    missing = _missing(joined)
    gains = gains_table(grids, beside, [part.called for part in joined if not part.grids and all(part.called)])
    sections = [
        _overview(grids, gains, missing),
        *_heatmaps(grids, beside),
        _best(parts, grids, bool(published)),
        Section(
            "Best prompt weight and characteristics", [("", correlation_table(parts, bool(published)))], [HOW_RANKS]
        ),
        Section("Preference tuning", [("", preference_table(parts))], [PREFERENCE]),
        Section("Sensitivity to wording", [("", robustness_table(parts))], [ROBUSTNESS]),
        *(_scores(own) if own.results.models else []),
    ]
    page = Page(config.title or context.recipe, _summary(own, parts, grids, missing), list(filter(None, sections)))
    write_csv([(part.run or context.recipe, part) for part in parts], context.out / "results.csv")
    for name, text in {"report.md": markdown(page), "report.html": html(page), "tables.tex": latex(page)}.items():
        (context.out / name).write_text(text, encoding="utf-8")
    for picture in (picture for section in page.sections for picture in section.pictures):
        (context.out / "figures").mkdir(exist_ok=True)
        for form, content in picture.forms.items():
            (context.out / "figures" / f"{picture.name}.{form}").write_bytes(content)
    own_table = best_first(own.results, main_table(own.results, own.baseline))
    table = own_table if own.results.models else gains
    return Metrics(table=table.plain(), summary=page.summary, notes=missing)


def _missing(joined: list[Part]) -> list[str]:
    """What the runs that are joined lack."""
    nothing = [part.run or "" for part in joined if not part.results.models]
    said = [f"nothing is measured yet of {_few(nothing)}; run-recipe makes it"] if nothing else []
    for part in joined:
        if part.missing and part.results.models:
            said.append(f"{part.run}: no result of {_few(part.missing)}")
    return said


def _few(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _summary(own: Part, parts: list[Part], grids: list[Grid], missing: list[str]) -> str:
    """What was found, in words."""
    said = []
    if own.results.models:
        in_grids = {model.name for grid in own.grids for models in grid.models.values() for model in models}
        said.append(summary(own.results, own.baseline, in_grids))
    if len(grids) == 1 and grids[0].part:
        said.append(grid_summary(grids[0].part.results, grids[0].panel))
    elif grids:
        gain = mean_gain([grid.panel for grid in grids])
        most = max(grids, key=lambda grid: grid.panel.best_gain or 0.0).panel
        said.append(
            f"Over {len(grids)} grids the best pair gains {percent(gain)} over conventional tuning (0, 1) on average; "
            f"most in {most.title}: {percent(most.best_gain)} with {pair_text(most.best)}. {LUCK}"
        )
    if missing:
        lacking = sum(bool(part.missing) or not part.results.models for part in parts if part.run)
        said.append(f"Not complete: {lacking} of {sum(bool(part.run) for part in parts)} runs lack results.")
    return " ".join(filter(None, said)) or "There is nothing to compare yet."


def _overview(grids: list[Grid], gains: Table, missing: list[str]) -> Section:
    """The best pair of every grid, and under each benchmark."""
    tables = [("", gains)] + [(grid.panel.title, benchmark_table(grid.part, grid.panel)) for grid in grids if grid.part]
    return Section("Best weights against conventional tuning", tables, [HOW_GAINS, *missing])


def _heatmaps(grids: list[Grid], published: list[Panel]) -> list[Section]:
    """The grids as pictures and tables: under each benchmark, too, where there is one grid; and the training curves."""
    if not grids:
        return []
    shown = [grid.panel for grid in grids]
    if len(grids) == 1 and grids[0].part:
        shown += [replace(panel, title=label) for label, panel in grids[0].part.by_benchmark]
    picture = Picture("heatmap", "The tables below as heatmaps, laid out alike", heatmaps(shown))
    made = [Section("Grid of weights", [(p.title, grid_table(p)) for p in shown], [HOW_GRIDS], [picture])]
    beside = [panel for panel in published if panel.called in {grid.panel.called for grid in grids}]
    if beside:
        tables = [(panel.title, grid_table(panel)) for panel in beside]
        picture = Picture("published", "The published grids below as heatmaps, laid out alike", heatmaps(beside))
        made.append(Section("Published grids", tables, [HOW_PUBLISHED], [picture]))
    drawn = [(grid.panel.title, curves(grid.panel)) for grid in grids]
    pictures = [
        Picture(
            f"curves-{i}" if len(drawn) > 1 else "curves", f"Training curves of {title}, a line for each pair", forms
        )
        for i, (title, forms) in enumerate(drawn, 1)
        if forms
    ]
    made.append(Section("Training curves", notes=[HOW_CURVES], pictures=pictures))
    return made


def _best(parts: list[Part], grids: list[Grid], with_paper: bool) -> Section:
    """Which weights are best where, and how many of them lie where the paper counts."""
    if not grids:
        return Section("Where the best weights lie")
    with_grids = [part for part in parts if part.grids]
    benchmarks = [panel for part in with_grids for _, panel in part.by_benchmark]
    tables = [("", best_table(with_grids))]
    tables.append(("Counted", shares_table([grid.panel for grid in grids], benchmarks, with_paper)))
    return Section("Where the best weights lie", tables, [HOW_BEST])


def _scores(own: Part) -> list[Section]:
    """Every number of the recipe's own models, how they were made and under which settings they were measured."""
    results, baseline = own.results, own.baseline
    forms = bars(results) if len(results.models) <= MOST_BARS else None
    pictures = [Picture("scores", "The scores as bars, with standard errors", forms)] if forms else []
    return [
        Section("Scores", [("", main_table(results, baseline))], _notes(own), pictures),
        Section("Further metrics", [("", further_table(results))]),
        Section("How each model was made", [("", making_table(results))]),
        Section("Settings that move a score", [("", settings_table(results))]),
    ]


def write_csv(parts: list[tuple[str, Part]], path: Path) -> None:
    """One line per number, floats in full (`repr`), empty where there is nothing."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for recipe, part in parts:
            for score in part.results.scores:
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
HOW_GAINS = (
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
HOW_RANKS = (
    "Rank correlations over data sets, benchmarks or models, of a characteristic and the mean best prompt weight of "
    "each, over all grids and benchmarks. With fewer than three there is none; with a handful, as here and in the "
    "paper, no coefficient is far from chance. What each characteristic is: stages/characteristics/stage.py."
)
PREFERENCE = (
    "Averages over the benchmarks, in points; “change” is the difference from the start, ± its standard error, paired "
    "where the items are the same."
)
ROBUSTNESS = (
    "POSIX, the prompt sensitivity index: how far the log-probability of an answer moves, per token, when a prompt is "
    "put in other words. Less is better."
)


def _notes(own: Part) -> list[str]:
    """How to read the main table, with the formulas in words."""
    results, baseline = own.results, own.baseline
    columns = averaged(results)
    if not columns:
        return [HOW_TO_READ]
    left_out = [c.task for c in results.columns(headline=True) if c not in columns]
    also = f" Left out, being no share of which more is better: {', '.join(left_out)}." if left_out else ""
    notes = [HOW_TO_READ, AVERAGE + also]
    return notes if baseline is None else [*notes, f"“vs {baseline.name}” {DIFFERENCE}"]
