"""`--estimate`: what the steps that would run take, said by the stages themselves in a process of its own.

Steps that are alike are told once. Nothing runs, and no weights are fetched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.console.console import Console
from pipeline.plan.cache import refresh
from pipeline.plan.planner import Plan, Step, drop, reference_of
from pipeline.preflight.probe import run_probe
from pipeline.run.local_executor import LocalExecutor, memory_of_machine
from pipeline.store import references
from pipeline.store.references import BadReferenceError, Reference
from pipeline.store.store import Store
from stages.estimate.result import Estimate

LENGTHS = ("max_steps", "num_train_epochs", "learning_rate", "warmup_steps", "save_steps", "logging_steps")
"""Fields of a training that leave its tokens a second as they are."""


@dataclass(frozen=True)
class Estimated:
    """Steps that are alike, and what each of them takes."""

    steps: list[Step]
    each: Estimate

    @property
    def name(self) -> str:
        """`wit`, `wit (35 steps)` or `it, wit (2 steps)`."""
        stages = ", ".join(dict.fromkeys(step.stage for step in self.steps))
        return self.steps[0].name if len(self.steps) == 1 else f"{stages} ({len(self.steps)} steps)"

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        memory = self.each.memory
        return {
            "steps": [step.name for step in self.steps],
            "kind": self.steps[0].kind,
            **self.each.model_dump(),
            "memory_total": memory.total if memory else None,
            "fits": self.each.fits,
        }


@dataclass(frozen=True)
class Whole:
    """A recipe's steps that would run."""

    recipe: str
    parts: list[Estimated]
    side_by_side: int
    """How many steps run at once."""
    room: int
    """Bytes of main memory."""
    free: int
    """Bytes of the disk of the folder of runs."""

    @property
    def seconds(self) -> float:
        """Of all steps whose time is known, one after the other."""
        return sum(len(part.steps) * (part.each.seconds or 0) for part in self.parts)

    @property
    def flops(self) -> float:
        """Likewise."""
        return sum(len(part.steps) * (part.each.flops or 0) for part in self.parts)

    @property
    def tokens(self) -> int:
        """Likewise."""
        return sum(len(part.steps) * (part.each.tokens or 0) for part in self.parts)

    @property
    def disk(self) -> int:
        """All that is published, and the largest checkpoints of as many steps as run at once."""
        checkpoints = self._largest(lambda each: each.disk.checkpoints)
        return sum(len(part.steps) * part.each.disk.published for part in self.parts) + checkpoints

    @property
    def memory(self) -> int:
        """Of the largest steps that may run at once, on CPUs."""
        return self._largest(lambda each: each.memory.total if each.memory and each.memory.libraries else 0)

    def _largest(self, size: Any) -> int:
        every = sorted((size(part.each) for part in self.parts for _ in part.steps), reverse=True)
        return sum(every[: self.side_by_side])

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {
            "recipe": self.recipe,
            "steps": [part.as_json() for part in self.parts],
            "total": {
                "seconds_of_work": self.seconds,
                "side_by_side": self.side_by_side,
                "tokens": self.tokens,
                "flops": self.flops,
                "disk": self.disk,
                "disk_free": self.free,
                "memory_side_by_side": self.memory,
                "memory_of_machine": self.room,
            },
        }


def estimate(
    plan: Plan, store: Store, runs: Path, console: Console, chosen: set[str], forced: set[str], jobs: int | None
) -> Whole:
    """What the chosen steps take that would run. Raises RecipeError for what is wrong in the recipe, ProbeError where
    the process that estimates breaks down; what merely is not here is unknown in the result."""
    refresh(plan, store, forced)
    executor, look = LocalExecutor(jobs), _Look(plan, runs)
    todo = [step for step in plan.steps if step.name in chosen and step.state == "run" and step.config.has("estimate")]
    groups: dict[str, list[Step]] = {}
    for step in todo:
        groups.setdefault(_alike(step), []).append(step)
    console.say(f"{plan.recipe.name}: estimating {len(todo)} steps; nothing runs, and no weights are fetched")
    first = [steps[0] for steps in groups.values()]
    job = {
        "cache": str((runs / "cache").resolve()),
        "threads": executor.threads,
        "steps": [look.job(step) for step in first],
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    answers = run_probe("--estimate", "pipeline.preflight.estimate_worker", first, job, **offline)
    parts = [
        Estimated(steps, Estimate.model_validate(answer))
        for steps, answer in zip(groups.values(), answers, strict=True)
    ]
    there = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    return Whole(plan.recipe.name, parts, executor.width, memory_of_machine(), free)


def _alike(step: Step) -> str:
    """The same for steps that take the same."""
    settings = step.settings()
    for key in step.config.cost_invariant:
        drop(settings, key.split("."))
    settings.pop("models", None)
    sources = {name: str(reference_of(source)) for name, source in step.inputs.items()}
    return json.dumps([step.kind, settings, sources, _dtype(step)], sort_keys=True)


def _dtype(step: Step) -> str | None:
    """Of the weights of the step's model, where a training of the recipe makes it."""
    source = step.inputs.get("model")
    return source.config.published_dtype if isinstance(source, Step) else None


@dataclass
class _Look:
    """What of the inputs is here."""

    plan: Plan
    runs: Path
    found: dict[tuple[Reference, bool], Path | str] = field(default_factory=dict)
    """A path, with a model's own code or without, or why there is none."""

    def job(self, step: Step) -> dict[str, Any]:
        """What the worker is told of the step."""
        with_code = [reference_of(source) for source in step.with_code]
        sources = {
            name: self._have(source := reference_of(given), source in with_code) for name, given in step.inputs.items()
        }
        takes = step.config.resources
        whole = memory_of_machine()
        limited = 0 < takes.bytes < whole
        return {
            "step": step.name,
            "kind": step.kind,
            "config": step.config.model_dump(),
            "paths": {name: str(found.resolve()) for name, found in sources.items() if isinstance(found, Path)},
            "missing": {name: found for name, found in sources.items() if isinstance(found, str)},
            "dtype": _dtype(step),
            "finished": _finished(step, self.plan.steps),
            "room": takes.bytes if limited else whole,
            "room_of": "resources.memory" if limited else "this machine",
        }

    def _have(self, source: Reference, code: bool) -> Path | str:
        if (source, code) not in self.found:
            try:
                self.found[source, code] = references.fetch_description(source, self.runs / "cache", code)
            except BadReferenceError as error:
                self.found[source, code] = str(error)
        return self.found[source, code]


def _paced(step: Step) -> dict[str, Any]:
    """The step's settings, but for those that change how long it takes in proportion, or not at all."""
    settings = step.settings() | {"models": 0}
    for key in (*step.config.cost_invariant, *(f"train.{name}" for name in LENGTHS)):
        drop(settings, key.split("."))
    return settings


def _finished(step: Step, steps: Iterable[Step]) -> dict[str, Any] | None:
    """A step of the recipe that has its result, of the same kind, chain and settings; of a training, those that decide
    how fast it is."""
    for other in steps:
        if not other.published or other.kind != step.kind or "model" not in step.inputs:
            continue
        if reference_of(other.inputs["model"]) != reference_of(step.inputs["model"]):
            continue
        metrics = other.published.manifest["metrics"]
        trains = step.config.output_kind == "model"
        same = _paced(other) == _paced(step) and (trains or other.stage == step.stage)
        if metrics.get("seconds") and same and (not trains or metrics.get("tokens")):
            tokens = metrics["tokens"] if trains else None
            return {"step": other.name, "seconds": metrics["seconds"], "tokens": tokens}
    return None
