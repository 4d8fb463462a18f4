"""What a person sees: the plan, the steps as they run, and the results. Plain lines where there is no terminal."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.markup import escape as as_text
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.console.live_view import LiveView
from pipeline.console.recipe_list import RecipeEntry
from pipeline.plan.planner import Plan, Step
from pipeline.run import run_record as record
from stages.system.terminal_text import safe

PLAIN_WIDTH = 160
"""Columns of tables where no terminal says how many fit: a log or a pipe."""
NARROW = 100
"""Columns below which a plan leaves the fingerprints out."""
PLAIN_SECONDS = 300.0
"""How often plain lines say how far a step is."""
LOG_LINES = 6
"""How many of a failed step's last log lines are shown."""
LOG_BYTES = 2**16
"""How much of the end of a log is read for them."""
IN_FULL = 3
"""Of how many failed steps all is told; the others are named."""


def escape(text: str) -> str:
    """`text` as it is: neither rich's markup nor what steers a terminal has effect in it."""
    return as_text(safe(text))


@dataclass(frozen=True)
class Failure:
    """Why a step failed."""

    step: str
    error: str
    log: Path
    is_user_error: bool
    """Whether the error says all that it takes to mend it."""


class Console:
    """Writes to standard output, or to standard error where `quiet_stdout` keeps the former for JSON.

    On a terminal there is a live view, and colour; with NO_COLOR, or TERM=dumb, plain lines as anywhere else.
    """

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.rich = Rich(stderr=quiet_stdout, highlight=False, soft_wrap=True)
        on_terminal = self.rich.file.isatty()
        if on_terminal and (self.rich.no_color or self.rich.is_dumb_terminal):
            self.rich = Rich(stderr=quiet_stdout, highlight=False, soft_wrap=True, force_terminal=False)
        elif not on_terminal:
            self.rich.width = max(self.rich.width, PLAIN_WIDTH)
        self._view = LiveView(self.rich) if on_terminal and self.rich.is_terminal else None
        self._failures: list[Failure] = []
        self._told_at: dict[str, float] = {}
        """Step -> when a line last said how far it is."""

    def say(self, text: str) -> None:
        """One line."""
        self._print(escape(text))

    def recipes(self, found: list[RecipeEntry]) -> None:
        """The recipes near by, each on a line of its own."""
        if found:
            width = max(len(str(each.path)) for each in found)
            for each in found:
                line = Text(f"{safe(str(each.path)):{width}}  {safe(each.about)}")
                line.stylize("bold", 0, width)
                self.rich.print(line, soft_wrap=False, no_wrap=True, overflow="ellipsis")
            self.say("\nrun one by: run-recipe RECIPE; run-recipe --help says more")
        else:
            self.say("no recipe here or in recipes/: name one, run-recipe PATH, or go to a folder that has some")
            self.say("run-recipe --help says more, and README.md how to write one")

    def plan(self, plan: Plan, chosen: set[str]) -> None:
        """The chosen steps with their state and why, for --plan."""
        table = Table("step", "kind", "state", box=None, header_style="bold")
        for column in table.columns:  # names are there to be copied
            column.no_wrap, column.overflow = True, "fold"
        with_fingerprints = self.rich.width >= NARROW
        for name in ("fingerprint", "why") if with_fingerprints else ("why",):
            table.add_column(name, overflow="fold")
        for step in (step for step in plan.steps if step.name in chosen):
            fingerprint = [(step.fingerprint or "unresolved")[:12]] if with_fingerprints else []
            table.add_row(*map(escape, (step.name, step.kind, step.state, *fingerprint, step.why)))
        self.rich.print(table)
        shown = [step for step in plan.steps if step.name in chosen]
        self._told("runs code", ((step, code) for step in shown for code in step.runs_code))
        self.asks((step, asked) for step in shown for asked in step.paid_requests)

    def asks(self, asked: Iterable[tuple[Step, str]]) -> None:
        """What steps will ask of a service, each of them."""
        self._told("asks", asked)

    def _told(self, what: str, lines: Iterable[tuple[Step, str]]) -> None:
        """A line for each stage and thing to be told, however many steps it is told of."""
        found: dict[tuple[str, str], list[str]] = {}
        for step, line in lines:
            found.setdefault((step.stage, line), []).append(step.name)
        for (stage, line), steps in found.items():
            who = steps[0] if len(steps) == 1 else f"{stage} ({len(steps)} steps)"
            self._print(f"[yellow]{what}[/] {escape(who)}: {escape(line)}")

    def preview(self, text: str, page: Path) -> None:
        """What a stage would train on, as the stage has drawn it, and where it lies as a page."""
        self.rich.file.write(f"\n{text}\n")
        self.say(f"page: {page}")

    def begin(self, steps: Mapping[str, dict[str, Any]], logs: Path) -> None:
        """Steps are about to run: `steps` is what run.json says of each, `logs` the folder that their output goes
        to."""
        if self._view:
            self._view.steps, self._view.logs = steps, logs
            self._view.start()
        else:
            self.say(f"logs: {logs}/")

    def estimate(self, tables: Iterable[Table], lines: Iterable[str]) -> None:
        """What steps take, for --estimate: tables, or where they are too wide a line for each of their rows."""
        wide = self.rich.options.update(max_width=10_000)
        for table in tables:
            self.rich.print()
            if Measurement.get(self.rich, wide, table).maximum <= self.rich.width:
                self.rich.print(table)
                continue
            heads = [str(column.header) for column in table.columns]
            for step, *cells in zip(*(column.cells for column in table.columns), strict=True):
                told = ", ".join(f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True) if cell)
                self._print(f"[bold]{step}[/]: {told}")
        self.rich.print()
        for line in lines:
            self.say(line)

    def started(self, step: str, why: str) -> None:
        """A step began to run."""
        if self._view:
            self._view.begin_step(step)
        else:
            self._print(f"  [cyan]run[/]    {escape(step)} [dim]({escape(why)})")

    def how_far(self, text: Callable[[], str]) -> None:
        """How far the whole run is; found out and shown on a terminal only."""
        if self._view:
            self._view.status = text()

    def progress(self, step: str, done: int, total: int, note: str) -> None:
        """A running step got on; where there is no terminal, a line says so every now and then."""
        if self._view:
            self._view.update_step(step, done, total, note)
        elif time.monotonic() - self._told_at.setdefault(step, time.monotonic()) >= PLAIN_SECONDS:
            self._told_at[step] = time.monotonic()
            self._print(f"  [dim]at[/]     {escape(step)} [dim]{done}/{total} {escape(note)}".rstrip())

    def finished(self, step: str, seconds: float, notes: list[str], how_far: str) -> None:
        """A step has its result; `notes` are what its stage wants to be known of it, `how_far` says how far the run
        is."""
        self._end(step)
        self.how_far(lambda: how_far)
        self._print(f"  [green]done[/]   {escape(step)} [dim]{seconds:.1f} s ({escape(how_far)})")
        for note in notes:
            self._print(f"         [dim]{escape(note)}")

    def status(self, found: dict[str, Any]) -> None:
        """What run.json says of a run, for --status."""
        how = "killed: its process is gone; the same command goes on" if record.is_gone(found) else found["status"]
        steps, width = found["steps"], found["side_by_side"]
        left = record.seconds_left(steps, width) if how == "running" else None
        self.say(f"{found['recipe']}: {how}, as of {found['written']}")
        self.say(f"  {record.counted(steps)}" + (f", about {record.in_words(left)} left" if left else ""))
        for step in (step for step in steps if step["state"] == "running"):
            done, total, note = step["progress"] or (0, 0, "")
            far = f" {done}/{total}" if total else ""
            self.say(f"  run    {step['step']}{far} {step['seconds'] or 0:.0f} s {note}".rstrip())
        for step in (step for step in steps if step["state"] == "failed"):
            self.say(f"  failed {step['step']}: {step['error']}")

    def skipped(self, step: str, needs: list[str]) -> None:
        """A step cannot run, for what it needs failed."""
        self._print(f"  [yellow]skip[/]   {escape(step)}: needs {escape(', '.join(needs))}")

    def failed(self, step: str, error: str, log: Path, is_user_error: bool) -> None:
        """A step failed; the rest of it is told when the run is at its end."""
        self._end(step)
        self._failures.append(Failure(step, error, log, is_user_error))
        self._print(f"  [red]failed[/] {escape(step)}: {escape(error)}")

    def not_made(self, steps: Iterable[dict[str, Any]], command: str) -> None:
        """At the end of a run, the steps that failed and why, what could not be made for want of them, and the command
        that goes on."""
        self.close()
        skipped = sum(step["state"] == "skipped" for step in steps)
        also = f"; {skipped} more need them" if skipped else ""
        names = ", ".join(failure.step for failure in self._failures)
        self._print(f"\n[red]{len(self._failures)} failed[/]: {escape(names)}{also}")
        for failure in self._failures[:IN_FULL]:
            self._print(f"\n  [red]failed[/] {escape(failure.step)}: {escape(failure.error)}")
            for line in [] if failure.is_user_error else _last_words(failure):
                self._print(f"    [dim]{escape(line)}")
            self._print(f"    log: {escape(str(failure.log))}")
        if len(self._failures) > IN_FULL:
            logs = self._failures[0].log.parent
            self.say(f"\n  and {len(self._failures) - IN_FULL} more, whose logs lie there too: {logs}/")
        self.say(f"\nto go on with the steps that have no result:\n  {command}")

    def results(self, folder: Path, metrics: dict[str, Any]) -> None:
        """The report's own table, and where the report lies."""
        self.close()
        shown = metrics["table"]
        table = Table(*map(escape, shown["columns"]), box=None, header_style="bold", pad_edge=False)
        for column in table.columns:
            column.overflow = "fold"
            column.justify = "right" if column is not table.columns[0] else "left"
        for row in shown["rows"]:
            table.add_row(*map(escape, row))
        self.rich.print()
        self.rich.print(table, soft_wrap=False)
        self.rich.print()
        self.say(re.sub(r"(?<=\.) ", "\n", metrics["summary"]))  # a sentence a line
        self.say(f"report: {folder / 'report.html'}")

    def close(self) -> None:
        """Take the live view off the screen."""
        if self._view:
            self._view.stop()

    def _print(self, text: str) -> None:
        """One line, above the view where there is one: with its lock, or the view, drawn by its own thread between the
        finding of its height and the writing of the line, would be erased from too far up."""
        with self._view.live._lock if self._view else contextlib.nullcontext():
            self.rich.print(text)

    def _end(self, step: str) -> None:
        if self._view:
            self._view.end_step(step)


def _last_words(failure: Failure) -> list[str]:
    """The last lines of the step's log, of progress bars what was seen last, but for the error itself."""
    if not failure.log.is_file():
        return []
    with failure.log.open("rb") as file:
        file.seek(max(0, failure.log.stat().st_size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    last = (line.rstrip().rpartition("\r")[2] for line in text.split("\n"))
    lines = [seen for line in last if (seen := Text.from_ansi(line).plain.rstrip())]
    return [line for line in lines if line != failure.error][-LOG_LINES:]
