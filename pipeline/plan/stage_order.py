"""The order of a recipe's stages: each after the stages it needs."""

import re

from pipeline.recipe.loader import Recipe
from pipeline.recipe.nodes import Key, Problem, split_key
from stages.base import BASE, Need
from stages.system.did_you_mean import did_you_mean


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


def order_stages(recipe: Recipe) -> tuple[list[str], list[Problem]]:
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
    order: dict[str, None] = {}
    for name in needed:
        if name not in order:
            problems += [_cycle(recipe, stages) for stages in _visit(name, needed, order)]
    return [name for name in order if name in recipe.stages], problems


def _visit(first: str, needed: dict[str, list[str]], order: dict[str, None]) -> list[list[str]]:
    """Append to `order` all that `first` needs, then itself, depth first; return the cycles on the way.

    graphlib would stop at the first cycle, and its order is not that of the recipe.
    """
    cycles: list[list[str]] = []
    path = {first: iter(needed[first])}
    while path:
        name = next(reversed(path))
        other = next(path[name], None)
        if other is None:
            order[name] = None
            del path[name]
        elif other in path:
            stages = list(path)
            cycles.append(stages[stages.index(other) :])
        elif other not in order:
            path[other] = iter(needed[other])
    return cycles


def _cycle(recipe: Recipe, stages: list[str]) -> Problem:
    path = " -> ".join([*stages, stages[0]])
    return recipe.problem(("stages", stages[0]), f"needs its own result: {path}; start one of them from another model")


def _unknown_stage(recipe: Recipe, stage: str, need: Need, other: str) -> Problem:
    hint = did_you_mean(other, [BASE, *recipe.stages, *sorted(recipe.broken)])
    text = f"{other!r} is no stage of this recipe{hint}"
    if need.kind == "model":
        text += "; a model on the hub is written org/name, a folder ./name"
    return recipe.problem(key_of(stage, need), text)


def key_of(stage: str, need: Need) -> Key:
    """The key in the recipe where `need` of `stage` is written."""
    return ("stages", stage, *split_key(need.key))
