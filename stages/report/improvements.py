"""Tables of what weights and preference tuning change: gains over conventional tuning, and sensitivity to wording."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from stages.data.files import read_rows
from stages.report.grid import CONVENTIONAL, Grid, GridCell, Names, Pair, find_grids
from stages.report.results import Column, Model, Results
from stages.report.runs import Run
from stages.report.sampling_errors import Estimate
from stages.report.tables import NO_VALUE, Cell, Table, column_labels, number

SHARES: dict[str, Callable[[Pair], bool]] = {
    "best prompt weight between 0 and 0.6": lambda pair: pair[0] <= 0.6,
    "best prompt weight not 0": lambda pair: pair[0] != 0,
    "best completion weight 1": lambda pair: pair[1] == 1,
    "best completion weight between 0.4 and 1": lambda pair: pair[1] >= 0.4,
}
"""The regions in which the paper counts best pairs."""
PAPER_SHARES = Path(__file__).with_name("paper_shares.csv")
"""The paper's counts over five models, three data sets and five benchmarks (arXiv 2507.07817)."""


def percent(improvement: float | None) -> str:
    """Format a relative improvement as `+20.25 %`."""
    return NO_VALUE if improvement is None else f"{100 * improvement:+.2f} %"


def pair_text(pair: Pair) -> str:
    """Format a pair as `(0.2, 0.8)`."""
    return f"({pair[0]:g}, {pair[1]:g})"


def mean_improvement(grids: Sequence[Grid]) -> float | None:
    """Return the mean relative improvement of the grids' best pairs; None if there are no grids or one has none."""
    known = [improvement for grid in grids if (improvement := grid.best_improvement) is not None]
    return fmean(known) if known and len(known) == len(grids) else None


def improvements_table(grids: Sequence[Grid], published: Sequence[Grid], missing: Sequence[Names]) -> Table:
    """One row per grid, and for those in `missing` without results: base model, IT, the best pair, its improvement."""
    by_names = {grid.names: grid for grid in published}
    heads = ["grid", "cells", "base", "IT (0, 1)", "best", "its weights", "gain over IT", "p"]
    if published:
        heads += ["published IT", "published best", "its weights", "published gain", "difference of gains"]
    rows = []
    for grid in grids:
        row = [Cell(grid.title), Cell(str(len(grid.cells))), _mean_cell(grid, grid.base), *_pair_cells(grid)]
        row.append(Cell(p_text(grid.p_value(grid.best))))
        rows.append(row + (_published_cells(by_names.get(grid.names), grid) if published else []))
    for names in missing:
        row = [Cell(", ".join(filter(None, names))), Cell("0"), *[Cell(NO_VALUE)] * 6]
        rows.append(row + (_published_cells(by_names.get(names), None) if published else []))
    if len(grids) > 1:
        row = [Cell("mean"), *[Cell("")] * 5, Cell(percent(mean_improvement(grids)), best=True), Cell("")]
        if published:
            mean = mean_improvement([by_names[grid.names] for grid in grids if grid.names in by_names])
            row += [Cell("")] * 3 + [Cell(percent(mean), best=True), Cell("")]
        rows.append(row)
    return Table(heads, rows)


def _pair_cells(grid: Grid) -> list[Cell]:
    best = _mean_cell(grid, grid.cells[grid.best], grid.best)
    return [_mean_cell(grid, grid.baseline), best, Cell(pair_text(grid.best)), Cell(percent(grid.best_improvement))]


def _published_cells(published: Grid | None, grid: Grid | None) -> list[Cell]:
    if published is None:
        return [Cell(NO_VALUE)] * 5
    ours, theirs = grid.best_improvement if grid else None, published.best_improvement
    points = NO_VALUE if ours is None or theirs is None else f"{100 * (ours - theirs):+.2f} points"
    return [*_pair_cells(published), Cell(points)]


def p_text(p: float | None) -> str:
    """Format a p-value as `0.031` or `< 0.001`."""
    if p is None:
        return NO_VALUE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _mean_cell(grid: Grid, cell: GridCell | None, pair: Pair | None = None) -> Cell:
    """A mean with its spread, linked to the first benchmark of the pair's first model."""
    link = None
    if grid.results and pair is not None:
        name = grid.models[pair][0].name
        link = next((grid.results.link(score.step) for score in grid.results.scores if score.model.name == name), None)
    return Cell(number(cell.summary if cell else None, decimals=2), link=link)


def benchmark_table(grid: Grid, results: Results) -> Table:
    """Base, IT and the best pair under each benchmark and the average; difference, p-value and relative improvement."""
    columns: list[Column | None] = [*results.averaged, None]
    heads = ["model", *column_labels(results, results.averaged), "average"]
    base = next((model for model in results.models if not model.lineage), None)
    models = {"Base": [base] if base else [], "IT (0, 1)": grid.models.get(CONVENTIONAL, [])}
    models[f"best {pair_text(grid.best)}"] = grid.models[grid.best]
    rows = [[Cell(k), *(_seeds_cell(results, seeds, column) for column in columns)] for k, seeds in models.items()]
    differences, p_values, improvements = [Cell("best - IT")], [Cell("p")], [Cell("gain over IT")]
    for column in columns:
        other = next((each for each in find_grids(results, grid.names, column) if each.title == grid.title), None)
        differences.append(Cell(number(other.difference_from_baseline(grid.best) if other else None, sign=True)))
        p_values.append(Cell(p_text(other.p_value(grid.best) if other else None)))
        improvements.append(Cell(percent(other.improvement(other.cells.get(grid.best)) if other else None)))
    return Table(heads, [*rows, differences, p_values, improvements])


def _seeds_cell(results: Results, models: list[Model], column: Column | None) -> Cell:
    """The mean over seeds ± their spread; of one seed, ± the standard error over items."""
    estimates = [estimate for model in models if (estimate := results.estimate(model, column))]
    if not estimates:
        return Cell(NO_VALUE)
    scores = [score for model in models if column and (score := results.score(model, column))]
    over_seeds = GridCell(tuple(estimate.value for estimate in estimates)).summary
    shown = Estimate(over_seeds.value, estimates[0].stderr) if len(estimates) == 1 else over_seeds
    return Cell(number(shown), link=results.link(scores[0].step) if scores else None)


def best_table(runs: Sequence[Run]) -> Table:
    """The best pair of each grid under each benchmark, with its improvement there."""
    rows: dict[str, dict[str, Cell]] = {}
    best_prompts: dict[str, list[float]] = {}
    for run in runs:
        for label, grid in run.benchmark_grids:
            text = f"{pair_text(grid.best)} {percent(grid.best_improvement)}"
            rows.setdefault(grid.title, {})[label] = Cell(text)
            best_prompts.setdefault(label, []).append(grid.best[0])
    table = [
        [Cell(title), *(cells.get(label, Cell(NO_VALUE)) for label in best_prompts)] for title, cells in rows.items()
    ]
    if len(rows) > 1:
        means = [f"{fmean(prompts):.2f}" for prompts in best_prompts.values()]
        table.append([Cell("mean best prompt weight"), *map(Cell, means)])
    return Table(["grid", *best_prompts], table)


def shares_table(grids: Sequence[Grid], benchmark_grids: Sequence[Grid], with_paper: bool) -> Table:
    """How many best pairs lie in the paper's regions; how often tuning on prompts alone improves the base model."""
    by_benchmark = bool(benchmark_grids)
    heads = ["share", "by average", *["by benchmark"] * by_benchmark, *["the paper, by benchmark"] * with_paper]
    paper = {row["share"]: f"{row['count']} of {row['of']}" for _, row in read_rows(PAPER_SHARES)}
    rows = []
    for label, holds in SHARES.items():
        counts = [_count(grids, holds), *[_count(benchmark_grids, holds)] * by_benchmark]
        rows.append([label, *counts, *[paper[label]] * with_paper])
    above = []
    for grid in grids:
        if grid.base:
            above += [cell.mean > grid.base.mean for pair, cell in grid.cells.items() if pair[1] == 0]
    if above:
        label = "prompts alone (completion weight 0) above the base model"
        rows.append([label, f"{sum(above)} of {len(above)}", *[""] * (len(heads) - 2)])
    return Table(heads, [[Cell(text) for text in row] for row in rows])


def _count(grids: Sequence[Grid], holds: Callable[[Pair], bool]) -> str:
    return f"{sum(holds(grid.best) for grid in grids)} of {len(grids)}"


def preference_table(runs: Sequence[Run]) -> Table:
    """One row per preference-tuned model: its start and itself, and differences from the start and from IT's."""
    rows = []
    for run in runs:
        results = run.results
        pairs = [(model, start) for model in results.models if (start := _start(results, model))]
        reference = next((model for model, start in pairs if start is run.baseline), None)
        for model, start in pairs:
            before, after = results.estimate(start), results.estimate(model)
            row = [Cell(run.name)] if len(runs) > 1 else []
            row += [Cell(model.label), Cell(f"{start.label}: {number(before)}" if before else NO_VALUE)]
            row += [Cell(number(after)), Cell(number(results.difference(model, start), sign=True))]
            from_reference = results.difference(model, reference) if reference else None
            row.append(Cell("" if reference is model else number(from_reference, sign=True)))
            rows.append(row)
    first = ["run"] if len(runs) > 1 else []
    return Table([*first, "model", "its start", "after", "change", "against the one from IT"], rows)


def _start(results: Results, model: Model) -> Model | None:
    if model.stage != "dpo" or len(model.lineage) < 2:
        return None
    start = model.lineage[1]
    for other in results.models:
        if other.lineage and (other.lineage[0].step, other.lineage[0].fingerprint) == (start.step, start.fingerprint):
            return other
    return None


def robustness_table(runs: Sequence[Run]) -> Table:
    """Each model's sensitivity to wording (POSIX; less is better), and its relative difference from the baseline."""
    heads: dict[str, None] = {}
    rows: list[tuple[str, str, dict[str, Cell]]] = []
    for run in runs:
        results = run.results
        measured = {s.column for s in results.scores if results.evaluations[s.step].kind == "sensitivity"}
        columns = [column for column in results.columns(headline=True) if column in measured]
        for model in results.models:
            cells: dict[str, Cell] = {}
            for column, label in zip(columns, column_labels(results, columns), strict=True):
                score, estimate = results.score(model, column), results.estimate(model, column)
                if score is None or estimate is None:
                    continue
                cells[label] = Cell(number(estimate, points=False), link=results.link(score.step))
                baseline = results.estimate(run.baseline, column) if run.baseline else None
                if baseline and baseline.value and model is not run.baseline:
                    cells[f"{label} against IT"] = Cell(f"{100 * (estimate.value / baseline.value - 1):+.1f} %")
                heads |= dict.fromkeys([label, f"{label} against IT"])
            if cells:
                rows.append((run.name, model.label, cells))
    table = [[Cell(run), Cell(model), *(cells.get(head, Cell("")) for head in heads)] for run, model, cells in rows]
    if len(runs) > 1:
        return Table(["run", "model", *heads], table)
    return Table(["model", *heads], [row[1:] for row in table])
