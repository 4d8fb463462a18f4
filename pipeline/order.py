"""Which stages a stage of a recipe needs, and an order in which all can run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from pipeline.places import Key, split_key
from pipeline.recipe import Recipe, RecipeError
from stages.base import BASE, Need


def stages_of(recipe: Recipe, need: Need) -> list[str]:
    """The stages whose steps `need` asks for."""
    if need.kind == "steps" and need.value == "*":
        return [name for name, config in recipe.stages.items() if config.makes == "scores"]
    if need.kind == "model" and need.value != BASE:
        return [need.value] if need.value in recipe.stages or _is_word(need.value) else []
    return [need.value] if need.kind == "steps" else []


def _is_word(reference: str) -> bool:
    """Whether a model reference can only be the name of a stage: hub ids and paths have a slash."""
    return re.fullmatch(r"[\w-]+(\[.*\])?", reference) is not None


def in_order(recipe: Recipe) -> list[str]:
    """The stages, each after those it needs. Raises RecipeError for unknown ones and cycles."""
    below: dict[str, list[str]] = {}
    errors: list[str] = []
    for name, config in recipe.stages.items():
        below[name] = []
        for need in config.needs().values():
            for other in stages_of(recipe, need):
                if other in recipe.stages:
                    below[name].append(other)
                else:
                    errors.append(str(_no_such_stage(recipe, name, need, other)))
    if errors:
        raise RecipeError(list(dict.fromkeys(errors)))
    done: list[str] = []

    def visit(name: str, path: Sequence[str]) -> None:
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise recipe.error(("stages", name), f"needs its own result: {cycle}; start one of them from another model")
        if name not in done:
            for other in below[name]:
                visit(other, [*path, name])
            done.append(name)

    for name in recipe.stages:
        visit(name, [])
    return done


def _no_such_stage(recipe: Recipe, stage: str, need: Need, other: str) -> RecipeError:
    near = difflib.get_close_matches(other, [BASE, *recipe.stages], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    text = f"{other!r} is no stage of this recipe{hint}; a model on the hub is written org/name, a folder ./name"
    if need.kind == "steps":
        text = f"{other!r} is no stage of this recipe{hint}"
    return recipe.error(key_of(stage, need), text)


def key_of(stage: str, need: Need) -> Key:
    """Where in the recipe `need` of `stage` is written."""
    return ("stages", stage, *split_key(need.key))
