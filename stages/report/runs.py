"""What a report shows, run by run: the recipe's own results, and those of other recipes' runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from stages.base import Input
from stages.records.past_runs import read_past_run
from stages.report.averages import averaged
from stages.report.config import PUBLISHED, RUN, ReportStage
from stages.report.grid import Called, Panel, panels
from stages.report.results import Model, Results, find_baseline, read
from stages.report.tables import column_labels


@dataclass(frozen=True)
class Part:
    """One run."""

    run: str | None
    """The recipe's name; None for the report's own."""
    called: Called
    """What to call its model and its data."""
    results: Results
    baseline: Model | None
    grids: list[Panel]
    """Of the average over its benchmarks."""
    missing: list[str]
    """Its steps that have no result."""

    @property
    def name(self) -> str:
        """What to call it where it has no grid."""
        return ", ".join(filter(None, self.called)) or self.run or ""

    @cached_property
    def by_benchmark(self) -> list[tuple[str, Panel]]:
        """The grids under each benchmark that the average is made of, with the benchmark's name."""
        columns = averaged(self.results)
        labels = column_labels(self.results, columns, with_metric=False)
        return [
            (label, panel)
            for label, column in zip(labels, columns, strict=True)
            for panel in panels(self.results, column, self.called)
        ]


def own_part(inputs: Mapping[str, Input], config: ReportStage) -> Part:
    """The recipe's own results. Raises UserError for a baseline that was not measured."""
    results = read({name: given for name, given in inputs.items() if not name.startswith((RUN, PUBLISHED))})
    baseline = find_baseline(results.models, config.baseline) if results.models or config.baseline else None
    called = (config.model_name, config.data_name)
    return Part(None, called, results, baseline, panels(results, called=called), [])


def joined_parts(inputs: Mapping[str, Input], config: ReportStage) -> list[Part]:
    """The results of the runs that are joined, in the order of the recipe. Raises UserError."""
    parts = []
    for each in config.runs:
        ran = read_past_run(inputs[f"{RUN}{each.run}"].path)
        results = read(ran.scores, f"../../{each.run}")
        called = (each.model_name or (None if each.data_name else each.run), each.data_name)
        grids = panels(results, called=called)
        parts.append(Part(each.run, called, results, find_baseline(results.models, None), grids, ran.missing))
    return parts
