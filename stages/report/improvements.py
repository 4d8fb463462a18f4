"""What the paper's tables tell of grids of weights: the best pair against conventional instruction tuning, under the
average and under each benchmark, and where the best pairs lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.report.averages import average, averaged
from stages.report.grid import CONVENTIONAL, Called, Pair, Panel, chance, gap, panels
from stages.report.grid import Cell as Scores
from stages.report.results import Column, Difference, Model, Results
from stages.report.runs import Part
from stages.report.tables import MISSING, Cell, Table, column_labels, number

Weights = Callable[[Pair], bool]
SHARES: dict[str, Weights] = {
    "best prompt weight between 0 and 0.6": lambda pair: pair[0] <= 0.6,
    "best prompt weight not 0": lambda pair: pair[0] != 0,
    "best completion weight 1": lambda pair: pair[1] == 1,
    "best completion weight between 0.4 and 1": lambda pair: pair[1] >= 0.4,
}
"""Where the paper counts the best pairs."""
PAPER = {
    "best prompt weight between 0 and 0.6": "61 of 75",
    "best prompt weight not 0": "43 of 75",
    "best completion weight 1": "18 of 75",
    "best completion weight between 0.4 and 1": "55 of 75",
}
"""What it counted over five models, three data sets and five benchmarks (arXiv 2507.07817)."""


@dataclass(frozen=True)
class Grid:
    """A panel that is shown, with where it came from."""

    panel: Panel
    part: Part | None
    """None for one that was measured elsewhere."""


def percent(gain: float | None) -> str:
    """`+20.25 %`."""
    return MISSING if gain is None else f"{100 * gain:+.2f} %"


def pair_text(pair: Pair) -> str:
    """`(0.2, 0.8)`."""
    return f"({pair[0]:g}, {pair[1]:g})"


def mean_gain(grids: Sequence[Panel]) -> float | None:
    """The mean over panels of the best pair's relative gain over (0, 1); None where a panel has none, or there is no
    panel."""
    gains = [panel.best_gain for panel in grids]
    known = [gain for gain in gains if gain is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(gains) else None


def gains_table(grids: Sequence[Grid], published: Sequence[Panel], missing: Sequence[Called] = ()) -> Table:
    """A row for each grid: base, IT, the best pair and its gain; beside it what was published, and how far it is.

    Args:
        grids: those that are shown.
        published: those to put beside them; empty for no such columns.
        missing: model and data of grids that are not measured yet.
    """
    beside = {panel.called: panel for panel in published}
    heads = ["grid", "cells", "base", "IT (0, 1)", "best", "its weights", "gain over IT", "p"]
    if beside:
        heads += ["published IT", "published best", "its weights", "published gain", "difference of gains"]
    rows = [_gains_row(grid, beside) for grid in grids]
    for called in missing:
        row = [Cell(", ".join(filter(None, called))), Cell("0"), *[Cell(MISSING)] * 6]
        rows.append([*row, *([*_published_cells(beside.get(called)), Cell(MISSING)] if beside else [])])
    if len(grids) > 1:
        mean = mean_gain([grid.panel for grid in grids])
        row = [Cell("mean"), *[Cell("")] * 5, Cell(percent(mean), best=True), Cell("")]
        if beside:
            other = mean_gain([beside[grid.panel.called] for grid in grids if grid.panel.called in beside])
            row += [Cell("")] * 3 + [Cell(percent(other), best=True), Cell("")]
        rows.append(row)
    return Table(heads, rows)


def _gains_row(grid: Grid, beside: dict[Called, Panel]) -> list[Cell]:
    panel, best = grid.panel, grid.panel.best
    gain = panel.best_gain
    found = gap(grid.part.results, panel, best) if grid.part else None
    row = [Cell(panel.title), Cell(str(len(panel.cells))), _mean(panel, None), _mean(panel, CONVENTIONAL)]
    row += [_mean(panel, best, grid.part), Cell(pair_text(best)), Cell(percent(gain))]
    row.append(Cell(p_text(chance(panel, best, found))))
    if beside:
        other = beside.get(panel.called)
        its = other.best_gain if other else None
        both = gain is not None and its is not None
        row += _published_cells(other)
        row.append(Cell(f"{100 * (gain - its):+.2f} points" if both else MISSING))  # type: ignore[operator]
    return row


def _published_cells(panel: Panel | None) -> list[Cell]:
    """IT, the best pair, its weights and its gain as they were published."""
    if panel is None:
        return [Cell(MISSING)] * 4
    gain = panel.best_gain
    best = [Cell(pair_text(panel.best)), Cell(percent(gain))]
    return [_mean(panel, CONVENTIONAL), _mean(panel, panel.best), *best]


def p_text(p: float | None) -> str:
    """`0.031`, `< 0.001`."""
    if p is None:
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _mean(panel: Panel, pair: Pair | None, part: Part | None = None) -> Cell:
    """The mean of a pair, of the base model for None."""
    cell = panel.base if pair is None else panel.cells.get(pair)
    if cell is None:
        return Cell(MISSING)
    link = None
    if part and pair is not None:
        steps = [score.step for score in part.results.scores if score.model.name == panel.models[pair][0].name]
        link = part.results.link(steps[0]) if steps else None
    return Cell(
        f"{100 * cell.mean:.2f}" + (f" ± {100 * cell.spread:.2f}" if cell.spread is not None else ""), link=link
    )


def benchmark_table(part: Part, panel: Panel) -> Table:
    """Base, IT and the best pair under each benchmark and the average; the best pair's difference from IT, how likely
    it is by chance, and its relative gain."""
    results = part.results
    columns: list[Column | None] = [*averaged(results), None]
    heads = ["model", *column_labels(results, averaged(results), with_metric=False), "average"]
    base = next((model for model in results.models if not model.lineage), None)
    rows = []
    for label, models in (
        ("Base", [base] if base else []),
        ("IT (0, 1)", panel.models.get(CONVENTIONAL, [])),
        (f"best {pair_text(panel.best)}", panel.models[panel.best]),
    ):
        rows.append([Cell(label), *(_score(results, models, column) for column in columns)])
    grids = {column: _same(part, panel, column) for column in columns}
    found = {column: gap(results, grid, panel.best, column) if grid else None for column, grid in grids.items()}
    rows.append([Cell("best - IT"), *(_points(found[column]) for column in columns)])
    ps = [chance(grid, panel.best, found[column]) if (grid := grids[column]) else None for column in columns]
    rows.append([Cell("p"), *(Cell(p_text(p)) for p in ps)])
    gains = [
        grid.gain(grid.cells[panel.best]) if grid and panel.best in grid.cells else None for grid in grids.values()
    ]
    rows.append([Cell("gain over IT"), *(Cell(percent(gain)) for gain in gains)])
    return Table(heads, rows)


def _same(part: Part, panel: Panel, column: Column | None) -> Panel | None:
    """The same grid under another benchmark; None where it has too few cells there."""
    found = [other for other in panels(part.results, column, part.called) if other.title == panel.title]
    return found[0] if found else None


def _points(found: Difference | None) -> Cell:
    return Cell(MISSING if found is None else number(found.value, found.stderr, points=True, sign=True))


def _score(results: Results, models: list[Model], column: Column | None) -> Cell:
    """The mean over the models, which are seeds of one pair, ± their spread; of one, ± the standard error of items."""
    pairs: list[tuple[float, float | None]] = []
    link = None
    for model in models:
        if column is None:
            if mean := average(results, model):
                pairs.append((mean.value, mean.stderr))
        elif (score := results.score(model, column)) and score.value is not None:
            pairs.append((score.value, score.stderr))
            link = link or results.link(score.step)
    if not pairs:
        return Cell(MISSING)
    over_seeds = Scores(tuple(value for value, _ in pairs))
    error = pairs[0][1] if len(pairs) == 1 else over_seeds.spread
    return Cell(number(over_seeds.mean, error, points=True), link=link)


def best_table(parts: Sequence[Part]) -> Table:
    """The best pair of each grid under each benchmark, with its gain over IT there."""
    labels = list(dict.fromkeys(label for part in parts for label, _ in part.by_benchmark))
    rows: dict[str, dict[str, Cell]] = {}
    best: dict[str, list[float]] = {}
    for part in parts:
        for label, panel in part.by_benchmark:
            text = f"{pair_text(panel.best)} {percent(panel.best_gain)}"
            rows.setdefault(panel.title, {})[label] = Cell(text)
            best.setdefault(label, []).append(panel.best[0])
    table = [[Cell(title), *(cells.get(label, Cell(MISSING)) for label in labels)] for title, cells in rows.items()]
    if len(rows) > 1:
        means = [f"{math.fsum(best[label]) / len(best[label]):.2f}" for label in labels]
        table.append([Cell("mean best prompt weight"), *map(Cell, means)])
    return Table(["grid", *labels], table)


def shares_table(grids: Sequence[Panel], benchmarks: Sequence[Panel], with_paper: bool) -> Table:
    """How many of the best pairs lie where the paper counts them; and whether the prompt alone teaches something."""
    heads = [
        "share",
        "by average",
        *(["by benchmark"] if benchmarks else []),
        *(["the paper, by benchmark"] * with_paper),
    ]
    rows = []
    for label, holds in SHARES.items():
        counts = [_count(grids, holds), *([_count(benchmarks, holds)] if benchmarks else [])]
        rows.append([label, *counts, *([PAPER[label]] if with_paper else [])])
    above = [
        cell.mean > panel.base.mean
        for panel in grids
        if panel.base
        for pair, cell in panel.cells.items()
        if pair[1] == 0
    ]
    if above:
        alone = [f"{sum(above)} of {len(above)}", *([""] if benchmarks else []), *([""] if with_paper else [])]
        rows.append(["prompts alone (completion weight 0) above the base model", *alone])
    return Table(heads, [[Cell(text) for text in row] for row in rows])


def _count(grids: Sequence[Panel], holds: Weights) -> str:
    return f"{sum(holds(panel.best) for panel in grids)} of {len(grids)}"
