"""`--estimate`: the cost of the steps that would run, estimated in a subprocess that imports their libraries."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from pipeline.console.console import escape
from pipeline.console.progress_summary import format_duration
from pipeline.plan.cache import Decisions, decide
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection, steps_to_run
from pipeline.plan.step import Plan, Step, remove_key, start_reference
from pipeline.preflight.probe import Request, model_dtype, run_probe
from pipeline.run.local_executor import LocalExecutor, free_disk, machine_memory
from pipeline.store import references
from pipeline.store.references import Reference
from pipeline.store.store import Store
from stages.base import UserError
from stages.estimate.result import Estimate, Memory

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
        key = [step.kind, model_dtype(step), cost_settings(step), _sources(step)]
        groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(step)
    say(f"{plan.recipe.name}: estimating {len(steps)} steps; nothing runs, and no weights are fetched")
    first = [group[0] for group in groups.values()]
    requests, arguments = [_request(step, cache) for step in first], {"threads": executor.threads}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    answers = run_probe("estimate", "--estimate", cache, requests, arguments, offline)
    estimated = [
        StepGroup(group, _with_measured_time(Estimate(**answer), group[0], plan, decisions))
        for group, answer in zip(groups.values(), answers, strict=True)
    ]
    return RecipeEstimate(plan.recipe.name, estimated, executor.width, free_disk(resolver.runs))


def cost_settings(step: Step, *excluded: str) -> dict[str, Any]:
    """Return the step's settings that affect its cost, without its model and the dotted keys `excluded`."""
    settings = step.settings() | {"models": None}
    for key in (*step.config.cost_invariant, *excluded):
        remove_key(settings, key)
    return settings


def _sources(step: Step) -> dict[str, Reference]:
    """Return the file or folder of each input; of a model, that which its chain of trainings starts from."""
    return {name: start_reference(source) for name, source in step.inputs.items()}


def _request(step: Step, cache: Path) -> Request:
    """Return what the subprocess needs to estimate the step."""
    with_code = [start_reference(source) for source in step.models_with_code]
    paths, missing = dict[str, Path](), dict[str, str]()
    for name, source in _sources(step).items():
        try:
            paths[name] = references.fetch_description(source, cache, source in with_code)
        except UserError as error:
            missing[name] = str(error)
    machine, limit = machine_memory(), step.config.resources.bytes
    room = {"room": limit, "room_of": "resources.memory"} if 0 < limit < machine else {"room": machine}
    return Request(step, paths, arguments={"missing": missing} | room)


def _with_measured_time(estimate: Estimate, step: Step, plan: Plan, decisions: Decisions) -> Estimate:
    """Replace the time by that of a finished step with the same inputs and settings, a training's in proportion."""
    excluded = [f"train.{name}" for name in SPEED_INVARIANT]
    for other in plan.steps:
        result = decisions[other.name].published
        if result and other.kind == step.kind and _sources(other) == _sources(step):
            metrics, total = result.manifest.metrics, result.manifest.seconds
            if metrics.seconds and cost_settings(other, *excluded) == cost_settings(step, *excluded):
                share = estimate.tokens / metrics.tokens if estimate.tokens and metrics.tokens else 1
                time = total + metrics.seconds * (share - 1)  # start-up does not grow
                return estimate.model_copy(update={"seconds": time, "speed": f"as {other.name}, which is finished"})
    return estimate


def tables(recipe: RecipeEstimate) -> Iterator[Table]:
    """Yield a table of memory on each device, and one of work."""
    memories = [group.estimate.memory.model_dump() if group.estimate.memory else {} for group in recipe.groups]
    parts = [part for part in Memory.model_fields if any(memory.get(part) for memory in memories)]
    memory_table = _table("parameters", "trainable", *parts, "memory", "of")
    work_table = _table("optimiser steps", "requests", "tokens", "FLOPs", "time", "published", "checkpoints")
    for group, memory in zip(recipe.groups, memories, strict=True):
        cost, name = group.estimate, escape(group.name)
        sizes = [format_bytes(memory[part]) if memory.get(part) else "" for part in parts]
        sizes += [format_bytes(sum(memory.values()) or None), format_bytes(cost.room or None)]
        memory_table.add_row(name, _number(cost.parameters), _number(cost.trainable, ""), *sizes)
        numbers = [_number(n, "") for n in (cost.optimiser_steps, cost.requests, cost.tokens)]
        disk = [format_bytes(n) if n else "" for n in (cost.disk.published, cost.disk.checkpoints)]
        time = "?" if cost.seconds is None else format_duration(cost.seconds)
        work_table.add_row(name, *numbers, _number(cost.flops), time, *disk)
    yield from (memory_table, work_table)


def lines(recipe: RecipeEstimate) -> Iterator[str]:
    """Yield each remark once, with the steps that it applies to, and the total."""
    names: dict[str, list[str]] = {}
    for group in recipe.groups:
        for remark in _remarks(group):
            names.setdefault(remark, []).append(group.name)
    yield from (f"{', '.join(groups)}: {remark}" for remark, groups in names.items())
    total, count = recipe.total, sum(len(group.steps) for group in recipe.groups)
    at_least = "at least " if any(group.estimate.seconds is None for group in recipe.groups) else ""
    yield (
        f"all {count} steps: {at_least}{total['tokens']:,} tokens, {_number(total['flops'])} FLOPs,"
        f" {format_duration(total['seconds_of_work'])} of work, {recipe.width} steps side by side;"
        f" disk: {format_bytes(total['disk'])} of {format_bytes(recipe.disk_free)} free"
    )
    if (memory := total["memory_side_by_side"]) > (machine := total["memory_of_machine"]):
        needed = f"{format_bytes(memory)} of {format_bytes(machine)}"
        yield f"memory: steps side by side need up to {needed}; --jobs 1 runs one at a time"


def _remarks(group: StepGroup) -> Iterator[str]:
    cost = group.estimate
    if cost.memory and cost.fits is False:
        yield f"does not fit: needs {format_bytes(cost.memory.total)}, and {cost.room_of} has {format_bytes(cost.room)}"
        for remedy in cost.remedies:
            yield f"fits, with {format_bytes(remedy.memory)} and the same result, after {', '.join(remedy.changes)}"
        if not cost.remedies:
            yield "smaller batches do not make it fit; try bfloat16 weights, lora, a smaller model or more memory"
    yield from (f"unknown: {reason}" for reason in cost.unknown)
    yield from (f"{name}: {source}" for name, source in (("FLOPs", cost.formula), ("time", cost.speed)) if source)
    yield from cost.notes


def format_bytes(count: float | None) -> str:
    """Return bytes in words."""
    if count is None:
        return "?"
    value, unit = (count / 2**30, "GiB") if count >= 2**30 else (count / 2**20, "MiB")
    return f"{value:.{0 if value >= 100 else 1}f} {unit}"


def _number(count: float | None, unknown: str = "?") -> str:
    """Return `134,515,008` or `1.2e+15`."""
    return unknown if count is None else f"{count:,}" if isinstance(count, int) else f"{count:.2g}"


def _table(*columns: str) -> Table:
    return Table("step", *(Column(n, justify="right") for n in columns), box=None, header_style="bold", pad_edge=False)
