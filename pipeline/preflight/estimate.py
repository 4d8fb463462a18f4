"""`--estimate`: the cost of the steps that would run, estimated in a subprocess that imports their libraries."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.plan.cache import cached_results, decide
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection, steps_to_run
from pipeline.plan.step import Plan, Step, remove_key, start_reference
from pipeline.preflight.probe import Request, run_probe
from pipeline.run.local_executor import LocalExecutor, free_disk, machine_memory
from pipeline.store import references
from pipeline.store.references import BadReferenceError, Local, Reference
from pipeline.store.store import Published, Store
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

    def to_json(self) -> dict[str, Any]:
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
            "memory_of_machine": machine_memory(),
        }

    def to_json(self) -> dict[str, Any]:
        return {"recipe": self.recipe, "steps": [group.to_json() for group in self.groups], "total": self.total}


def estimate(
    plan: Plan, store: Store, resolver: Resolver, say: Callable[[str], None], selection: Selection, jobs: int | None
) -> RecipeEstimate:
    """Estimate the selected steps that would run. Raises RecipeError, or ProbeError if the subprocess fails."""
    decisions = decide(plan, store, resolver, selection.forced)
    executor, cache = LocalExecutor(jobs), resolver.runs / "cache"
    steps = [step for step in steps_to_run(plan, selection, decisions) if step.config.has("estimate")]
    groups: dict[str, list[Step]] = {}
    for step in steps:
        key = [step.kind, model_dtype(step), _settings(step), _sources(step)]
        groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(step)
    say(f"{plan.recipe.name}: estimating {len(steps)} steps; nothing runs, and no weights are fetched")
    first = [group[0] for group in groups.values()]
    requests, arguments = [_request(step, cache) for step in first], {"threads": executor.threads}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    answers = run_probe("estimate", "--estimate", cache, requests, arguments, **offline)
    published = cached_results(decisions)
    results = {step: published[step.name] for step in plan.steps if step.name in published}
    estimated = [
        StepGroup(group, _with_measured_time(Estimate(**answer), group[0], results))
        for group, answer in zip(groups.values(), answers, strict=True)
    ]
    return RecipeEstimate(plan.recipe.name, estimated, executor.width, free_disk(resolver.runs))


def _settings(step: Step, *excluded: str) -> dict[str, Any]:
    """Return the step's settings without its model and dotted keys."""
    settings = step.settings() | {"models": None}
    for key in (*step.config.cost_invariant, *excluded):
        remove_key(settings, key)
    return settings


def _sources(step: Step) -> dict[str, Reference]:
    """Return the file or folder of each input; of a model, that which its chain of trainings starts from."""
    return {name: start_reference(source) for name, source in step.inputs.items()}


def model_dtype(step: Step) -> str:
    """Return the dtype of the step's model if the recipe or a local config.json names it, else `auto`."""
    source = step.inputs.get("model")
    if isinstance(source, Step):
        return source.config.published_dtype or "auto"
    config = source.path / "config.json" if isinstance(source, Local) else None
    try:
        return str(json.loads(config.read_text())["dtype"]) if config else "auto"
    except (OSError, ValueError, KeyError):  # the stage reports a broken config
        return "auto"


def _request(step: Step, cache: Path) -> Request:
    """Return what the subprocess needs to estimate the step."""
    with_code = [start_reference(source) for source in step.models_with_code]
    paths, missing = dict[str, Path](), dict[str, str]()
    for name, source in _sources(step).items():
        try:
            paths[name] = references.fetch_description(source, cache, source in with_code)
        except BadReferenceError as error:
            missing[name] = str(error)
    machine, limit = machine_memory(), step.config.resources.bytes
    room = {"room": limit, "room_of": "resources.memory"} if 0 < limit < machine else {"room": machine}
    arguments = {"missing": missing, "dtype": model_dtype(step)} | room
    return Request(step, paths, arguments)


def _with_measured_time(estimate: Estimate, step: Step, results: Mapping[Step, Published]) -> Estimate:
    """Replace the time by that of a finished step with the same inputs and settings, a training's in proportion."""
    excluded = [f"train.{name}" for name in SPEED_INVARIANT]
    for other, result in results.items():
        if other.kind == step.kind and _sources(other) == _sources(step):
            metrics, total = result.manifest.metrics, result.manifest.seconds
            if metrics.seconds and _settings(other, *excluded) == _settings(step, *excluded):
                share = estimate.tokens / metrics.tokens if estimate.tokens and metrics.tokens else 1
                time = total + metrics.seconds * (share - 1)  # start-up does not grow
                return estimate.model_copy(update={"seconds": time, "speed": f"as {other.name}, which is finished"})
    return estimate
