"""The cells of a recipe -> a Plan. Cells share the steps that do not depend on the axes in which they differ."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan, Step
from pipeline.recipe.loader import Recipe, RecipeError
from pipeline.recipe.matrix import join_labels
from pipeline.recipe.nodes import Key, Problem, dotted, split_key
from pipeline.store import references
from pipeline.store.references import Local, Reference, RunFolder
from stages.base import BASE, Items, Need, StageConfig, UserError
from stages.system.did_you_mean import did_you_mean

NAMED_FILE = "file"
"""First word of the name of an input that a file of the step names, and no key of the recipe."""


def build_plan(cells: Sequence[Recipe], resolver: Resolver) -> Plan:
    """Plan the steps of all cells. Raises RecipeError with all problems of the recipe."""
    planner = _Planner(resolver)
    for recipe in cells:
        planner.add(recipe)
    for cell, stage in planner.reports:
        planner.add_stage(cell, stage)
    planner.problems += planner.reused_items()
    if planner.problems:
        raise RecipeError([], planner.problems)
    return Plan(cells[0], tuple(planner.steps.values()))


def step_name(stage: str, suffix: str, labels: Mapping[str, str]) -> str:
    """`bench[wit,prompt=0.2]`: the stage, and in brackets its part and its cell."""
    parts = [part for part in (suffix[1:-1], join_labels(labels)) if part]
    return f"{stage}[{','.join(parts)}]" if parts else stage


@dataclass(frozen=True)
class _Part:
    """One of the steps of a stage."""

    suffix: str
    config: StageConfig
    needs: dict[str, Need]
    """With the keys of the whole stage's needs, for locations in the recipe."""


@dataclass
class _CellSteps:
    """The steps of one cell as far as they are planned."""

    recipe: Recipe
    by_stage: dict[str, Step] = field(default_factory=dict)
    """Name of a stage, with the suffix of a part -> step."""
    axes: dict[str, frozenset[str]] = field(default_factory=dict)
    """Stage -> the axes on which its steps depend."""

    def labels(self, stage: str) -> dict[str, str]:
        """The axes on which the steps of a stage depend -> the values of this cell."""
        return {axis: value for axis, value in self.recipe.labels.items() if axis in self.axes.get(stage, ())}


@dataclass
class _Planner:
    """Adds the cells of a recipe one after the other."""

    resolver: Resolver
    problems: list[Problem] = field(default_factory=list)
    steps: dict[str, Step] = field(default_factory=dict)
    parts: dict[int, list[_Part]] = field(default_factory=dict)
    """id of a stage's config, which its recipe keeps alive -> its parts."""
    targets: dict[tuple[str, Any], str] = field(default_factory=dict)
    """Kind and value of the key `writes_to` -> the step that writes there."""
    reports: list[tuple[_CellSteps, str]] = field(default_factory=list)
    """The stages still to be added, because they need the steps of all cells."""

    def add(self, recipe: Recipe) -> None:
        """Add the steps that no earlier cell has, except for reports."""
        order, problems = _order_stages(recipe)
        self.problems += recipe.problems + problems
        self._check_broken(recipe)
        cell = _CellSteps(recipe)
        for stage in order:
            if recipe.stages[stage].output_kind == "report":
                self.reports.append((cell, stage))
            else:
                self.add_stage(cell, stage)

    def add_stage(self, cell: _CellSteps, stage: str) -> None:
        """Add the steps of a stage, whose models and other stages have theirs."""
        for part in self._split(cell.recipe.stages[stage]):
            cell.by_stage[stage + part.suffix] = self._step(cell, stage, part)

    def reused_items(self) -> Iterator[Problem]:
        """Yield a problem for each training that chooses its best point by items on which a stage of the recipe scores
        a model: that score would be inflated."""
        reporting = {
            self._identity(step, items): f"stages.{step.stage}.{items.key}"
            for step in self.steps.values()
            if step.config.output_kind == "scores"
            for items in step.config.measured_items()
        }
        for step in (step for step in self.steps.values() if step.config.output_kind == "model"):
            for items in step.config.measured_items():
                if place := reporting.get(self._identity(step, items)):
                    text = f"select chooses by these items, and {place} reports a score on them"
                    key = ("stages", step.stage, *split_key(items.key))
                    yield step.recipe.problem(key, f"{text}, which would be inflated; name other items")

    def _identity(self, step: Step, items: Items) -> tuple[object, str]:
        """What two sets of the same items have in common."""
        source = step.inputs.get(items.input) if items.input else None
        content = None if source is None or isinstance(source, Step) else self.resolver.content(source)
        return content or source, items.part

    def _check_broken(self, recipe: Recipe) -> None:
        """Report wrong references of stages that have other errors."""
        for stage, needs in recipe.broken.items():
            for need in needs:
                try:
                    self._inputs(_CellSteps(recipe), stage, "", need)
                except RecipeError as error:
                    self.problems += error.problems

    def _split(self, config: StageConfig) -> list[_Part]:
        if id(config) not in self.parts:
            originals = {(need.kind, need.value): need for need in reversed(config.needs().values())}
            self.parts[id(config)] = [
                _Part(suffix, part, {name: originals.get((n.kind, n.value), n) for name, n in part.needs().items()})
                for suffix, part in config.split().items()
            ]
        return self.parts[id(config)]

    def _step(self, cell: _CellSteps, stage: str, part: _Part) -> Step:
        recipe = cell.recipe
        axes = cell.axes.get(stage, frozenset()) | recipe.axes.get(stage, frozenset())
        for need in part.needs.values():
            if need.kind == "model":
                axes |= recipe.axes[BASE] if need.value == BASE else cell.axes.get(need.value, frozenset())
        cell.axes[stage] = axes
        labels = cell.labels(stage)
        name = step_name(stage, part.suffix, labels)
        if name not in self.steps:
            inputs: dict[str, Step | Reference] = {}
            for input_name, need in part.needs.items():
                try:
                    inputs |= self._inputs(cell, stage, input_name, need, inputs.get(need.model_need))
                except RecipeError as error:
                    self.problems += error.problems
            local = {key: source.path for key, source in inputs.items() if isinstance(source, Local)}
            try:
                for file_name, path in part.config.named_files(local).items():
                    self.resolver.register(Local(path), f"stages.{stage}")
                    inputs[f"{NAMED_FILE} {file_name}"] = Local(path)
            except UserError as error:
                self.problems.append(recipe.problem(("stages", stage), str(error)))
            self.steps[name] = Step(name, stage, part.config, inputs, recipe, labels)
            self._check_target(self.steps[name])
        return self.steps[name]

    def _check_target(self, step: Step) -> None:
        """Two steps must not write to the same place outside the store."""
        if key := step.config.writes_to:
            target = (step.kind, getattr(step.config, key))
            if (first := self.targets.setdefault(target, step.name)) != step.name:
                text = f"{target[1]} is where {first} writes; give each its own, in a matrix by ${{matrix.AXIS}}"
                self.problems.append(step.recipe.problem(("stages", step.stage, key), text))

    def _inputs(
        self, cell: _CellSteps, stage: str, name: str, need: Need, scored: Step | Reference | None = None
    ) -> Mapping[str, Step | Reference]:
        """The inputs that meet `need`: several for `steps`, else one, or none if a problem is reported already."""
        recipe = cell.recipe
        if need.kind == "steps":
            return self._scoring_steps(cell, stage, need, scored)
        if stages_of(recipe, need):
            config = recipe.stages.get(need.value)
            if config and config.output_kind != "model":
                text = f"{need.value!r} is of kind {config.kind} and makes no model"
                raise recipe.error(_key_of(stage, need), text)
            return {name: cell.by_stage[need.value]} if need.value in cell.by_stage else {}
        key, value = _key_of(stage, need), need.value
        if need.kind == "model" and value == BASE:
            if BASE in recipe.broken:
                return {}
            if recipe.model is None:
                raise recipe.error(key, "is 'base', but the recipe names no model; add 'model:' at its top")
            key, value = ("model",), recipe.model
        return {name: self._reference(recipe, key, value, need)}

    def _scoring_steps(
        self, cell: _CellSteps, stage: str, need: Need, scored: Step | Reference | None
    ) -> Mapping[str, Step]:
        """The steps that `need` names, in all cells that agree with the labels of `stage`, that scored the model
        `scored` if there is one."""
        recipe, labels, stages = cell.recipe, cell.labels(stage), stages_of(cell.recipe, need)
        if not stages and not recipe.broken and not need.optional:
            text = "has nothing to report: the recipe has no stage that scores models, such as lm_eval"
            raise recipe.error(("stages", stage), text)
        for other in stages:
            if (config := recipe.stages.get(other)) and config.output_kind != "scores":
                raise recipe.error(_key_of(stage, need), f"{other!r} is of kind {config.kind} and scores no model")
        steps = {
            step.name: step
            for step in self.steps.values()
            if step.stage in stages
            and all(step.labels.get(axis, value) == value for axis, value in labels.items())
            and scored in (None, step.inputs.get("model"))
        }
        if isinstance(scored, Step) and not steps and not recipe.broken:
            text = f"{need.value!r} does not score {scored.stage}; name it among its models"
            raise recipe.error(_key_of(stage, need), text)
        return steps

    def _reference(self, recipe: Recipe, key: Key, value: str, need: Need) -> Reference:
        """Parse and register the reference `value`. Raises RecipeError."""
        location = recipe.source_map.locate_value(key)
        try:
            if need.kind == "run":
                if value == recipe.name:
                    raise recipe.error(key, f"{value!r} is this recipe itself, whose stages the report shows anyway")
                source: Reference = RunFolder((self.resolver.runs / value).absolute())
            else:
                source = references.parse(value, location.folder, "model" if need.kind == "model" else "data")
            self.resolver.register(source, f"{location}: {dotted(key)}")
            if need.kind == "model" and isinstance(source, Local):
                _check_model_path(source.path)
        except UserError as error:
            raise recipe.error(key, str(error)) from None
        except OSError as error:  # a name that no file can have
            raise recipe.error(key, f"cannot be looked up: {error.strerror}") from None
        return source


def _check_model_path(path: Path) -> None:
    """Raise UserError if `path` cannot be a model."""
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise UserError(f"{path} holds an adapter; merge it into its model (merge_and_unload) and name that")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path} has no config.json, so it is no model; name the folder save_pretrained wrote")
    if path.is_file() and path.suffix != ".gguf":
        raise UserError(f"{path} is a file; a model is a folder written by save_pretrained, or a .gguf file")


def stages_of(recipe: Recipe, need: Need) -> list[str]:
    """Return the stages whose steps `need` refers to."""
    if need.kind == "steps" and need.value == "*":
        return [name for name, config in recipe.stages.items() if config.output_kind == "scores"]
    if need.kind == "model" and need.value != BASE:
        exists = need.value in recipe.stages or need.value in recipe.broken
        return [need.value] if exists or _is_stage_name(need.value) else []
    return [need.value] if need.kind == "steps" else []


def _is_stage_name(reference: str) -> bool:
    """Whether a model reference can only be a stage: hub ids and paths have a slash."""
    return re.fullmatch(r"[\w-]+(\[.*\])?", reference) is not None


def _order_stages(recipe: Recipe) -> tuple[list[str], list[Problem]]:
    """Return the stages in order, and a problem for each unknown stage and each cycle."""
    needed: dict[str, list[str]] = {}
    problems: list[Problem] = []
    needs = {name: list(config.needs().values()) for name, config in recipe.stages.items()}
    for name, stage_needs in [*needs.items(), *recipe.broken.items()]:
        needed[name] = []
        for need in stage_needs:
            for other in stages_of(recipe, need):
                if other in recipe.stages:
                    needed[name].append(other)
                elif other not in recipe.broken:
                    problems.append(_unknown_stage(recipe, name, need, other))
    order: dict[str | None, None] = {}
    path: dict[str | None, Iterator[str]] = {None: iter(needed)}  # depth first, from a root that needs all stages
    while path:  # graphlib would stop at the first cycle, and its order is not that of the recipe
        last = next(reversed(path))
        if (stage := next(path[last], None)) is None:
            order[last] = None
            del path[last]
        elif stage in path:
            cycle = list(map(str, path))[list(path).index(stage) :]
            text = f"needs its own result: {' -> '.join([*cycle, stage])}; start one of them from another model"
            problems.append(recipe.problem(("stages", stage), text))
        elif stage not in order:
            path[stage] = iter(needed[stage])
    return [name for name in order if name in recipe.stages], problems


def _unknown_stage(recipe: Recipe, stage: str, need: Need, other: str) -> Problem:
    hint = did_you_mean(other, [BASE, *recipe.stages, *sorted(recipe.broken)])
    text = f"{other!r} is no stage of this recipe{hint}"
    if need.kind == "model":
        text += "; a model on the hub is written org/name, a folder ./name"
    return recipe.problem(_key_of(stage, need), text)


def _key_of(stage: str, need: Need) -> Key:
    """The key in the recipe where `need` of `stage` is written."""
    return ("stages", stage, *split_key(need.key))
