"""The runs that a report shows: the recipe's own, and the last runs of other recipes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stages.base import Input
from stages.evaluation.past_runs import read_past_run
from stages.records.run_record import RUN_RECORD, RunRecord
from stages.report.config import PUBLISHED, RUN_PREFIX, ReportStage
from stages.report.grid import Grid, Names, find_grids
from stages.report.results import Model, Results, find_baseline, read_results
from stages.report.tables import NO_VALUE, Cell, Table, column_labels


@dataclass(frozen=True)
class Run:
    """The results of one run."""

    recipe: str | None
    """None for the report's own recipe."""
    names: Names
    results: Results
    baseline: Model | None
    record: RunRecord | None = None
    """The record of another recipe's run; None if there was none yet."""

    @property
    def name(self) -> str:
        return ", ".join(filter(None, self.names)) or self.recipe or ""

    @property
    def missing(self) -> list[str]:
        """Its steps without a result: they failed, wait or were not selected."""
        steps = self.record.steps if self.record else []
        return [step.step for step in steps if not step.path and step.kind not in ("report", "push")]

    @cached_property
    def grids(self) -> list[Grid]:
        """The grids of the average over its benchmarks."""
        return find_grids(self.results, self.names)

    @property
    def models_in_grids(self) -> set[str]:
        """The names of the models in its grids."""
        return {model.name for grid in self.grids for models in grid.models.values() for model in models}

    @cached_property
    def benchmark_grids(self) -> list[tuple[str, Grid]]:
        """The name of each benchmark in the average, with a grid under it."""
        columns = self.results.averaged
        return [
            (label, grid)
            for label, column in zip(column_labels(self.results, columns), columns, strict=True)
            for grid in find_grids(self.results, self.names, column)
        ]


def read_own_run(inputs: Mapping[str, Input], config: ReportStage) -> Run:
    """Collect the recipe's own results. Raises UserError if no benchmark scored the configured baseline."""
    steps = {name: step for name, step in inputs.items() if not name.startswith((RUN_PREFIX, PUBLISHED))}
    results = read_results(steps, scales=config.scales)
    baseline = find_baseline(results.models, config.baseline) if results.models or config.baseline else None
    return Run(None, (config.model_name, config.data_name), results, baseline)


def read_joined_runs(inputs: Mapping[str, Input], config: ReportStage) -> list[Run]:
    """Read the other recipes' runs, in the order of the section. Raises UserError if one cannot be read."""
    runs = []
    for entry in config.runs:
        scores, record = read_past_run(inputs[f"{RUN_PREFIX}{entry.run}"].path)
        results = read_results(scores, f"../../{entry.run}", config.scales)
        names = (entry.model_name or (None if entry.data_name else entry.run), entry.data_name)
        runs.append(Run(entry.run, names, results, find_baseline(results.models, None), record))
    return runs


def runs_table(joined: Sequence[Run]) -> Table:
    """One row for each of the other recipes' runs: what the report calls it, its record and its recipe."""
    rows = []
    for run in joined:
        recipe_file = run.record.recipe_file if run.record else ""
        rows.append([Cell(run.name), Cell(f"{run.recipe}/{RUN_RECORD}"), Cell(recipe_file or NO_VALUE)])
    return Table(["shown as", "record, in the runs folder", "recipe"], rows)
