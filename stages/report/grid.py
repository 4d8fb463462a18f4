"""Grids of weights as in the paper's Figure 1 (prompt down, completion across), from scores or from a CSV file.

The baseline of a grid is conventional instruction tuning (IT), the pair (0, 1); improvements are relative to it.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from stages.base import UserError
from stages.data.files import Record, read_rows
from stages.report.results import Column, Model, Results
from stages.report.sampling_errors import Estimate, rounded
from stages.report.tables import Cell, Table, number

CONVENTIONAL = (0.0, 1.0)
"""Prompt and completion weight of conventional instruction tuning."""
UNTRAINED = (0.0, 0.0)
"""The pair that trains nothing: the base model in a file of published grids."""
FEWEST_VALUES = 2
PUBLISHED_COLUMNS = ("model", "dataset", "prompt_weight", "response_weight", "average_score")

Pair = tuple[float, float]
Names = tuple[str | None, str | None]
"""What the report calls the model and its training data."""


@dataclass(frozen=True)
class GridCell:
    """One pair of weights: the scores of its models (one per seed), as shares."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return rounded(fmean(self.values))

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds (n - 1); None for a single one."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def summary(self) -> Estimate:
        """Mean and spread."""
        return Estimate(self.mean, self.spread)


@dataclass(frozen=True)
class Grid:
    """The cells of one model and data set, under one benchmark or the average of all."""

    title: str
    cells: dict[Pair, GridCell]
    base: GridCell | None
    names: Names
    results: Results | None = None
    """The results that it is from; None if it was published."""
    column: Column | None = None
    """The benchmark; None for the average."""
    models: dict[Pair, list[Model]] = field(default_factory=dict)

    @property
    def prompts(self) -> list[float]:
        return sorted({prompt for prompt, _ in self.cells})

    @property
    def completions(self) -> list[float]:
        return sorted({completion for _, completion in self.cells})

    @property
    def baseline(self) -> GridCell | None:
        """The cell of conventional instruction tuning."""
        return self.cells.get(CONVENTIONAL)

    @property
    def best(self) -> Pair:
        """The pair with the highest mean; of equals the lower prompt weight, then the lower completion weight."""
        return max(sorted(self.cells), key=lambda pair: self.cells[pair].mean)

    @property
    def best_improvement(self) -> float | None:
        return self.improvement(self.cells[self.best])

    @property
    def better(self) -> list[Pair]:
        """Pairs whose mean is higher than that of IT."""
        return [pair for pair, cell in self.cells.items() if self.baseline and cell.mean > self.baseline.mean]

    @property
    def clearly_better(self) -> list[Pair]:
        """Those of them that are above it by more than two standard errors."""
        differences = {pair: self.difference_from_baseline(pair) for pair in self.better}
        return [p for p, d in differences.items() if d and d.stderr and not d.is_constant and d.value > 2 * d.stderr]

    @property
    def rescaled(self) -> dict[Pair, float]:
        """Pairs that are (0, 1) times a factor -> the absolute difference of their means from that of IT."""
        pairs = sorted(pair for pair in self.cells if pair[0] == 0 < pair[1] and pair != CONVENTIONAL)
        return {pair: abs(self.cells[pair].mean - self.baseline.mean) for pair in pairs if self.baseline}

    @property
    def pooled_spread(self) -> float | None:
        """The standard deviation over seeds, pooled over the pairs that have several; None if none has."""
        squares = [cell.spread**2 for cell in self.cells.values() if cell.spread is not None]
        return math.sqrt(math.fsum(squares) / len(squares)) if squares else None

    @property
    def left_out(self) -> list[str]:
        """Sentences on pairs of its weights that were not measured, and on numbers of seeds that differ."""
        missing = [(p, c) for p in self.prompts for c in self.completions if (p, c) not in {*self.cells, UNTRAINED}]
        pairs = ", ".join(f"({prompt:g}, {completion:g})" for prompt, completion in missing)
        sentences = [f"Not measured: {pairs}."] if missing else []
        counts = {pair: len(cell.values) for pair, cell in self.cells.items()}
        if len(set(counts.values())) > 1:
            fewest, most = min(counts.values()), max(counts.values())
            sentences.append(
                f"Pairs have {fewest} to {most} seeds; a pair with one seed has no error against one with several."
            )
        return sentences

    def improvement(self, cell: GridCell | None) -> float | None:
        """Return (x - IT) / IT of the means; None if either was not measured, or IT is 0."""
        it = self.baseline
        return (cell.mean - it.mean) / it.mean if cell and it and it.mean else None

    def difference_from_baseline(self, pair: Pair) -> Estimate | None:
        """Return the pair minus IT; None if either was not measured.

        The standard error is that of the means over seeds if both have several, and that over the benchmarks' items if
        both have one. It is not known where one has several and the other a single seed.
        """
        cell, it = self.cells.get(pair), self.baseline
        if cell is None or it is None or self.results is None:
            return None
        if cell.spread is not None and it.spread is not None:
            error = math.sqrt(cell.spread**2 / len(cell.values) + it.spread**2 / len(it.values))
            return Estimate(cell.mean - it.mean, error)
        if cell.spread is not None or it.spread is not None:
            return Estimate(cell.mean - it.mean, None)
        (model,), (baseline,) = self.models[pair], self.models[CONVENTIONAL]
        return self.results.difference(model, baseline, self.column)

    def p_value(self, pair: Pair) -> float | None:
        """Return the two-sided p-value of the difference from the baseline; None without a standard error.

        It is Welch's t-test over seeds if both have several, else the normal distribution of a mean of many items.
        """
        difference = self.difference_from_baseline(pair)
        if difference is None or difference.stderr is None or difference.is_constant:
            return None
        cell, it = self.cells[pair], self.cells[CONVENTIONAL]
        if cell.spread is None or it.spread is None:
            return math.erfc(abs(difference.value) / difference.stderr / math.sqrt(2))
        from scipy.stats import ttest_ind

        return float(ttest_ind(cell.values, it.values, equal_var=False).pvalue)


def find_grids(results: Results, names: Names = (None, None), column: Column | None = None) -> list[Grid]:
    """Return the grids of a run under a benchmark, or its average: one for each combination of the other axes."""
    base, tuned = results.base, [model for model in results.models if model.stage == "sft" and model.labels]
    by_title: dict[str, dict[Pair, list[Model]]] = {}
    for model in tuned:
        prompt, completion = model.weights
        if prompt is not None and completion is not None:
            by_title.setdefault(_title(model, tuned, names), {}).setdefault((prompt, completion), []).append(model)
    grids = []
    for title, models in by_title.items():
        measured = {pair: [m for m in seeds if results.estimate(m, column)] for pair, seeds in models.items()}
        measured = {pair: seeds for pair, seeds in measured.items() if seeds}
        cells = {pair: _cell(results, seeds, column) for pair, seeds in measured.items()}
        if min(len({pair[side] for pair in cells}) for side in (0, 1)) >= FEWEST_VALUES:
            base_cell = _cell(results, [base], column) if base and results.estimate(base, column) else None
            grids.append(Grid(title, cells, base_cell, names, results, column, measured))
    return grids


def _title(model: Model, tuned: list[Model], names: Names) -> str:
    """What distinguishes a grid: the names or else the stage, and the axes that are neither weights nor seeds."""
    parts = [name for name in names if name]
    if not parts or len({other.name.partition("[")[0] for other in tuned}) > 1:
        parts.append(model.name.partition("[")[0])
    axes = [axis for axis in model.labels if not _is_weight_or_seed(axis, tuned)]
    return ", ".join([*parts, *(f"{axis}={model.labels[axis]}" for axis in axes)])


def _is_weight_or_seed(axis: str, tuned: list[Model]) -> bool:
    """Whether each value of the axis, which may be a name, stands for one weight, pair of weights or seed."""
    models = [model for model in tuned if axis in model.labels]
    labels = {model.labels[axis] for model in models}
    if len(labels) == 1:  # names nothing else than a number would
        return any(_number(model.labels[axis]) in (*model.weights, model.seed) for model in models[:1])
    for setting in (lambda m: m.weights[0], lambda m: m.weights[1], lambda m: m.weights, lambda m: m.seed):
        values = {setting(model) for model in models}
        if len({(model.labels[axis], setting(model)) for model in models}) == len(labels) == len(values):
            return True
    return False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _cell(results: Results, models: list[Model], column: Column | None) -> GridCell:
    return GridCell(tuple(estimate.value for model in models if (estimate := results.estimate(model, column))))


def grid_table(grid: Grid) -> Table:
    """Prompt weight down, completion weight across: the mean in points, with the spread over several seeds."""
    rows = []
    for prompt in grid.prompts:
        row = [Cell(f"{prompt:g}")]
        for completion in grid.completions:
            cell = grid.cells.get((prompt, completion))
            row.append(Cell(number(cell.summary if cell else None), best=(prompt, completion) == grid.best))
        rows.append(row)
    return Table(["prompt weight", *(f"completion {completion:g}" for completion in grid.completions)], rows)


def read_published_grids(file: Path) -> list[Grid]:
    """Read grids from a file with PUBLISHED_COLUMNS, in its order; scores are in points there, as shares here."""
    cells: dict[Names, dict[Pair, GridCell]] = {}
    for line, row in read_rows(file):
        place = f"{file}:{line}"
        if missing := [name for name in PUBLISHED_COLUMNS if name not in row]:
            raise UserError(f"{place}: has no column {', '.join(missing)}; it needs {', '.join(PUBLISHED_COLUMNS)}")
        model_and_data = str(row["model"]), str(row["dataset"])
        prompt, completion, score = [_number_in_row(row, name, place) for name in PUBLISHED_COLUMNS[2:]]
        if (prompt, completion) in cells.setdefault(model_and_data, {}):
            raise UserError(f"{place}: {', '.join(model_and_data)} has {(prompt, completion)} twice")
        cells[model_and_data][prompt, completion] = GridCell((score / 100,))
    grids = []
    for names, pairs in cells.items():
        title = ", ".join(map(str, names))
        base = pairs.pop(UNTRAINED, None)
        if not pairs:
            raise UserError(f"{file}: {title} has no pair of weights except (0, 0)")
        grids.append(Grid(title, pairs, base, names))
    return grids


def _number_in_row(row: Record, name: str, place: str) -> float:
    number = _number(str(row[name]))
    limit, unit = (100, "it is in points") if name == "average_score" else (1, "weights are numbers")
    if number is None or not 0 <= number <= limit:
        raise UserError(f"{place}: {name} is {row[name]!r}; {unit}, between 0 and {limit}")
    return number
