"""A recipe with a `search` -> one plan after the other: each says what to run next, given what the last one showed.

Every rung is an ordinary plan of the cells that are left, their training shortened, and of all rungs before it; so a
search is cached, resumed and told of as any grid is. The last rung is the recipe itself, of the cells that are left.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from pipeline.console.console import Console
from pipeline.plan.planner import Plan, make_plan, step_name
from pipeline.plan.stage_order import stages_of
from pipeline.recipe.did_you_mean import did_you_mean, list_choices
from pipeline.recipe.loader import Recipe
from pipeline.recipe.matrix import join_labels
from pipeline.recipe.nodes import Problem
from pipeline.recipe.search_config import Halving, rank, search_cost

LABEL = "search"
"""The axis that a shortened step has beside those of the matrix: the part of its training, `search=1/16`."""
FILE = "search.csv"
"""In the run's folder: how every candidate did on every rung."""
SHOWN = 5
"""How many candidates a line names."""

Groups = dict[str, dict[str, list[Recipe]]]
"""The axes that are not searched over, described -> candidate, by the name of its step -> its cells."""


def problems_of(cells: Sequence[Recipe]) -> list[Problem]:
    """What is wrong with the `search` of a recipe, as far as can be told before it is planned."""
    recipe, search = cells[0], cells[0].search
    if search is None or recipe.broken:
        return []
    if not recipe.labels:
        return [recipe.problem(("search",), "chooses among the cells of a matrix; add 'matrix', or leave it out")]
    if any(cell.search != search for cell in cells):
        return [recipe.problem(("search",), "is not the same for all cells of the matrix")]
    found = []
    if LABEL in recipe.labels:
        found.append(recipe.problem(("matrix", LABEL), "has the name of what a search adds; call the axis otherwise"))
    for index, axis in enumerate(search.over):
        if axis not in recipe.labels:
            hint = did_you_mean(axis, recipe.labels) + list_choices("it has", recipe.labels)
            text = f"{axis!r} is no axis of the matrix{hint}"
            found.append(recipe.problem(("search", "over", index), text))
    stage = recipe.stages.get(search.stage)
    if stage is None:
        text = f"{search.stage!r} is no stage of this recipe{did_you_mean(search.stage, recipe.stages)}"
        found.append(recipe.problem(("search", "stage"), text))
    elif not stage.search_metrics:
        text = f"{search.stage!r} is of kind {stage.kind}, whose training cannot be shortened; name one that trains"
        found.append(recipe.problem(("search", "stage"), text))
    elif search.metric is not None and search.metric not in stage.search_metrics:
        known = stage.search_metrics
        hint = did_you_mean(search.metric, known) + list_choices("name one of", known)
        text = f"{search.metric!r} is nothing to compare cells by{hint}"
        found.append(recipe.problem(("search", "metric"), text))
    elif "eval" not in stage.needs():
        text = f"compares by what is measured on evaluation data; name them as stages.{search.stage}.data.eval"
        found.append(recipe.problem(("search",), text))
    return found


def plans(whole: Plan, cells: Sequence[Recipe], console: Console, folder: Path | None) -> Iterator[Plan]:
    """The plans to carry out one after the other: the next may be asked for when the last one's steps have run.

    Args:
        whole: the plan of all cells; without a `search` the only one.
        cells: the recipe's.
        console: is told of each rung, and of what it showed.
        folder: the run's, where FILE is left; None leaves nothing.
    """
    if cells[0].search is None:
        yield whole
    else:
        yield from _Search(whole, cells, cells[0].search, console, folder).plans()


def say_share(whole: Plan, console: Console) -> None:
    """Tell, of a recipe with a `search`, how much of `whole`, the plan of all cells, that runs."""
    if halving := whole.recipe.search:
        count = len([step for step in whole.steps if step.stage == halving.stage])
        share = f"about {float(search_cost(count, halving)):.1f} of {count} trainings of {halving.stage}"
        console.say(f"search: {share}, and what follows for the best alone; what is told is of all cells")


@dataclass
class _Search:
    whole: Plan
    cells: Sequence[Recipe]
    halving: Halving
    console: Console
    folder: Path | None
    made: dict[str, list[Recipe]] = field(default_factory=dict)
    """The candidates of all rungs so far that did not fail, by their steps: their cells, shortened below the last rung.
    """
    told: list[dict[str, str]] = field(default_factory=list)
    """The rows of FILE."""

    @property
    def stage(self) -> str:
        return self.halving.stage

    @property
    def search_metrics(self) -> tuple[str, str]:
        """The metric, and which of its values is best."""
        known = self.cells[0].stages[self.stage].search_metrics
        metric = self.halving.metric or next(iter(known))
        return metric, known[metric]

    @cached_property
    def names(self) -> set[str]:
        """Of all steps and stages that any of the plans may have."""
        steps = self.whole.steps
        trainings = [step.name for step in steps if step.stage == self.stage]
        names = {name for step in steps for name in (step.name, step.stage)}
        return names | {self.at(name, length) for name in trainings for length in self.halving.lengths}

    def plans(self) -> Iterator[Plan]:
        groups, (metric, goal) = self.groups(), self.search_metrics
        for number, length in enumerate(self.halving.lengths, 1):
            count = sum(map(len, groups.values()))
            of = "" if length == 1 else f" at {length} of the training"
            text = f"search: rung {number} of {self.halving.rungs}: {count} of {self.stage}{of}, by {metric} ({goal})"
            self.console.say(text)
            plan = self.plan(groups, length)
            yield plan
            groups = {name: kept for name, group in groups.items() if (kept := self.best(name, group, plan, length))}
            if self.folder:
                self.write(self.folder)
            if not groups:
                return

    def groups(self) -> Groups:
        """All candidates. Raises RecipeError where the search is over what does not change the training."""
        found: Groups = {}
        steps = {step.name: step for step in self.whole.steps if step.stage == self.stage}
        axes = next(iter(steps.values())).labels
        for index, axis in enumerate(self.halving.over):
            if axis not in axes:
                text = f"{axis!r} changes nothing in the training of {self.stage}; leave it out"
                raise self.cells[0].error(("search", "over", index), text)
        over = self.halving.over or list(axes)
        for cell in self.cells:
            labels = {axis: cell.labels[axis] for axis in axes}
            group = join_labels({axis: value for axis, value in labels.items() if axis not in over})
            found.setdefault(group, {}).setdefault(step_name(self.stage, "", labels), []).append(cell)
        return found

    def plan(self, groups: Groups, length: Fraction) -> Plan:
        """The plan of a rung, and of those before it."""
        for candidate, cells in (item for group in groups.values() for item in group.items()):
            short = cells if length == 1 else [self.shortened(cells[0], length)]
            self.made[self.at(candidate, length)] = short
        plan = make_plan([cell for cells in self.made.values() for cell in cells], self.whole.hashes, self.whole.runs)
        plan.later.update(self.cells[0].stages.keys() - {step.stage for step in plan.steps})
        plan.elsewhere.update(self.names)
        return plan

    def shortened(self, cell: Recipe, length: Fraction) -> Recipe:
        """The cell with nothing but the shortened training and what that starts from."""
        names, waiting = dict.fromkeys([self.stage]), [self.stage]
        while waiting:
            for need in cell.stages[waiting.pop()].needs().values():
                further = [name for name in stages_of(cell, need) if name not in names]
                names |= dict.fromkeys(further)
                waiting += further
        stages = {name: cell.stages[name] for name in names}
        stages[self.stage] = stages[self.stage].shortened(length)
        axes = {**cell.axes, self.stage: cell.axes[self.stage] | {LABEL}}
        return replace(cell, stages=stages, labels={**cell.labels, LABEL: str(length)}, axes=axes)

    def best(self, name: str, group: dict[str, list[Recipe]], plan: Plan, length: Fraction) -> dict[str, list[Recipe]]:
        """Those of a group that go on, told to the console and noted for FILE."""
        metric, goal = self.search_metrics
        steps = {step.name: step for step in plan.steps}
        values: dict[str, float] = {}
        for candidate in group:
            step = steps[self.at(candidate, length)]
            if step.published:
                values[candidate] = step.published.manifest["metrics"][metric]
            else:  # it is not tried again before the command is
                del self.made[step.name]
        order = rank(values, goal)
        kept = order[: 1 if length == 1 else self.halving.survivors(len(group))]
        for candidate in [*order, *(each for each in group if each not in values)]:
            value = repr(values[candidate]) if candidate in values else "failed"
            row = {"search": name, "length": str(length), "step": self.at(candidate, length), metric: value}
            self.told.append(row | {"kept": "yes" if candidate in kept else "no"})
        self.tell(f"search{f' ({name})' if name else ''}", {each: values[each] for each in order}, kept, length)
        return {candidate: group[candidate] for candidate in group if candidate in kept}

    def tell(self, search: str, values: dict[str, float], kept: list[str], length: Fraction) -> None:
        """What a rung showed, in a line; `values` are those that did not fail, best first."""
        best = ", ".join(f"{each} {value:.4g}" for each, value in list(values.items())[:SHOWN])
        best += f", and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
        if not values:
            self.console.say(f"{search}: every candidate failed")
        elif length == 1:
            self.console.say(f"{search}: {kept[0]} is best by {self.search_metrics[0]}: {best}")
        else:
            self.console.say(f"{search}: {len(kept)} go on, the best by {self.search_metrics[0]}: {best}")

    def at(self, candidate: str, length: Fraction) -> str:
        """The name of a candidate's step on the rung of that length."""
        return candidate if length == 1 else f"{candidate[:-1]},{LABEL}={length}]"

    def write(self, folder: Path) -> None:
        """Leave FILE. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{FILE}.{os.getpid()}"
        with temporary.open("w", encoding="utf-8", newline="") as file:
            rows = csv.DictWriter(file, list(self.told[0]))
            rows.writeheader()
            rows.writerows(self.told)
        temporary.replace(folder / FILE)
