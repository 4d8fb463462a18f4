"""Steps and plans. Both are immutable: a plan says what exists in a recipe, not what is cached or how a run goes."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any

from pipeline.recipe.loader import Recipe, RecipeError
from pipeline.recipe.nodes import item_of
from pipeline.store.references import Reference
from stages.base import StageConfig
from stages.system.did_you_mean import did_you_mean


@dataclass(frozen=True, eq=False)
class Step:
    """A unit of work with a result of its own: a stage of one cell, or one of the parts that its kind splits it
    into."""

    name: str
    stage: str
    config: StageConfig
    inputs: "Mapping[str, Step | Reference]"
    recipe: Recipe
    """Its cell of the recipe, or the first of the cells that share it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """The axes of the matrix on which it depends -> the values of its cell."""

    @property
    def kind(self) -> str:
        return self.config.kind

    @cached_property
    def dependencies(self) -> "Sequence[Step]":
        return list({step.name: step for step in self.inputs.values() if isinstance(step, Step)}.values())

    @property
    def references(self) -> dict[str, Reference]:
        """Input name -> reference, for inputs that are not steps."""
        return {name: source for name, source in self.inputs.items() if not isinstance(source, Step)}

    @property
    def models_with_code(self) -> "list[Step | Reference]":
        """The models whose own Python files it runs."""
        return [self.inputs[name] for name, need in self.config.needs().items() if need.code]

    def settings(self, section: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the part of the stage's section that decides its result. References count by their content instead.

        Args:
            section: another section of this kind, such as that of an earlier result; the default is the step's own.
        """
        settings = copy.deepcopy(dict(section)) if section is not None else self.config.model_dump()
        references = [need.key for need in self.config.needs().values()]
        for key in (*references, "resources", *self.config.fingerprint_exclude):
            remove_key(settings, key)
        return settings


@dataclass(frozen=True)
class Plan:
    """All steps of all cells of a recipe, each after those it depends on."""

    recipe: Recipe
    """Its first cell."""
    steps: Sequence[Step]
    later_stages: frozenset[str] = frozenset()
    """Stages whose steps a search plans only once it has chosen their cells."""
    other_names: frozenset[str] = frozenset()
    """Names of steps that only other plans of the same search have."""

    def named(self, names: Iterable[str], option: str) -> set[str]:
        """Return the names of the steps that `names`, of stages or steps, refer to.

        Raises:
            RecipeError: if a name is unknown; the message starts with `option`.
        """
        steps_of: dict[str, set[str]] = {}
        for step in self.steps:
            for name in (step.stage, step.name):
                steps_of.setdefault(name, set()).add(step.name)
        selected: set[str] = set()
        for name in names:
            if name not in steps_of and name not in self.other_names:
                hint = f"{did_you_mean(name, steps_of)}; it has {', '.join(sorted(steps_of))}"
                raise RecipeError([f"{option} {name}: the recipe has no such stage{hint}"])
            selected |= steps_of.get(name, set())
        return selected

    def descendants(self, names: set[str]) -> set[str]:
        """Return `names` and the names of all steps that depend on them, directly or not."""
        reached = set(names)
        for step in self.steps:
            if any(source.name in reached for source in step.dependencies):
                reached.add(step.name)
        return reached

    def ancestors(self, names: set[str]) -> set[str]:
        """Return `names` and the names of all steps that they depend on, directly or not."""
        reached = set(names)
        for step in reversed(self.steps):
            if step.name in reached:
                reached |= {source.name for source in step.dependencies}
        return reached


def start_reference(source: Step | Reference) -> Reference:
    """Return the reference `source`, or the one that the chain of trainings up to the step `source` starts from."""
    while isinstance(source, Step):
        source = source.inputs["model"]
    return source


def remove_key(section: dict[str, Any], key: str) -> None:
    """Remove the value at a dotted key from a nested section, if it is there. List items become None."""
    *parents, last = key.split(".")
    parent: Any = reduce(item_of, parents, section)
    if isinstance(parent, dict):
        parent.pop(last, None)
    elif item_of(parent, last) is not None:
        parent[int(last)] = None
