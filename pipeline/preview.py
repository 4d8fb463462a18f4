"""`--preview`: what the chosen stages would train on, shown by the stages themselves in a process of its own.

All that a run checks before it starts is checked here too; nothing is trained, and only the pages are written.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import Artifact
from pipeline.console import Console
from pipeline.places import split_key
from pipeline.plan import Plan, Step, below
from pipeline.recipe import RecipeError
from pipeline.run import Run
from pipeline.store import Store
from stages import KINDS
from stages.names import file_name
from stages.process import module_call


@dataclass(frozen=True)
class Previewed:
    """What one step's stage has shown."""

    page: Path
    """The HTML page."""
    text: str
    """For the terminal, with its colours if it has any."""
    values: dict[str, Any]
    """For programs."""


class PreviewFailed(Exception):
    """The process that shows the stages broke down; the message is what it said last."""


def preview(plan: Plan, store: Store, runs: Path, console: Console, chosen: set[str], count: int) -> list[Previewed]:
    """`count` rows of every chosen step whose stage can show them. Raises RecipeError where none can, and wherever
    a run would; PreviewFailed where that is no fault of the recipe."""
    steps = _steps(plan, chosen)
    names = {name for step in steps for name in (step.name, *below(step))}
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
                "paths": {name: str(run.paths[_found(source)].resolve()) for name, source in step.inputs.items()},
            }
            for step in steps
        ],
    }
    shown = []
    for step, result in zip(steps, _worked(job), strict=True):
        if "error" in result:
            if result["key"]:
                raise step.recipe.error(split_key(f"stages.{step.stage}.{result['key']}"), result["error"])
            raise RecipeError(result["error"].splitlines())
        page = run.folder / "preview" / f"{file_name(step.name)}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(result["html"], encoding="utf-8")
        shown.append(Previewed(page, result["text"], result["values"] | {"page": str(page)}))
    return shown


def _steps(plan: Plan, chosen: set[str]) -> list[Step]:
    """The chosen steps that can be shown; at least one."""
    able = [step for step in plan.steps if step.config.previewer]
    if steps := [step for step in able if step.name in chosen]:
        return steps
    kinds = " or ".join(kind for kind, config in KINDS.items() if config.previewer)
    if able:
        names = ", ".join(step.name for step in able)
        raise RecipeError([f"--preview: shows stages of kind {kinds}, and none of those is chosen; choose {names}"])
    raise plan.recipe.error(("stages",), f"has no stage of kind {kinds}, which is what --preview shows; add one")


def _found(source: Step | Artifact) -> Artifact:
    """What was found by reference: `source`, or the model that the chain of trainings up to it begins with."""
    while isinstance(source, Step):
        source = source.inputs["model"]
    return source


def _worked(job: dict[str, Any]) -> list[dict[str, Any]]:
    """What `pipeline.preview_worker` makes of the job, a result for each step."""
    call, environment = module_call("pipeline.preview_worker")
    environment |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(call, input=json.dumps(job).encode(), capture_output=True, env=environment, check=False)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise PreviewFailed(f"--preview: its process ended with status {done.returncode}: {''.join(last)}")
    return json.loads(done.stdout)
