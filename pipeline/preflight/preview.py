"""`--preview`: the rows that the selected stages would train on, drawn by the stages in a separate process.

Checks everything that a run checks before it starts. Nothing is trained, and only the pages are written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console.console import Console
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection
from pipeline.plan.step import Plan, Step
from pipeline.preflight.prepare import prepare
from pipeline.preflight.probe import run_probe, start_request
from pipeline.recipe.loader import RecipeError
from pipeline.store.store import Store
from stages.kinds import KINDS
from stages.system.file_names import file_name


@dataclass(frozen=True)
class Preview:
    page: Path
    text: str
    """Text for the terminal, with its colours if it has any."""
    values: dict[str, Any]
    """For --json, as the stage defines it."""


def preview(
    plan: Plan, store: Store, resolver: Resolver, console: Console, selected: frozenset[str], count: int
) -> list[Preview]:
    """Preview `count` rows of each selected step whose stage can show them.

    Raises:
        RecipeError: if no selected stage can show rows, and wherever a run would raise it.
        ProbeError: if the process fails for another reason.
    """
    steps = _steps(plan, selected)
    names = frozenset(plan.ancestors({step.name for step in steps}))
    prepare(plan, Selection(names, forced=names), store, resolver)
    console.say(f"{plan.recipe.name}: reading rows for {', '.join(step.name for step in steps)}; nothing is trained")
    requests = [start_request(step, {}, resolver) for step in steps]
    arguments = {"count": count, "colors": console.rich.color_system, "width": console.rich.width}
    cache = resolver.runs / "cache"
    answers = run_probe("preview", "--preview", cache, requests, arguments, {"CUDA_VISIBLE_DEVICES": ""})
    previews = []
    for step, answer in zip(steps, answers, strict=True):
        page = resolver.runs / plan.recipe.name / "preview" / f"{file_name(step.name)}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(answer["html"], encoding="utf-8")
        previews.append(Preview(page, answer["text"], answer["values"] | {"page": str(page)}))
    return previews


def _steps(plan: Plan, selected: frozenset[str]) -> list[Step]:
    """The selected steps that can show rows; at least one."""
    able = [step for step in plan.steps if step.config.has("preview")]
    if steps := [step for step in able if step.name in selected]:
        return steps
    kinds = " or ".join(kind for kind, config in KINDS.items() if config.has("preview"))
    if able:
        names = ", ".join(step.name for step in able)
        raise RecipeError([f"--preview: shows stages of kind {kinds}, and none of those is chosen; choose {names}"])
    raise plan.recipe.error(("stages",), f"has no stage of kind {kinds}, which is what --preview shows; add one")
