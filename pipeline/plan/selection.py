"""The steps that a command may run: --stage, --from and --force."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.plan.cache import Decisions
from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan, Step
from pipeline.recipe.loader import RecipeError
from stages.base import UserError


@dataclass(frozen=True)
class Selection:
    """Names of steps."""

    selected: frozenset[str]
    """Steps that may run; all others must be cached where they are needed."""
    forced: frozenset[str]
    """Steps that run even if they have a result."""


@dataclass(frozen=True)
class StepSummary:
    """What `--plan` shows of one step."""

    step: str
    kind: str
    fingerprint: str | None
    state: str
    """`cached` or `run`."""
    why: str
    needs: list[str]
    runs_code: list[str]
    reads: list[str]
    """Files that no key of the recipe names, but files of the step."""
    asks: list[str]
    """Requests to services that may charge for them, as far as local files tell."""


def select(plan: Plan, stage: Sequence[str], from_: Sequence[str], force: Sequence[str]) -> Selection:
    """Select steps by the names given to --stage, --from and --force. Raises RecipeError for unknown names."""
    chosen = plan.named(stage, "--stage")
    onward = plan.descendants(plan.named(from_, "--from"))
    forced = chosen | onward | plan.named(force, "--force")
    selected = chosen | onward if stage or from_ else {step.name for step in plan.steps}
    return Selection(frozenset(selected), frozenset(forced))


def steps_to_run(plan: Plan, selection: Selection, decisions: Decisions) -> list[Step]:
    """The selected steps that have no usable result."""
    return [step for step in plan.steps if step.name in selection.selected and not decisions[step.name].cached]


def check_inputs(plan: Plan, selection: Selection, decisions: Decisions) -> None:
    """Raise RecipeError if a step that runs, or a search that has to choose, needs a step that has no result and is not
    selected."""
    for step in plan.steps if plan.later_stages else ():
        if not decisions[step.name].cached and step.name not in selection.selected:
            text = f"{step.name} has no result, and the search needs it to choose; run the recipe without --stage"
            raise RecipeError([text])
    for step in steps_to_run(plan, selection, decisions):
        for source in step.dependencies:
            if not decisions[source.name].cached and source.name not in selection.selected:
                command = f"run-recipe RECIPE --stage {source.stage}"
                reason = decisions[source.name].reason
                raise RecipeError([f"{step.name} needs {source.name}: {reason}; make it first by {command}"])


def summarize(plan: Plan, selection: Selection, decisions: Decisions, resolver: Resolver) -> list[StepSummary]:
    return [
        StepSummary(
            step.name,
            step.kind,
            decisions[step.name].fingerprint,
            "cached" if decisions[step.name].cached else "run",
            decisions[step.name].reason,
            [source.name for source in step.dependencies],
            step.config.foreign_code(resolver.local_files(step)),
            [name.partition(" ")[2] for name in step.references if name not in step.config.needs()],
            paid_requests(step, resolver),
        )
        for step in plan.steps
        if step.name in selection.selected
    ]


def paid_requests(step: Step, resolver: Resolver) -> list[str]:
    """The requests of a step to paid services, as far as local files tell."""
    try:
        return step.config.paid_requests(resolver.local_files(step))
    except UserError:  # reported when the step is about to run
        return []
