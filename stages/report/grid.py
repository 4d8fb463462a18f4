"""A grid of weights as the paper's Figure 1 lays it out: prompt weight down, completion weight across, several seeds of
one pair in one cell. Gains are relative to conventional instruction tuning, (0, 1), as the paper's are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from stages.base import BASE
from stages.report.averages import average, compare
from stages.report.results import Column, Difference, Model, Results
from stages.report.tables import Cell as TableCell
from stages.report.tables import Table, number

CONVENTIONAL = (0.0, 1.0)
"""Prompt and completion weight of conventional instruction tuning."""
FEWEST = 2
"""Values of either weight that make a grid."""

LUCK = "The best of many is above the rest by luck, too."

Pair = tuple[float, float]
Called = tuple[str | None, str | None]


@dataclass(frozen=True)
class Cell:
    """One pair of weights: a score of each model that has it, as shares."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return math.fsum(self.values) / len(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None for a single one."""
        if len(self.values) < 2:
            return None
        return math.sqrt(math.fsum((v - self.mean) ** 2 for v in self.values) / (len(self.values) - 1))


@dataclass(frozen=True)
class Panel:
    """The cells of one model and data set, under one benchmark or the average of all."""

    title: str
    cells: dict[Pair, Cell]
    base: Cell | None = None
    models: dict[Pair, list[Model]] = field(default_factory=dict)
    called: Called = (None, None)
    """What the report calls its model and its data."""

    @property
    def prompts(self) -> list[float]:
        """The prompt weights, ascending."""
        return sorted({prompt for prompt, _ in self.cells})

    @property
    def completions(self) -> list[float]:
        """The completion weights, ascending."""
        return sorted({completion for _, completion in self.cells})

    @property
    def conventional(self) -> Cell | None:
        """That of conventional instruction tuning."""
        return self.cells.get(CONVENTIONAL)

    @property
    def best(self) -> Pair:
        """The pair of the highest mean; the first of equals, by prompt weight and then completion weight."""
        return max(sorted(self.cells), key=lambda pair: self.cells[pair].mean)

    def gain(self, cell: Cell) -> float | None:
        """(x - IT) / IT of the means; None where (0, 1) was not measured, or is 0."""
        it = self.conventional
        return (cell.mean - it.mean) / it.mean if it and it.mean else None

    @property
    def best_gain(self) -> float | None:
        """That of the best pair."""
        return self.gain(self.cells[self.best])


def panels(results: Results, column: Column | None = None, called: Called = (None, None)) -> list[Panel]:
    """The grids among the tuned models, by the axes of the matrix that are neither weights nor seeds; empty where
    there are too few pairs.

    Args:
        results: what was measured.
        column: the benchmark to take; None for the average of all.
        called: what to call the model and the data.
    """
    base = next((model for model in results.models if model.name == BASE), None)
    found: dict[str, dict[Pair, list[Model]]] = {}
    for model in results.models:
        prompt, completion = model.weights
        if model.stage == "sft" and model.labels and prompt is not None and completion is not None:
            found.setdefault(_title(model, results, called), {}).setdefault((prompt, completion), []).append(model)
    made = []
    for title, pairs in found.items():
        cells = {pair: cell for pair, models in pairs.items() if (cell := _cell(results, models, column))}
        if min(len({pair[side] for pair in cells}) for side in (0, 1)) >= FEWEST:
            made.append(Panel(title, cells, _cell(results, [base], column) if base else None, pairs, called))
    return made


def _title(model: Model, results: Results, called: Called) -> str:
    """What tells a grid from the others: what model and data are called, or else its stage; and its values on the axes
    that are neither weights nor seeds."""
    tuned = [other for other in results.models if other.stage == "sft" and other.labels]
    names = [name for name in called if name]
    if not names or len({other.name.partition("[")[0] for other in tuned}) > 1:
        names.append(model.name.partition("[")[0])
    rest = [f"{axis}={value}" for axis, value in model.labels.items() if not _is_told(axis, tuned)]
    return ", ".join([*names, *rest])


def _is_told(axis: str, models: list[Model]) -> bool:
    """Whether an axis is one of the weights or the seed of every model that depends on it."""
    on_it = [model for model in models if axis in model.labels]
    told = [[_number(model.labels[axis]) == value for value in (*model.weights, model.seed)] for model in on_it]
    return any(all(column) for column in zip(*told, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cell(results: Results, models: list[Model], column: Column | None) -> Cell | None:
    values = []
    for model in models:
        found = average(results, model) if column is None else results.score(model, column)
        if found is not None and found.value is not None:
            values.append(found.value)
    return Cell(tuple(values)) if values else None


def grid_table(panel: Panel) -> Table:
    """Prompt weight down, completion weight across: the mean in points, with the spread over seeds where there are
    several."""
    heads = ["prompt weight", *(f"completion {completion:g}" for completion in panel.completions)]
    rows = []
    for prompt in panel.prompts:
        cells = [panel.cells.get((prompt, completion)) for completion in panel.completions]
        texts = [number(cell.mean, cell.spread, points=True) if cell else number(None, None, True) for cell in cells]
        best = [(prompt, completion) == panel.best for completion in panel.completions]
        rows.append([TableCell(f"{prompt:g}"), *(TableCell(t, best=b) for t, b in zip(texts, best, strict=True))])
    return Table(heads, rows)


def grid_summary(results: Results, panel: Panel) -> str:
    """What the grid shows and what it does not, in words."""
    it, best = panel.conventional, panel.best
    gain = panel.best_gain
    if it is None or gain is None:
        return f"{panel.title}: (0, 1), conventional instruction tuning, was not measured, so no gain can be told."
    others = [pair for pair in panel.cells if pair != CONVENTIONAL]
    above = [pair for pair in others if panel.cells[pair].mean > it.mean]
    clear = [pair for pair in above if _is_clear(results, panel, pair)]
    sentences = [
        f"{panel.title}: the best of {len(panel.cells)} pairs of weights (prompt, completion) is ({best[0]:g}, "
        f"{best[1]:g}) with {100 * panel.cells[best].mean:.1f}, conventional tuning (0, 1) has {100 * it.mean:.1f}: "
        f"a relative gain of {100 * gain:+.1f} %.",
        f"{len(above)} of the other {len(others)} pairs average above (0, 1), {len(clear)} of them by more than two "
        "standard errors.",
        LUCK,
    ]
    floor = panel.cells.get((0.0, 0.4))
    if floor:
        sentences.append(
            f"(0, 0.4) and (0, 1) differ in a common factor, which Adam all but cancels; they are "
            f"{100 * abs(floor.mean - it.mean):.1f} points apart, and a smaller difference than that shows nothing."
        )
    spreads = [cell.spread for cell in panel.cells.values() if cell.spread is not None]
    if spreads:
        pooled = math.sqrt(math.fsum(s * s for s in spreads) / len(spreads))
        sentences.append(f"Over seeds, one pair varies by {100 * pooled:.1f} points (standard deviation, pooled).")
    else:
        sentences.append("There is one seed of each; what another would change is not known.")
    return " ".join(sentences)


def gap(results: Results, panel: Panel, pair: Pair, column: Column | None = None) -> Difference | None:
    """A pair minus (0, 1): its standard error is that of the means over seeds where both have several, else of the
    benchmarks' items. None where either is missing."""
    mine, its = panel.cells.get(pair), panel.conventional
    if mine is None or its is None or not panel.models:
        return None
    if mine.spread is not None and its.spread is not None:
        error = math.sqrt(mine.spread**2 / len(mine.values) + its.spread**2 / len(its.values))
        return Difference(mine.mean - its.mean, error, paired=False)
    one, other = panel.models[pair][0], panel.models[CONVENTIONAL][0]
    return compare(results, one, other) if column is None else results.difference(one, other, column)


def chance(panel: Panel, pair: Pair, found: Difference | None) -> float | None:
    """How likely a difference from (0, 1) at least as large as `found` is where there is none, two-sided: Welch's t
    test over seeds where both have several, else the normal distribution of a mean of many items."""
    if found is None or not found.stderr:
        return None
    mine, its = panel.cells[pair], panel.cells[CONVENTIONAL]
    if mine.spread is None or its.spread is None:
        return math.erfc(abs(found.value) / found.stderr / math.sqrt(2))
    from scipy.stats import ttest_ind

    return float(ttest_ind(mine.values, its.values, equal_var=False).pvalue)


def _is_clear(results: Results, panel: Panel, pair: Pair) -> bool:
    """Whether a pair is above (0, 1) by more than two standard errors."""
    found = gap(results, panel, pair)
    return found is not None and found.stderr is not None and found.value > 2 * found.stderr
