"""`--preview`: what the chosen stages would train on, shown by the stages themselves in a process of its own.

All that a run checks before it starts is checked here too; nothing is trained, and only the pages are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console.console import Console
from pipeline.plan.planner import Plan, Step, ancestors, reference_of
from pipeline.preflight.probe import run_probe
from pipeline.recipe.loader import RecipeError
from pipeline.run.loop import Run
from pipeline.store.store import Store
from stages import KINDS
from stages.system.file_names import file_name


@dataclass(frozen=True)
class Previewed:
    """What one step's stage has shown."""

    page: Path
    """The HTML page."""
    text: str
    """For the terminal, with its colours if it has any."""
    values: dict[str, Any]
    """For programs."""


def preview(plan: Plan, store: Store, runs: Path, console: Console, chosen: set[str], count: int) -> list[Previewed]:
    """`count` rows of every chosen step whose stage can show them. Raises RecipeError where none can, and wherever
    a run would; ProbeError where that is no fault of the recipe."""
    steps = _steps(plan, chosen)
    names = {name for step in steps for name in (step.name, *ancestors(step))}
    run = Run(plan, store, runs, console, names, forced=names)
    run.prepare()
    console.say(f"{plan.recipe.name}: reading rows for {', '.join(step.name for step in steps)}; nothing is trained")
    job = {
        "count": count,
        "cache": str((runs / "cache").resolve()),
        "colors": console.rich.color_system,
        "width": console.rich.width,
        "steps": [
            {
                "step": step.name,
                "kind": step.kind,
                "config": step.config.model_dump(),
                "paths": {name: str(run.paths[reference_of(source)].resolve()) for name, source in step.inputs.items()},
            }
            for step in steps
        ],
    }
    shown = []
    results = run_probe("--preview", "pipeline.preflight.preview_worker", steps, job, CUDA_VISIBLE_DEVICES="")
    for step, result in zip(steps, results, strict=True):
        page = run.folder / "preview" / f"{file_name(step.name)}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(result["html"], encoding="utf-8")
        shown.append(Previewed(page, result["text"], result["values"] | {"page": str(page)}))
    return shown


def _steps(plan: Plan, chosen: set[str]) -> list[Step]:
    """The chosen steps that can be shown; at least one."""
    able = [step for step in plan.steps if step.config.has("preview")]
    if steps := [step for step in able if step.name in chosen]:
        return steps
    kinds = " or ".join(kind for kind, config in KINDS.items() if config.has("preview"))
    if able:
        names = ", ".join(step.name for step in able)
        raise RecipeError([f"--preview: shows stages of kind {kinds}, and none of those is chosen; choose {names}"])
    raise plan.recipe.error(("stages",), f"has no stage of kind {kinds}, which is what --preview shows; add one")
