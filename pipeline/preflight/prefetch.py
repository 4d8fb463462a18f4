"""`--prefetch`: all that a recipe needs, fetched now, so that it then runs with HF_HUB_OFFLINE=1 and no network.

What references name goes where a run would put it; what stages need besides, such as the data sets of benchmarks, they
fetch themselves in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.console.console import Console
from pipeline.plan.planner import Plan, Step, reference_of
from pipeline.preflight.probe import run_probe
from pipeline.run.loop import Run
from pipeline.store.references import Local
from pipeline.store.store import Store


def prefetch(plan: Plan, store: Store, runs: Path, console: Console, chosen: set[str]) -> dict[str, Any]:
    """What was fetched: {"references": [{reference, path, bytes}], "stages": [{stage, fetched}]}; with what still needs
    a network ("need_network"), and whether it is all that the recipe needs ("whole").

    Raises RecipeError where something cannot be had, ProbeError where the process that fetches breaks down.
    """
    run = Run(plan, store, runs, console, chosen, chosen)
    run.prefetch()
    references = [
        {"reference": str(source), "path": str(path), "bytes": _bytes(path)}
        for source, path in run.paths.items()
        if not isinstance(source, Local)
    ]
    alike: dict[str, Step] = {}
    for step in plan.steps:
        if step.name in chosen and step.config.has("fetch"):
            files = sorted(str(s) for name, s in step.inputs.items() if name != "model" and not isinstance(s, Step))
            alike.setdefault(json.dumps([step.kind, step.settings() | {"models": None}, files], sort_keys=True), step)
    job = {"steps": [_job(step, run) for step in alike.values()]}
    if alike:
        console.say(f"fetching what {', '.join(step.stage for step in alike.values())} reads besides")
    fetched = run_probe("--prefetch", "pipeline.preflight.prefetch_worker", list(alike.values()), job)
    stages = [
        {"stage": step.stage, "fetched": answer["fetched"]}
        for step, answer in zip(alike.values(), fetched, strict=True)
    ]
    asks = [f"{step.stage}: {line}" for step in plan.steps if step.name in chosen for line in step.paid_requests]
    every = {step.name for step in plan.steps} <= chosen
    return {
        "recipe": plan.recipe.name,
        "references": references,
        "stages": stages,
        "need_network": list(dict.fromkeys(asks)),
        "whole": every,
    }


def told(found: dict[str, Any]) -> list[str]:
    """The same for people, line by line."""
    lines = [f"{each['reference']}: {each['bytes'] / 2**20:.1f} MiB in {each['path']}" for each in found["references"]]
    lines += [f"{each['stage']}: {what}" for each in found["stages"] for what in each["fetched"]]
    size = sum(each["bytes"] for each in found["references"])
    named = f"{len(found['references'])} references, {size / 2**20:.1f} MiB" if found["references"] else "no reference"
    what = "it" if found["whole"] else "what was chosen"
    runs = f"with HF_HUB_OFFLINE=1 {what} now runs without a network"
    lines += [f"needs a network still: {asked}" for asked in found["need_network"]]
    return [
        *lines,
        f"{found['recipe']}: {named} to fetch; {runs + (', but for that' if found['need_network'] else '')}",
    ]


def _job(step: Step, run: Run) -> dict[str, Any]:
    sources = {name: source for name, source in step.inputs.items() if name != "model"}
    paths = {name: str(run.paths[reference_of(source)].resolve()) for name, source in sources.items()}
    return {"kind": step.kind, "config": step.config.model_dump(), "paths": paths}


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
