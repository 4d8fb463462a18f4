"""What a recipe's last run left below --runs, for whoever shows several runs together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base import Input, UserError
from stages.records.metrics import Metrics
from stages.system.integrity import content_hash

FILE = "run.json"
"""In the run's folder: its steps, where their results lie, and their cells of the matrix."""
MANIFEST = "stage.json"


@dataclass(frozen=True)
class PastRun:
    """The steps of one run that scored models."""

    name: str
    scores: dict[str, Input]
    """Step -> its result, with how the model came about."""
    missing: list[str]
    """The steps that have no result: they failed, wait or were not asked for."""


def read_run(folder: Path) -> PastRun:
    """The run in `folder`; one that is not there yet has nothing and misses nothing.

    Raises UserError where its files are not to be read.
    """
    entries = _entries(folder)
    manifests = {entry["fingerprint"]: _manifest(folder, entry) for entry in entries if entry["path"]}
    made = {entry["fingerprint"]: entry for entry in entries if entry["path"]}

    def result(entry: dict[str, Any]) -> Input:
        manifest = manifests[entry["fingerprint"]]
        inputs = {}
        for name, given in manifest["inputs"].items():
            other = made.get(given.get("fingerprint"))
            inputs[name] = result(other) if other else Input(Path(), fingerprint=given.get("content") or "")
        return Input(
            folder.parent / entry["path"],
            entry["step"],
            entry["kind"],
            entry["fingerprint"],
            manifest["config"],
            Metrics.model_validate(manifest["metrics"]),
            inputs,
            entry["labels"],
        )

    scores = {entry["step"]: result(entry) for entry in entries if entry["path"]}
    return PastRun(
        folder.name,
        {step: given for step, given in scores.items() if given.metrics.results is not None},
        [entry["step"] for entry in entries if not entry["path"] and entry["kind"] not in ("report", "push")],
    )


def run_hash(folder: Path) -> str:
    """A hash of all that `read_run` tells. Raises UserError."""
    entries = _entries(folder)
    told = [[e["step"], e["labels"], _manifest(folder, e)["sha256"] if e["path"] else None] for e in entries]
    return content_hash([folder.name, told])


def _entries(folder: Path) -> list[dict[str, Any]]:
    file = folder / FILE
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_bytes())["steps"] if folder.is_dir() else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not the record of a run ({error!r}); run its recipe again") from None
    if any("labels" not in entry for entry in entries):
        raise UserError(f"{file}: was left by an older version, which did not note the cells; run its recipe again")
    return entries


def _manifest(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    file = folder.parent / entry["path"] / MANIFEST
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        text = f"{file}: {entry['step']} of {folder.name} cannot be read ({error}); run its recipe again"
        raise UserError(text) from None
