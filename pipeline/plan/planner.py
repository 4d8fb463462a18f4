"""The cells of a recipe -> a Plan. Cells share the steps that do not depend on the axes in which they differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.plan.resolver import Resolver
from pipeline.plan.selection_items import reused_items
from pipeline.plan.stage_order import key_of, order_stages, stages_of
from pipeline.plan.step import Plan, Step
from pipeline.recipe.loader import Recipe, RecipeError
from pipeline.recipe.matrix import join_labels
from pipeline.recipe.nodes import Key, Problem, dotted
from pipeline.store import references
from pipeline.store.references import Local, Reference, RunFolder
from stages.base import BASE, Need, StageConfig, UserError

NAMED_FILE = "file"
"""First word of the name of an input that a file of the step names, and no key of the recipe."""


def build_plan(cells: Sequence[Recipe], resolver: Resolver) -> Plan:
    """Plan the steps of all cells. Raises RecipeError with all problems of the recipe."""
    planner = _Planner(resolver)
    for cell in cells:
        planner.add(cell, reports=False)
    for cell in cells:
        planner.add(cell, reports=True)
    planner.problems += reused_items(planner.steps.values(), resolver)
    if planner.problems:
        raise RecipeError([], planner.problems)
    return Plan(cells[0], tuple(planner.steps.values()))


def step_name(stage: str, suffix: str, labels: Mapping[str, str]) -> str:
    """`bench[wit,prompt=0.2]`: the stage, and in brackets its part and its cell."""
    parts = [suffix[1:-1]] if suffix else []
    parts += [join_labels(labels)] if labels else []
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
    orders: dict[int, list[str]] = field(default_factory=dict)
    """id of a cell -> its stages, each after those it needs."""

    def add(self, recipe: Recipe, reports: bool) -> None:
        """Add the steps that no earlier cell has: only reports, which need the steps of all cells, or all others."""
        if id(recipe) not in self.orders:
            self.orders[id(recipe)], problems = order_stages(recipe)
            self.problems += recipe.problems + problems
            self._check_broken(recipe)
        cell = _CellSteps(recipe)
        for stage in self.orders[id(recipe)]:
            if (recipe.stages[stage].output_kind == "report") == reports:
                for part in self._split(recipe.stages[stage]):
                    cell.by_stage[stage + part.suffix] = self._step(cell, stage, part)

    def _check_broken(self, recipe: Recipe) -> None:
        """Report wrong references of stages that have other errors."""
        for stage, needs in recipe.broken.items():
            for need in needs:
                try:
                    self._inputs(_CellSteps(recipe), stage, "", need, {}, None)
                except RecipeError as error:
                    self.problems += error.problems

    def _split(self, config: StageConfig) -> list[_Part]:
        if id(config) not in self.parts:
            originals = {(need.kind, need.value): need for need in reversed(config.needs().values())}
            self.parts[id(config)] = [
                _Part(
                    suffix,
                    part,
                    {name: originals.get((n.kind, n.value), n) for name, n in part.needs().items()},
                )
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
        labels = {axis: value for axis, value in recipe.labels.items() if axis in axes}
        name = step_name(stage, part.suffix, labels)
        if name not in self.steps:
            inputs: dict[str, Step | Reference] = {}
            for input_name, need in part.needs.items():
                try:
                    inputs |= self._inputs(cell, stage, input_name, need, labels, inputs.get(need.model_need))
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
        self,
        cell: _CellSteps,
        stage: str,
        name: str,
        need: Need,
        labels: Mapping[str, str],
        scored: Step | Reference | None,
    ) -> Mapping[str, Step | Reference]:
        """The inputs that meet `need`: several for `steps`, else one, or none if a problem is reported already."""
        recipe = cell.recipe
        stages = stages_of(recipe, need)
        if need.kind == "steps":
            return self._scoring_steps(recipe, stage, need, stages, labels, scored)
        if stages:
            config = recipe.stages.get(need.value)
            if config and config.output_kind != "model":
                text = f"{need.value!r} is of kind {config.kind} and makes no model"
                raise recipe.error(key_of(stage, need), text)
            return {name: cell.by_stage[need.value]} if need.value in cell.by_stage else {}
        key, value = key_of(stage, need), need.value
        if need.kind == "model" and value == BASE:
            if BASE in recipe.broken:
                return {}
            if recipe.model is None:
                raise recipe.error(key, "is 'base', but the recipe names no model; add 'model:' at its top")
            key, value = ("model",), recipe.model
        return {name: self._reference(recipe, key, value, need)}

    def _scoring_steps(
        self,
        recipe: Recipe,
        stage: str,
        need: Need,
        stages: Sequence[str],
        labels: Mapping[str, str],
        scored: Step | Reference | None,
    ) -> Mapping[str, Step]:
        """The steps of `stages`, in all cells that agree with `labels`, that scored the model `scored` if there is
        one."""
        if not stages and not recipe.broken and not need.optional:
            text = "has nothing to report: the recipe has no stage that scores models, such as lm_eval"
            raise recipe.error(("stages", stage), text)
        for other in stages:
            if (config := recipe.stages.get(other)) and config.output_kind != "scores":
                raise recipe.error(key_of(stage, need), f"{other!r} is of kind {config.kind} and scores no model")
        steps = {
            step.name: step
            for step in self.steps.values()
            if step.stage in stages
            and all(step.labels.get(axis, value) == value for axis, value in labels.items())
            and scored in (None, step.inputs.get("model"))
        }
        if isinstance(scored, Step) and not steps and not recipe.broken:
            text = f"{need.value!r} does not score {scored.stage}; name it among its models"
            raise recipe.error(key_of(stage, need), text)
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
                kind: Literal["model", "data"] = "model" if need.kind == "model" else "data"
                source = references.parse(value, location.folder, kind)
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
