"""Items by which a training chooses its best point must not be reported: the score would be inflated."""

from collections.abc import Iterable, Iterator

from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Step
from pipeline.recipe.nodes import Problem, split_key
from stages.base import Items


def reused_items(steps: Iterable[Step], resolver: Resolver) -> Iterator[Problem]:
    """Yield a problem for each training that chooses by items on which a stage of the recipe scores a model."""
    steps = list(steps)
    reporting = {
        _identity(step, items, resolver): f"stages.{step.stage}.{items.key}"
        for step in steps
        if step.config.output_kind == "scores"
        for items in step.config.measured_items()
    }
    for step in (step for step in steps if step.config.output_kind == "model"):
        for items in step.config.measured_items():
            if place := reporting.get(_identity(step, items, resolver)):
                text = f"select chooses by these items, and {place} reports a score on them, which would be inflated"
                yield step.recipe.problem(("stages", step.stage, *split_key(items.key)), f"{text}; name other items")


def _identity(step: Step, items: Items, resolver: Resolver) -> object:
    """What two sets of the same items have in common."""
    source = step.inputs.get(items.input) if items.input else None
    return (source if source is None or isinstance(source, Step) else resolver.content(source) or source), items.part
