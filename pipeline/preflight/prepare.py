"""Finds everything that is known to be wrong before any step runs, and fetches what the steps need."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.plan.cache import Decisions, cached_results, decide
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection, check_inputs, steps_to_run
from pipeline.plan.step import Plan, Step
from pipeline.preflight.check import Checks, check_files, check_steps
from pipeline.recipe.loader import RecipeError
from pipeline.run.executor import Executor
from pipeline.store.store import Store


@dataclass(frozen=True)
class Preparation:
    """What is known about a plan right before it runs."""

    decisions: Decisions
    """The cache decisions, with the commits of hub references resolved and all inputs of steps that run verified."""
    steps: list[Step]
    """The steps that run."""
    checks: Checks


def prepare(
    plan: Plan,
    selection: Selection,
    store: Store,
    resolver: Resolver,
    executor: Executor | None = None,
    say: Callable[[str], None] = lambda line: None,
    runs_next: bool = False,
) -> Preparation:
    """Resolve and fetch references, verify the inputs of steps that run, and check the steps as `executor` would run
    them; without one, only their files. Writes only to the cache.

    Raises:
        RecipeError: with all problems.
        ProbeError: if the process of the checks fails.
    """
    resolver.pin(plan.steps)
    decisions = _decide_verified(plan, selection, store, resolver)
    resolver.hashes.save()
    check_inputs(plan, selection, decisions)
    steps = steps_to_run(plan, selection, decisions)
    resolver.fetch(steps)
    results = cached_results(decisions)
    if executor:
        if runs_next:
            executor.expect(dict.fromkeys(step.kind for step in steps))
        checks = check_steps(steps, results, resolver, executor, say)
    else:
        check_files(steps, results, resolver, checks := Checks())
    if checks.problems or checks.errors:
        raise RecipeError(checks.errors, checks.problems)
    return Preparation(decisions, steps, checks)


def _decide_verified(plan: Plan, selection: Selection, store: Store, resolver: Resolver) -> Decisions:
    """Decide what is cached, and read the results that steps about to run start from; damaged ones run again."""
    damaged: dict[str, str] = {}
    verified: set[str] = set()
    while True:
        decisions = decide(plan, store, resolver, selection.forced, damaged)
        sources = {
            source.name: result
            for step in steps_to_run(plan, selection, decisions)
            for source in step.dependencies
            if (result := decisions[source.name].published) and source.name not in verified
        }
        if not sources:
            return decisions
        for name, result in sources.items():
            verified.add(name)
            if damage := result.damage():
                damaged[name] = damage
