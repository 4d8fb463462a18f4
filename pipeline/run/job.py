"""A step as its worker is told of it: job.json, and where the worker leaves its result and its log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.plan.planner import Plan, Step
from pipeline.run.local_executor import Job
from pipeline.store.references import Reference, display_name
from pipeline.store.store import Store
from stages.system.file_names import file_name
from stages.system.integrity import write_json

LOGS = "logs"
"""The folder, beside the links to the results of a run, of what its steps print."""


def write_job(step: Step, plan: Plan, paths: Mapping[Reference, Path], store: Store, runs: Path) -> Job:
    """Make the folder of an unfinished step ready for its worker. Raises OSError.

    Args:
        step: one whose inputs are all there, and whose lock the caller holds.
        plan: the one that it is of.
        paths: where what was found by reference lies.
        store: where it will be published.
        runs: the folder given by --runs.
    """
    assert step.fingerprint
    folder = store.unfinished(step.fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "recipe": plan.recipe.name,
        "step": step.name,
        "kind": step.kind,
        "config": step.config.model_dump(),
        "inputs": {name: _input(source, plan, paths) for name, source in step.inputs.items()},
        "cache": str((runs / "cache").resolve()),
        "logs": str((runs / plan.recipe.name / "logs").resolve()),
        "lock": str(store.lock(f"{step.fingerprint}.worker").lock_file),
    }
    write_json(folder / "job.json", job)
    log = runs / plan.recipe.name / LOGS / f"{file_name(step.name)}.txt"
    return Job(step.name, folder.resolve(), log.resolve(), step.config.resources, step.config.processes)


def _input(source: Step | Reference, plan: Plan, paths: Mapping[Reference, Path]) -> dict[str, Any]:
    """What a worker is told of an input, with all it was made from."""
    if not isinstance(source, Step):
        path = str(paths[source].resolve()) if source in paths else str(source)
        content = plan.contents.get(source) or ""
        return {"path": path, "fingerprint": content, "inputs": {}, "reference": display_name(source)}
    assert source.published is not None
    return {
        "path": str(source.published.path.resolve()),
        "step": source.name,
        "kind": source.kind,
        "fingerprint": source.fingerprint,
        "config": source.config.model_dump(),
        "labels": dict(source.labels),
        "metrics": source.published.manifest["metrics"],
        "inputs": {name: _input(inner, plan, paths) for name, inner in source.inputs.items()},
    }
