"""Finds everything that is known to be wrong before any step runs, and fetches what the steps need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.plan.cache import Decisions, cached_results, decide
from pipeline.plan.resolver import Resolver, start_model_path
from pipeline.plan.selection import Selection, check_inputs, steps_to_run
from pipeline.plan.step import Plan, Step
from pipeline.recipe.loader import RecipeError
from pipeline.recipe.nodes import Problem, split_key
from pipeline.store.store import Published, Store
from stages.base import UserError


@dataclass(frozen=True)
class Preparation:
    """What is known about a plan right before it runs."""

    decisions: Decisions
    """The cache decisions, with the commits of hub references resolved and all inputs of steps that run verified."""
    paid_requests: list[tuple[Step, str]]
    """Requests of steps to services that may charge for them."""


def prepare(plan: Plan, selection: Selection, store: Store, resolver: Resolver) -> Preparation:
    """Resolve and fetch references, verify the inputs of steps that run, and check their files.

    Writes only to the cache.

    Raises:
        RecipeError: with all problems.
    """
    resolver.pin(plan.steps)
    decisions = _decide_verified(plan, selection, store, resolver)
    resolver.hashes.save()
    check_inputs(plan, selection, decisions)
    steps = steps_to_run(plan, selection, decisions)
    resolver.fetch(steps)
    requests: list[tuple[Step, str]] = []
    problems: list[Problem] = []
    errors: list[str] = []
    for step in steps:
        try:
            requests += _check(step, cached_results(decisions), resolver)
        except UserError as error:
            if error.key:
                problems.append(step.recipe.problem(("stages", step.stage, *split_key(error.key)), str(error)))
            else:
                errors += str(error).splitlines()
    if problems or errors:
        raise RecipeError(errors, problems)
    return Preparation(decisions, requests)


def _check(step: Step, results: Mapping[str, Published], resolver: Resolver) -> list[tuple[Step, str]]:
    """Check the step's files; return its paid requests. Raises UserError."""
    paths = {name: start_model_path(source, results, resolver) for name, source in step.inputs.items()}
    files = {name: path for name, path in paths.items() if path}
    step.config.check(files)
    return [(step, request) for request in step.config.paid_requests(files)]


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
