"""Tables and lines that `--estimate` prints."""

from collections.abc import Iterator

from rich.table import Column, Table

from pipeline.console.console import escape
from pipeline.console.progress_summary import format_duration
from pipeline.preflight.estimate import RecipeEstimate, StepGroup
from stages.estimate.result import Memory


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
