"""What a person sees: the plan, the steps as they run, and the results. Plain lines where there is no terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console as Rich
from rich.markup import escape as as_text
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline import record
from pipeline.plan import Plan, Step
from stages.terminal import safe

PLAIN_WIDTH = 160
"""Columns of tables where no terminal says how many fit: a log or a pipe."""
LOG_LINES = 6
"""How many of a failed step's last log lines are shown."""


def escape(text: str) -> str:
    """`text` as it is: neither rich's markup nor what steers a terminal has effect in it."""
    return as_text(safe(text))


class Console:
    """Writes to standard output, or to standard error where `quiet_stdout` keeps the former for JSON."""

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.rich = Rich(stderr=quiet_stdout, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal:
            self.rich.width = max(self.rich.width, PLAIN_WIDTH)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.rich,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._whole: TaskID | None = None

    def say(self, text: str) -> None:
        """One line."""
        self.rich.print(escape(text))

    def plan(self, plan: Plan, chosen: set[str]) -> None:
        """The chosen steps with their state and why, for --plan."""
        table = Table("step", "kind", "state", "fingerprint", "why", box=None, header_style="bold")
        for step in (step for step in plan.steps if step.name in chosen):
            fingerprint = (step.fingerprint or "unresolved")[:12]
            table.add_row(*map(escape, (step.name, step.kind, step.state, fingerprint, step.why)))
        self.rich.print(table)
        shown = [step for step in plan.steps if step.name in chosen]
        self._told("runs code", ((step, code) for step in shown for code in step.runs_code))
        self.asks((step, asked) for step in shown for asked in step.asks)

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
            self.rich.print(f"[yellow]{what}[/] {escape(who)}: {escape(line)}")

    def preview(self, text: str, page: Path) -> None:
        """What a stage would train on, as the stage has drawn it, and where it lies as a page."""
        self.rich.file.write(f"\n{text}\n")
        self.say(f"page: {page}")

    def estimate(self, tables: Iterable[Table], lines: Iterable[str]) -> None:
        """What steps take, for --estimate."""
        for table in tables:
            self.rich.print()
            self.rich.print(table)
        self.rich.print()
        for line in lines:
            self.say(line)

    def started(self, step: str, why: str) -> None:
        """A step began to run."""
        if self.rich.is_terminal:
            self._bars.start()
            self._tasks[step] = self._bars.add_task(escape(step), total=None, note="")
        else:
            self.rich.print(f"  [cyan]run[/]    {escape(step)} [dim]({escape(why)})")

    def how_far(self, text: str) -> None:
        """How far the whole run is; shown on a terminal only."""
        if self._bars.live.is_started:
            if self._whole is None:
                self._whole = self._bars.add_task("", total=None, note="")
            self._bars.update(self._whole, note=escape(text))

    def progress(self, step: str, done: int, total: int, note: str) -> None:
        """A running step got on; shown on a terminal only."""
        if step in self._tasks:
            self._bars.update(self._tasks[step], completed=done, total=total or None, note=escape(note))

    def finished(self, step: str, seconds: float, notes: list[str], how_far: str) -> None:
        """A step has its result; `notes` are what its stage wants to be known of it, `how_far` says how far the run
        is."""
        self._end(step)
        self.rich.print(f"  [green]done[/]   {escape(step)} [dim]{seconds:.1f} s ({escape(how_far)})")
        for note in notes:
            self.rich.print(f"         [dim]{escape(note)}")

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
        self.rich.print(f"  [yellow]skip[/]   {escape(step)}: needs {escape(', '.join(needs))}")

    def failed(self, step: str, error: str, log: Path, mendable: bool) -> None:
        """A step failed: why, where its log lies, and what that last said unless the error says what to mend."""
        self._end(step)
        self.rich.print(f"  [red]failed[/] {escape(step)}: {escape(error)}")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        for line in [] if mendable else lines[-LOG_LINES:]:
            self.rich.print(f"           [dim]{escape(line)}")
        self.rich.print(f"         log: {escape(str(log))}")

    def not_made(self, steps: list[dict[str, Any]]) -> None:
        """At the end of a run, the steps that failed, with what could not be made for want of them."""
        self.close()
        failed = [step["step"] for step in steps if step["state"] == "failed"]
        skipped = sum(step["state"] == "skipped" for step in steps)
        also = f"; {skipped} more need them" if skipped else ""
        self.rich.print(f"[red]{len(failed)} failed[/]: {escape(', '.join(failed))}{also}")

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
        """Take the bars off the screen."""
        if self._bars.live.is_started:
            self._bars.stop()

    def _end(self, step: str) -> None:
        if step in self._tasks:
            self._bars.remove_task(self._tasks.pop(step))
