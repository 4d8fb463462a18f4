"""Recipes -> Plan: the steps of all cells and what each needs. Which of them are cached is said in pipeline.cached.

Cells share the steps that do not depend on what they differ in.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.plan.stage_order import in_order, key_of, stages_of
from pipeline.recipe.did_you_mean import did_you_mean
from pipeline.recipe.loader import Recipe, RecipeError
from pipeline.recipe.matrix import join_labels
from pipeline.recipe.nodes import Key, Problem, dotted
from pipeline.store import references
from pipeline.store.hash_cache import HashCache
from pipeline.store.references import BadReferenceError, Local, Reference, RunFolder
from pipeline.store.store import Published
from stages.base import BASE, Need, StageConfig, UserError


@dataclass
class Step:
    """One thing to run: a stage, or the part of a stage that its kind split off."""

    name: str
    stage: str
    config: StageConfig
    inputs: dict[str, Step | Reference]
    recipe: Recipe
    """The cell that it is of, or the first of those that share it."""
    cache: Path
    """Where packages' files lie once they are fetched."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Axis of the matrix -> value, for the axes on which it depends."""
    fingerprint: str | None = None
    """None where an input is on the hub and its commit is not known yet."""
    state: str = "run"
    """`cached` or `run`."""
    why: str = ""
    published: Published | None = None

    @property
    def kind(self) -> str:
        """The kind of stage."""
        return self.config.kind

    @property
    def needs(self) -> list[Step]:
        """The steps whose results it reads."""
        return list({step.name: step for step in self.inputs.values() if isinstance(step, Step)}.values())

    @property
    def with_code(self) -> list[Step | Reference]:
        """The models that it reads with their own Python files."""
        return [self.inputs[name] for name, need in self.config.needs().items() if need.code]

    @property
    def runs_code(self) -> list[str]:
        """What of others' code it runs, as far as can be seen in the recipe and in files that are here."""
        return self.config.foreign_code(self._files)

    @property
    def paid_requests(self) -> list[str]:
        """What it will ask of a service, as far as files that are here tell."""
        try:
            return self.config.paid_requests(self._files)
        except UserError:  # told when it is to run
            return []

    @property
    def _files(self) -> dict[str, Path]:
        sources = {name: source for name, source in self.inputs.items() if not isinstance(source, Step)}
        found = {name: references.find_local(source, self.cache) for name, source in sources.items()}
        return {name: path for name, path in found.items() if path}

    def settings(self) -> dict[str, Any]:
        """Its section of the recipe, resolved, without the references: those count by their content."""
        return self.without_references(self.config.model_dump())

    def without_references(self, dump: dict[str, Any]) -> dict[str, Any]:
        """`dump`, what a section of this kind says, without what refers to inputs and what has no effect on results."""
        dump = copy.deepcopy(dump)
        for key in (
            *(need.key for need in self.config.needs().values()),
            "resources",
            *self.config.fingerprint_exclude,
        ):
            drop(dump, key.split("."))
        return dump


@dataclass(frozen=True)
class Plan:
    """All steps of a recipe, of all its cells, each after those it needs."""

    recipe: Recipe
    """Its first cell."""
    hashes: HashCache
    runs: Path
    """The folder given by --runs, where other recipes' runs lie, too."""
    steps: list[Step] = field(default_factory=list)
    contents: dict[Reference, str | None] = field(default_factory=dict)
    """The content hash of everything found by reference, taken once; None where it is not known yet."""
    where: dict[Reference, str] = field(default_factory=dict)
    """The place and key of the recipe that name it, for errors."""
    later: set[str] = field(default_factory=set)
    """The stages of which a search plans steps only when it has chosen their cells."""
    elsewhere: set[str] = field(default_factory=set)
    """Names that stand for steps of a search's other plans."""

    def named(self, names: Iterable[str], option: str) -> set[str]:
        """The names of the steps of this plan that `names`, stages or steps, stand for. Raises RecipeError."""
        chosen: set[str] = set()
        known: dict[str, set[str]] = {}
        for step in self.steps:
            for name in (step.stage, step.name):
                known.setdefault(name, set()).add(step.name)
        for name in names:
            if name not in known and name not in self.elsewhere:
                has = f"it has {', '.join(sorted(known))}"
                raise RecipeError([f"{option} {name}: the recipe has no such stage{did_you_mean(name, known)}; {has}"])
            chosen |= known.get(name, set())
        return chosen

    def descendants(self, names: set[str]) -> set[str]:
        """`names` and every step that needs one of them, however far down."""
        reached = set(names)
        for step in self.steps:
            if any(need.name in reached for need in step.needs):
                reached.add(step.name)
        return reached

    def require_inputs(self, chosen: set[str]) -> None:
        """Raise RecipeError where a chosen step that runs needs a result that is not there and not chosen."""
        for step in self.steps:
            if step.name in chosen and step.state == "run":
                for need in step.needs:
                    if need.state == "run" and need.name not in chosen:
                        command = f"run-recipe RECIPE --stage {need.stage}"
                        raise RecipeError([f"{step.name} needs {need.name}: {need.why}; make it first by {command}"])

    def require_choice(self, chosen: set[str]) -> None:
        """Raise RecipeError where a search has to choose by a step that has no result and may not run."""
        for step in self.steps if self.later else ():
            if step.state == "run" and step.name not in chosen:
                text = f"{step.name} has no result, and the search needs it to choose; run the recipe without --stage"
                raise RecipeError([text])

    def as_json(self, chosen: set[str]) -> dict[str, Any]:
        """What `--plan --json` prints of the chosen steps."""
        return {
            "recipe": self.recipe.name,
            "steps": [
                {
                    "step": step.name,
                    "kind": step.kind,
                    "fingerprint": step.fingerprint,
                    "state": step.state,
                    "why": step.why,
                    "needs": [need.name for need in step.needs],
                    "runs_code": step.runs_code,
                    "asks": step.paid_requests,
                }
                for step in self.steps
                if step.name in chosen
            ],
        }


def make_plan(recipes: Sequence[Recipe], hashes: HashCache, runs: Path = Path("runs")) -> Plan:
    """The steps of a recipe's cells, not looked up in the store yet. Raises RecipeError for all that is wrong."""
    planner = _Planner(Plan(recipes[0], hashes, runs))
    for recipe in recipes:
        planner.add(recipe, reports=False)
    for recipe in recipes:
        planner.add(recipe, reports=True)
    if planner.problems:
        raise RecipeError([], planner.problems)
    return planner.plan


def ancestors(step: Step) -> set[str]:
    """The names of all steps that `step` needs, however far down."""
    found: set[str] = set()
    waiting = step.needs
    while waiting:
        need = waiting.pop()
        if need.name not in found:
            found.add(need.name)
            waiting += need.needs
    return found


def reference_of(source: Step | Reference) -> Reference:
    """What was found by reference: `source`, or the model that the chain of trainings up to it begins with."""
    while isinstance(source, Step):
        source = source.inputs["model"]
    return source


def start_model_path(source: Step | Reference, paths: dict[Reference, Path]) -> Path | None:
    """Where a source found by reference lies; for a model to be made, the one its chain of trainings begins with, be
    that published or found by reference. None for a step that makes no model."""
    while isinstance(source, Step):
        if source.config.output_kind != "model":
            return None
        if source.published:
            return source.published.path
        source = source.inputs["model"]
    return paths[source]


def step_name(stage: str, suffix: str, labels: Mapping[str, str]) -> str:
    """`bench[wit,prompt=0.2]`: the stage, and in brackets the part of it and the cell."""
    inner = [suffix[1:-1]] if suffix else []
    inner += [join_labels(labels)] if labels else []
    return f"{stage}[{','.join(inner)}]" if inner else stage


def drop(dump: Any, path: list[str]) -> None:
    """Take out of `dump` the value at `path`."""
    *parents, last = path
    for part in parents:  # an earlier section may be shorter
        if isinstance(dump, list):
            dump = dump[int(part)] if part.isdigit() and int(part) < len(dump) else None
        else:
            dump = dump.get(part)
        if dump is None:
            return
    if isinstance(dump, dict):
        dump.pop(last, None)
    elif last.isdigit() and int(last) < len(dump):
        dump[int(last)] = None


@dataclass
class _Planner:
    """Puts the cells of a recipe into a plan, one after the other."""

    plan: Plan
    problems: list[Problem] = field(default_factory=list)
    steps: dict[str, Step] = field(default_factory=dict)
    parts: dict[int, list[_Part]] = field(default_factory=dict)
    """id of a stage's config, which its recipe keeps alive -> what it is split into."""
    claimed: dict[tuple[str, Any], str] = field(default_factory=dict)
    """Kind and value of the key `writes_to` -> the step that writes there."""
    order: dict[int, list[str]] = field(default_factory=dict)
    """id of a recipe -> its stages, each after those it needs."""

    def add(self, recipe: Recipe, reports: bool) -> None:
        """The steps of one cell that no cell before it had: reports, which see the steps of all cells, or the rest."""
        if id(recipe) not in self.order:
            self.order[id(recipe)], problems = in_order(recipe)
            self.problems += recipe.problems + problems
            self._check_broken(recipe)
        made: dict[str, Step] = {}
        axes: dict[str, frozenset[str]] = {}
        for stage in self.order[id(recipe)]:
            if (recipe.stages[stage].output_kind == "report") == reports:
                for part in self._split(recipe, stage):
                    made |= self._step(recipe, stage, part, made, axes)

    def _check_broken(self, recipe: Recipe) -> None:
        """Report wrong references of stages that have other errors."""
        for stage, needs in recipe.broken.items():
            for need in needs:
                try:
                    self._find(recipe, stage, "", need, {}, {}, None)
                except RecipeError as error:
                    self.problems += error.problems

    def _split(self, recipe: Recipe, stage: str) -> list[_Part]:
        config = recipe.stages[stage]
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

    def _step(
        self, recipe: Recipe, stage: str, part: _Part, made: dict[str, Step], axes: dict[str, frozenset[str]]
    ) -> dict[str, Step]:
        """The step of one part of a stage, by the stage's name and suffix."""
        own = recipe.axes.get(stage, frozenset())
        for need in part.needs.values():
            if need.kind == "model":
                own |= recipe.axes[BASE] if need.value == BASE else axes.get(need.value, frozenset())
        axes[stage] = axes.get(stage, frozenset()) | own
        labels = {axis: value for axis, value in recipe.labels.items() if axis in own}
        name = step_name(stage, part.suffix, labels)
        if name not in self.steps:
            inputs: dict[str, Step | Reference] = {}
            for input_name, need in part.needs.items():
                try:
                    inputs |= self._find(recipe, stage, input_name, need, labels, made, inputs.get(need.of))
                except RecipeError as error:
                    self.problems += error.problems
            cache = self.plan.runs / "cache"
            self.steps[name] = Step(name, stage, part.config, inputs, recipe, cache, labels)
            self.plan.steps.append(self.steps[name])
            self._claim(self.steps[name])
        return {stage + part.suffix: self.steps[name]}

    def _claim(self, step: Step) -> None:
        """Note what the step writes elsewhere, and a problem where another one writes there, too."""
        key = step.config.writes_to
        if key and hasattr(step.config, key):  # a wrong one is told already
            there = (step.kind, getattr(step.config, key))
            if (first := self.claimed.setdefault(there, step.name)) != step.name:
                at: Key = ("stages", step.stage, key)
                text = f"{there[1]} is where {first} writes; give each its own, in a matrix by ${{matrix.AXIS}}"
                self.problems.append(Problem(step.recipe.source_map.locate_value(at), at, text))

    def _find(
        self,
        recipe: Recipe,
        stage: str,
        name: str,
        need: Need,
        labels: Mapping[str, str],
        made: dict[str, Step],
        scored: Step | Reference | None,
    ) -> dict[str, Step | Reference]:
        """The inputs that `need` stands for: one, or for `steps` as many as the named stages have steps in all cells
        that agree with `labels`, and that scored the model `scored` if there is one.

        Notes in the plan the content and the place of what is found by reference.
        """
        stages = set(stages_of(recipe, need))
        if need.kind == "steps":
            if not stages and not recipe.broken and not need.optional:
                text = "has nothing to report: the recipe has no stage that scores models, such as lm_eval"
                raise recipe.error(("stages", stage), text)
            for other in stages:
                if (config := recipe.stages.get(other)) and config.output_kind != "scores":
                    raise recipe.error(key_of(stage, need), f"{other!r} is of kind {config.kind} and scores no model")
            found: dict[str, Step | Reference] = {
                step.name: step
                for step in self.plan.steps
                if step.stage in stages
                and all(step.labels.get(axis, value) == value for axis, value in labels.items())
                and scored in (None, step.inputs.get("model"))
            }
            if scored is not None and not found and not recipe.broken:
                assert isinstance(scored, Step)
                text = f"{need.value!r} does not score {scored.stage}; name it among its models"
                raise recipe.error(key_of(stage, need), text)
            return found
        if stages:
            config = recipe.stages.get(need.value)
            if config and config.output_kind != "model":
                raise recipe.error(key_of(stage, need), f"{need.value!r} is of kind {config.kind} and makes no model")
            if need.value not in made:
                return {}  # it is broken, unknown or needs its own result, which is told already
            return {name: made[need.value]}
        key, value = key_of(stage, need), need.value
        if need.kind == "model" and value == BASE:
            if BASE in recipe.broken:
                return {}
            if recipe.model is None:
                raise recipe.error(key, "is 'base', but the recipe names no model; add 'model:' at its top")
            key, value = ("model",), recipe.model
        return {name: self._artifact(recipe, key, value, need)}

    def _artifact(self, recipe: Recipe, key: Key, value: str, need: Need) -> Reference:
        """What the reference `value` names. Raises RecipeError."""
        try:
            if need.kind == "run":
                if value == recipe.name:
                    raise recipe.error(key, f"{value!r} is this recipe itself, whose stages the report shows anyway")
                artifact: Reference = RunFolder((self.plan.runs / value).absolute())
            else:
                kind: Literal["model", "data"] = "model" if need.kind == "model" else "data"
                artifact = references.parse(value, recipe.source_map.locate_value(key).folder, kind)
            if artifact not in self.plan.contents:
                self.plan.contents[artifact] = references.content_hash(artifact, self.plan.hashes.hash_file)
            _check_model(artifact, need)
        except (BadReferenceError, UserError) as error:
            raise recipe.error(key, str(error)) from None
        except OSError as error:  # a name that no file can have
            raise recipe.error(key, f"cannot be looked up: {error.strerror}") from None
        self.plan.where.setdefault(artifact, f"{recipe.source_map.locate_value(key)}: {dotted(key)}")
        return artifact


@dataclass(frozen=True)
class _Part:
    """One of the steps that a stage is made of."""

    suffix: str
    config: StageConfig
    needs: dict[str, Need]
    """With their keys as the whole stage states them, for the place in the recipe."""


def _check_model(artifact: Reference, need: Need) -> None:
    if need.kind != "model" or not isinstance(artifact, Local):
        return
    path: Path = artifact.path
    if path.is_dir() and (path / "adapter_config.json").is_file():
        raise BadReferenceError(f"{path} holds an adapter; merge it into its model (merge_and_unload) and name that")
    if path.is_dir() and not (path / "config.json").is_file():
        raise BadReferenceError(
            f"{path} holds no config.json, so it is no model; name the folder save_pretrained wrote"
        )
    if path.is_file() and path.suffix != ".gguf":
        raise BadReferenceError(f"{path} is a file; a model is a folder written by save_pretrained, or a .gguf file")
