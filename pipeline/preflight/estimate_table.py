"""What `--estimate` prints for people: a table of memory, one of work, and what is not known or does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from pipeline.console.console import escape
from pipeline.console.progress_summary import format_duration
from pipeline.preflight.estimate import Estimated, Whole
from stages.estimate.result import Estimate, Memory

UNKNOWN = "?"
PARTS = tuple(Memory.model_fields)


def tables(whole: Whole) -> Iterator[Table]:
    """Memory of each device, and work."""
    shown = [name for name in PARTS if any(_part(p.each, name) for p in whole.parts)]
    memory = _table("step", "parameters", "trainable", *shown, "memory", "of")
    work = _table("step", "optimiser steps", "requests", "tokens", "FLOPs", "time", "published", "checkpoints")
    for part in whole.parts:
        each = part.each
        bytes_of = ["" if _part(each, name) == 0 else size(_part(each, name)) for name in shown]
        trainable = counted(each.trainable) if part.steps[0].config.output_kind == "model" else ""
        total = size(each.memory.total if each.memory else None)
        room = size(each.room) if each.room else UNKNOWN
        memory.add_row(escape(part.name), counted(each.parameters), trainable, *bytes_of, total, room)
        work.add_row(
            escape(part.name),
            number(each.optimiser_steps),
            number(each.requests),
            number(each.tokens),
            counted(each.flops),
            UNKNOWN if each.seconds is None else format_duration(each.seconds),
            size(each.disk.published) if each.disk.published else "",
            size(each.disk.checkpoints) if each.disk.checkpoints else "",
        )
    yield memory
    yield work


def lines(whole: Whole) -> Iterator[str]:
    """What is to be said beside the tables: the same line of several steps once."""
    told: dict[str, list[str]] = {}
    for part in whole.parts:
        for line in _of(part):
            told.setdefault(line, []).append(part.name)
    for line, names in told.items():
        yield f"{', '.join(names)}: {line}"
    yield _total(whole)
    if whole.memory > whole.room:
        yield (
            f"memory: {whole.side_by_side} steps side by side take up to {size(whole.memory)}, and this machine has"
            f" {size(whole.room)}; --jobs 1 runs one at a time"
        )
    if whole.disk > whole.free:
        yield f"disk: {size(whole.disk)} do not fit; free some space, or name another folder by --runs"


def _of(part: Estimated) -> Iterator[str]:
    each = part.each
    if each.fits is False:
        assert each.memory
        yield f"does not fit: {size(each.memory.total)}, and {each.room_of} has {size(each.room)}"
        for remedy in each.remedies:
            aside = "" if remedy.same_result else "; this changes the result"
            yield f"would fit, with {size(remedy.memory)}, by {', '.join(remedy.changes)}{aside}"
        if not each.remedies:
            more = ", or raise resources.memory" if each.room_of == "resources.memory" else ""
            yield f"no change of the recipe that was tried makes it fit; take a smaller model or a larger machine{more}"
    for unknown in each.unknown:
        yield f"not known: {unknown}"
    if each.formula:
        yield f"FLOPs: {each.formula}"
    if each.speed:
        yield f"time: {each.speed}"
    yield from each.notes


def _total(whole: Whole) -> str:
    count = sum(len(part.steps) for part in whole.parts)
    lacks = any(part.each.seconds is None for part in whole.parts)
    at_least = "at least " if lacks else ""
    return (
        f"all {count} steps: {at_least}{whole.tokens:,} tokens, {counted(whole.flops)} FLOPs,"
        f" {format_duration(whole.seconds)} of work, of which {whole.side_by_side} steps run side by side;"
        f" disk: {size(whole.disk)}, and {size(whole.free)} are free"
    )


def _part(each: Estimate, name: str) -> int | None:
    return getattr(each.memory, name) if each.memory else None


def size(count: float | None) -> str:
    """Bytes in words."""
    if count is None:
        return UNKNOWN
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= bytes_ or unit == "MiB":
            return f"{count / bytes_:.{0 if count >= 100 * bytes_ else 1}f} {unit}"
    raise AssertionError


def counted(count: float | None) -> str:
    """`134.5M`, `1.2e+15`."""
    if count is None:
        return UNKNOWN
    if count >= 1e13:
        return f"{count:.2g}"
    for unit, of in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= of:
            return f"{count / of:.1f}{unit}"
    return f"{count:.0f}"


def number(count: int | None) -> str:
    """With its thousands apart; empty where there is none."""
    return "" if count is None else f"{count:,}"


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
