"""`--estimate`: the cost of the steps that would run, estimated in a subprocess that imports their libraries."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.console.console import Console
from pipeline.plan.cache import refresh
from pipeline.plan.planner import Plan, Step, drop, reference_of
from pipeline.preflight.probe import run_probe
from pipeline.run.local_executor import LocalExecutor, memory_of_machine
from pipeline.store.references import Artifact, ArtifactError, described
from pipeline.store.store import Store
from stages.estimate.result import Estimate

# Fields of `train` that do not change the tokens per second.
SPEED_INVARIANT = ("max_steps", "num_train_epochs", "learning_rate", "warmup_steps", "save_steps", "logging_steps")


@dataclass(frozen=True)
class StepGroup:
    """Steps with the same cost, and the cost of each."""

    steps: list[Step]
    estimate: Estimate

    @property
    def name(self) -> str:
        """Return `wit`, `wit (35 steps)` or `it, wit (2 steps)`."""
        stages = ", ".join(dict.fromkeys(step.stage for step in self.steps))
        return self.steps[0].name if len(self.steps) == 1 else f"{stages} ({len(self.steps)} steps)"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of `--estimate --json`."""
        total, fits = self.estimate.memory and self.estimate.memory.total, self.estimate.fits
        names = {"steps": [step.name for step in self.steps], "kind": self.steps[0].kind}
        return names | self.estimate.model_dump() | {"memory_total": total, "fits": fits}


@dataclass(frozen=True)
class RecipeEstimate:
    """Cost of the steps of a recipe that would run."""

    recipe: str
    groups: list[StepGroup]
    width: int  # steps that run at once
    disk_free: int

    @property
    def total(self) -> dict[str, Any]:
        """Return sums of known values; those of memory and checkpoints are over the largest steps that run at once."""
        every = [group.estimate for group in self.groups for _ in group.steps]
        on_cpu = [each.memory.total for each in every if each.memory and each.memory.libraries]
        checkpoints = [each.disk.checkpoints for each in every]
        return {
            "seconds_of_work": sum(each.seconds or 0 for each in every),
            "side_by_side": self.width,
            "tokens": sum(each.tokens or 0 for each in every),
            "flops": sum(each.flops or 0 for each in every),
            "disk": sum(each.disk.published for each in every) + sum(sorted(checkpoints)[-self.width :]),
            "disk_free": self.disk_free,
            "memory_side_by_side": sum(sorted(on_cpu)[-self.width :]),
            "memory_of_machine": memory_of_machine(),
        }

    def as_json(self) -> dict[str, Any]:
        """Return the output of `--estimate --json`."""
        return {"recipe": self.recipe, "steps": [group.as_json() for group in self.groups], "total": self.total}


def estimate(
    plan: Plan, store: Store, runs: Path, console: Console, chosen: set[str], forced: set[str], jobs: int | None
) -> RecipeEstimate:
    """Estimate the chosen steps that would run. Raises RecipeError, or ProbeError if the subprocess fails."""
    refresh(plan, store, forced)
    executor = LocalExecutor(jobs)
    groups: dict[str, list[Step]] = {}
    for step in plan.steps:
        if step.name in chosen and step.state == "run" and step.config.has("estimate"):
            key = [step.kind, _model_dtype(step), _settings(step), _sources(step)]
            groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(step)
    count = sum(map(len, groups.values()))
    console.say(f"{plan.recipe.name}: estimating {count} steps; nothing runs, and no weights are fetched")
    first = [steps[0] for steps in groups.values()]
    cache = (runs / "cache").resolve()
    job = {"cache": str(cache), "steps": [_job(step, cache, executor.threads) for step in first]}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    answers = run_probe("--estimate", "pipeline.preflight.estimate_worker", first, job, **offline)
    estimated = [
        StepGroup(steps, _with_measured_time(Estimate(**answer), steps[0], plan.steps))
        for steps, answer in zip(groups.values(), answers, strict=True)
    ]
    existing = next(folder for folder in (runs.absolute(), *runs.absolute().parents) if folder.exists())
    return RecipeEstimate(plan.recipe.name, estimated, executor.width, shutil.disk_usage(existing).free)


def _settings(step: Step, *excluded: str) -> dict[str, Any]:
    """Return the step's settings without its model and dotted keys."""
    settings = step.settings() | {"models": None}
    for key in (*step.config.cost_invariant, *excluded):
        drop(settings, key.split("."))
    return settings


def _sources(step: Step) -> dict[str, Artifact]:
    """Return the file or folder of each input; of a model, that which its chain of trainings starts from."""
    return {name: reference_of(source) for name, source in step.inputs.items()}


def _model_dtype(step: Step) -> str:
    """Return the dtype in which a training of the recipe publishes the step's model, else `auto`."""
    source = step.inputs.get("model")
    return (source.config.published_dtype if isinstance(source, Step) else None) or "auto"


def _job(step: Step, cache: Path, threads: int) -> dict[str, Any]:
    """Return what the subprocess needs to estimate the step."""
    with_code = [reference_of(source) for source in step.with_code]
    paths, missing = {}, {}
    for name, source in _sources(step).items():
        try:
            paths[name] = str(described(source, cache, source in with_code).resolve())
        except ArtifactError as error:
            missing[name] = str(error)
    machine, limit = memory_of_machine(), step.config.resources.bytes
    room = {"room": limit, "room_of": "resources.memory"} if 0 < limit < machine else {"room": machine}
    inputs = {"paths": paths, "missing": missing, "dtype": _model_dtype(step), "threads": threads}
    return {"kind": step.kind, "config": step.config.model_dump(), "inputs": inputs | room}


def _with_measured_time(estimate: Estimate, step: Step, steps: list[Step]) -> Estimate:
    """Replace the time by that of a finished step with the same inputs and settings, a training's in proportion."""
    excluded = [f"train.{name}" for name in SPEED_INVARIANT]
    for other in steps:
        if other.published and other.kind == step.kind and _sources(other) == _sources(step):
            manifest = other.published.manifest
            tokens, seconds = manifest["metrics"].get("tokens"), manifest["metrics"].get("seconds")
            if seconds and _settings(other, *excluded) == _settings(step, *excluded):
                share = estimate.tokens / tokens if estimate.tokens and tokens else 1
                time = manifest["seconds"] + seconds * (share - 1)  # start-up does not grow
                return estimate.model_copy(update={"seconds": time, "speed": f"as {other.name}, which is finished"})
    return estimate
