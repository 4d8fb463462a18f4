"""Successive halving over the cells of a matrix: a sequence of plans, each chosen by the results of the previous one.

Each rung is an ordinary plan of the remaining cells with their training shortened, and of all earlier rungs; so a
search is cached and resumed as any grid is. The last rung is the recipe itself, for the remaining cells.
"""

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from pipeline.plan.planner import build_plan, stages_of, step_name
from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan
from pipeline.recipe.loader import Halving, Recipe
from pipeline.recipe.matrix import join_labels
from pipeline.recipe.nodes import Key, Problem
from pipeline.store.store import Published
from stages.system.did_you_mean import did_you_mean, list_choices

AXIS = "search"
"""The axis that shortened steps have beside those of the matrix: the share of the training, `search=1/16`."""
SEARCH_FILE = "search.csv"
"""In the run's folder: the value of each candidate on each rung."""
MAX_NAMED = 5
"""Number of candidates that a line names."""

Candidates = dict[str, list[Recipe]]
"""Name of a candidate's step at full length -> its cells."""


def search_problems(cells: Sequence[Recipe]) -> list[Problem]:
    """Check the `search` section of a recipe, as far as that is possible before it is planned."""
    recipe, search = cells[0], cells[0].search
    if search is None:
        return []
    if not recipe.labels:
        return [recipe.problem(("search",), "chooses among the cells of a matrix; add 'matrix', or leave it out")]
    if any(cell.search != search for cell in cells):
        return [recipe.problem(("search",), "is not the same for all cells of the matrix")]
    problems: dict[Key, str] = {}
    if AXIS in recipe.labels:
        problems["matrix", AXIS] = "is the name that a search uses; rename the axis"
    for index, axis in enumerate(search.over):
        if axis not in recipe.labels:
            hint = did_you_mean(axis, recipe.labels) + list_choices("it has", recipe.labels)
            problems["search", "over", index] = f"{axis!r} is no axis of the matrix{hint}"
    name, stage = search.stage, recipe.stages.get(search.stage)
    if stage is None:
        if name not in recipe.broken:
            hint = did_you_mean(name, recipe.stages)
            problems["search", "stage"] = f"{name!r} is no stage of this recipe{hint}"
    elif not (metrics := stage.search_metrics):
        text = f"{name!r} is of kind {stage.kind}, whose training cannot be shortened; name one that trains"
        problems["search", "stage"] = text
    elif search.metric is not None and search.metric not in metrics:
        hint = did_you_mean(search.metric, metrics) + list_choices("name one of", metrics)
        problems["search", "metric"] = f"{search.metric!r} is nothing to compare cells by{hint}"
    elif "eval" not in stage.needs():
        problems["search",] = f"compares by a metric on evaluation data; add stages.{name}.data.eval"
    return [recipe.problem(key, text) for key, text in problems.items()]


def rank(values: Mapping[str, float], goal: str) -> list[str]:
    """Sort the candidates, best first, ties in their order. `goal` is `lowest` or `highest`."""
    return sorted(values, key=lambda candidate: values[candidate], reverse=goal == "highest")


def search_cost(candidates: int, halving: Halving) -> Fraction:
    cost = Fraction(0)
    for length in halving.lengths:
        cost, candidates = cost + candidates * length, halving.survivors(candidates)
    return cost


def cost_sentence(full_plan: Plan) -> str | None:
    """How much of the plan of all cells a search runs; None without a search."""
    if halving := full_plan.recipe.search:
        count = len([step for step in full_plan.steps if step.stage == halving.stage])
        share = f"about {float(search_cost(count, halving)):.1f} of {count} trainings of {halving.stage}"
        return f"search: {share}, and later stages for the best cells only; the figures below are for all cells"
    return None


@dataclass
class Search:
    """The plans of a recipe to run one after the other: without a `search` only that of all cells."""

    full_plan: Plan
    """The plan of all cells."""
    cells: Sequence[Recipe]
    resolver: Resolver
    say: Callable[[str], None]
    """Shows a line about each rung to the user."""
    folder: Path | None = None
    """The run's folder, for SEARCH_FILE; None writes no file."""
    planned: dict[str, list[Recipe]] = field(default_factory=dict)
    """Step of a candidate on a rung -> its cells, for all rungs so far and candidates that did not fail."""
    results: dict[str, Published] = field(default_factory=dict)
    """The results of each plan's steps. The caller adds them before it asks for the next plan."""
    rows: list[dict[str, str]] = field(default_factory=list)
    """The rows of SEARCH_FILE."""

    @cached_property
    def halving(self) -> Halving:
        assert self.cells[0].search
        return self.cells[0].search

    @cached_property
    def metric(self) -> tuple[str, str]:
        """The metric to compare by, and which of its values is best."""
        goals = self.cells[0].stages[self.halving.stage].search_metrics
        name = self.halving.metric or next(iter(goals))
        return name, goals[name]

    @cached_property
    def all_names(self) -> frozenset[str]:
        """The names of all steps and stages that any plan of the search can have."""
        steps, lengths = self.full_plan.steps, self.halving.lengths
        names = {name for step in steps for name in (step.name, step.stage)}
        candidates = (step.name for step in steps if step.stage == self.halving.stage)
        return frozenset(names) | {_rung_step(name, length) for name in candidates for length in lengths}

    def plans(self) -> Iterator[Plan]:
        if self.cells[0].search is None:
            yield self.full_plan
            return
        groups, (metric, goal), stage = self.groups(), self.metric, self.halving.stage
        for number, length in enumerate(self.halving.lengths, 1):
            count = sum(map(len, groups.values()))
            share = "" if length == 1 else f" at {length} of the training"
            trainings = f"{count} trainings of {stage}{share}, by {metric} ({goal})"
            self.say(f"search: rung {number} of {self.halving.rungs}: {trainings}")
            yield self.plan(groups, length)
            remaining = {name: self.best(name, group, length) for name, group in groups.items()}
            groups = {name: group for name, group in remaining.items() if group}
            if self.folder:
                self.write(self.folder)
            if not groups:
                return

    def groups(self) -> dict[str, Candidates]:
        """The candidates of each combination of the other axes. Raises RecipeError if an axis of the search has no
        effect."""
        steps = [step for step in self.full_plan.steps if step.stage == self.halving.stage]
        axes = steps[0].labels
        for index, axis in enumerate(self.halving.over):
            if axis not in axes:
                text = f"{axis!r} changes nothing in the training of {self.halving.stage}; leave it out"
                raise self.cells[0].error(("search", "over", index), text)
        over = self.halving.over or list(axes)
        groups: dict[str, Candidates] = {}
        for cell in self.cells:
            labels = {axis: cell.labels[axis] for axis in axes}
            group = join_labels({axis: value for axis, value in labels.items() if axis not in over})
            candidate = step_name(self.halving.stage, "", labels)
            groups.setdefault(group, {}).setdefault(candidate, []).append(cell)
        return groups

    def plan(self, groups: Mapping[str, Candidates], length: Fraction) -> Plan:
        """The plan of a rung and of all earlier ones."""
        for group in groups.values():
            for candidate, cells in group.items():
                short = cells if length == 1 else [self.shortened(cells[0], length)]
                self.planned[_rung_step(candidate, length)] = short
        plan = build_plan([cell for cells in self.planned.values() for cell in cells], self.resolver)
        later = self.cells[0].stages.keys() - {step.stage for step in plan.steps}
        return replace(plan, later_stages=frozenset(later), other_names=self.all_names)

    def shortened(self, cell: Recipe, length: Fraction) -> Recipe:
        """The cell with only the shortened training and the stages that it starts from."""
        stage = self.halving.stage
        names, queue = dict.fromkeys([stage]), [stage]
        while queue:
            for need in cell.stages[queue.pop()].needs().values():
                sources = [name for name in stages_of(cell, need) if name not in names]
                names |= dict.fromkeys(sources)
                queue += sources
        stages = {name: cell.stages[name] for name in names}
        stages[stage] = stages[stage].shortened(length)
        axes = {**cell.axes, stage: cell.axes[stage] | {AXIS}}
        return replace(cell, stages=stages, labels={**cell.labels, AXIS: str(length)}, axes=axes)

    def best(self, name: str, group: Candidates, length: Fraction) -> Candidates:
        """The candidates of a group that stay in the search. Adds rows to SEARCH_FILE and reports them."""
        metric, goal = self.metric
        values: dict[str, float] = {}
        for candidate in group:
            step = _rung_step(candidate, length)
            value = self.results[step].manifest.metrics.number(metric) if step in self.results else None
            if value is not None:
                values[candidate] = value
            else:  # a failed training is not repeated within one command
                del self.planned[step]
        order = rank(values, goal)
        best = order[: 1 if length == 1 else self.halving.survivors(len(group))]
        for candidate in [*order, *(failed for failed in group if failed not in values)]:
            text = repr(values[candidate]) if candidate in values else "failed"
            row = {"search": name, "length": str(length), "step": _rung_step(candidate, length), metric: text}
            self.rows.append(row | {"kept": "yes" if candidate in best else "no"})
        title = f"search ({name})" if name else "search"
        shown = ", ".join(f"{candidate} {values[candidate]:.4g}" for candidate in order[:MAX_NAMED])
        shown += f", and {len(order) - MAX_NAMED} more" if len(order) > MAX_NAMED else ""
        if not order:
            self.say(f"{title}: every candidate failed")
        else:
            chosen = f"{best[0]} is best" if length == 1 else f"{len(best)} continue, the best"
            self.say(f"{title}: {chosen} by {metric}: {shown}")
        return {candidate: group[candidate] for candidate in group if candidate in best}

    def write(self, folder: Path) -> None:
        """Write SEARCH_FILE. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{SEARCH_FILE}.{os.getpid()}"
        with temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(self.rows[0]))
            rows.writeheader()
            rows.writerows(self.rows)
        temporary.replace(folder / SEARCH_FILE)


def _rung_step(candidate: str, length: Fraction) -> str:
    """The name of a candidate's step on the rung of that length."""
    return candidate if length == 1 else f"{candidate[:-1]},{AXIS}={length}]"
