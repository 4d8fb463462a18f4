"""Which stages a stage of a recipe needs, and an order in which all can run."""

from __future__ import annotations

import re

from pipeline.recipe.did_you_mean import did_you_mean
from pipeline.recipe.loader import Recipe
from pipeline.recipe.nodes import Key, Problem, split_key
from stages.base import BASE, Need


def stages_of(recipe: Recipe, need: Need) -> list[str]:
    """The stages whose steps `need` asks for."""
    if need.kind == "steps" and need.value == "*":
        return [name for name, config in recipe.stages.items() if config.output_kind == "scores"]
    if need.kind == "model" and need.value != BASE:
        known = need.value in recipe.stages or need.value in recipe.broken
        return [need.value] if known or _is_word(need.value) else []
    return [need.value] if need.kind == "steps" else []


def _is_word(reference: str) -> bool:
    """Whether a model reference can only be the name of a stage: hub ids and paths have a slash."""
    return re.fullmatch(r"[\w-]+(\[.*\])?", reference) is not None


def in_order(recipe: Recipe) -> tuple[list[str], list[Problem]]:
    """The stages, each after those it needs as far as that can be, and a problem for each unknown one and cycle."""
    below: dict[str, list[str]] = {}
    problems: list[Problem] = []
    needs = [(name, list(config.needs().values())) for name, config in recipe.stages.items()]
    for name, needed in [*needs, *recipe.broken.items()]:
        below[name] = []
        for need in needed:
            for other in stages_of(recipe, need):
                if other in recipe.stages:
                    below[name].append(other)
                elif other not in recipe.broken:
                    problems.append(_no_such_stage(recipe, name, need, other))
    done: dict[str, None] = {}
    for name in below:
        if name not in done:
            problems += [_cycle(recipe, stages) for stages in _visit(name, below, done)]
    return [name for name in done if name in recipe.stages], problems


def _visit(first: str, below: dict[str, list[str]], done: dict[str, None]) -> list[list[str]]:
    """Note in `done` all that `first` needs, and then itself; return the cycles found on the way."""
    cycles: list[list[str]] = []
    path = {first: iter(below[first])}
    while path:
        name = next(reversed(path))
        other = next(path[name], None)
        if other is None:
            done[name] = None
            del path[name]
        elif other in path:
            stages = list(path)
            cycles.append(stages[stages.index(other) :])
        elif other not in done:
            path[other] = iter(below[other])
    return cycles


def _cycle(recipe: Recipe, stages: list[str]) -> Problem:
    way = " -> ".join([*stages, stages[0]])
    return recipe.problem(("stages", stages[0]), f"needs its own result: {way}; start one of them from another model")


def _no_such_stage(recipe: Recipe, stage: str, need: Need, other: str) -> Problem:
    text = f"{other!r} is no stage of this recipe{did_you_mean(other, [BASE, *recipe.stages, *sorted(recipe.broken)])}"
    if need.kind == "model":
        text += "; a model on the hub is written org/name, a folder ./name"
    return recipe.problem(key_of(stage, need), text)


def key_of(stage: str, need: Need) -> Key:
    """Where in the recipe `need` of `stage` is written."""
    return ("stages", stage, *split_key(need.key))
