"""Everything that the command shows: the plan, the running steps, the results. Plain lines if there is no terminal."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as Rich
from rich.markup import escape as escape_markup
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pipeline.console.live_view import LiveView
from pipeline.console.progress_summary import count_steps, progress_summary
from pipeline.plan.selection import StepSummary
from pipeline.plan.step import Plan
from stages.records.metrics import Metrics
from stages.records.run_record import Progress, RunRecord, StepRecord
from stages.system.terminal_text import safe

PLAIN_WIDTH = 160
"""Columns of tables in a log or a pipe."""
FINGERPRINT_WIDTH = 100
"""Columns that a terminal needs for a plan with fingerprints."""
PLAIN_SECONDS = 300.0
"""Interval between plain lines about the progress of a step."""
LOG_LINES = 6
"""Number of lines of a failed step's log that are shown."""
LOG_BYTES = 2**16
"""Size of the end of the log in which they are looked for."""
MAX_FAILURES = 3
"""Number of failed steps that are shown in full; the others are named."""


def escape(text: str) -> str:
    """`text` without effect as rich's markup or as control characters."""
    return escape_markup(safe(text))


@dataclass(frozen=True)
class Failure:
    """Why a step failed."""

    step: str
    error: str
    log: Path
    is_user_error: bool
    """Whether the error message is enough to fix it, without the log."""


class _Rich(Rich):
    def on_broken_pipe(self) -> None:
        """Let the command end as it does when its JSON is cut off; rich would exit with 1."""
        raise BrokenPipeError


class Console:
    """Writes to standard output, or to standard error if `quiet_stdout` reserves standard output for JSON.

    A terminal has a live view and colours; with NO_COLOR or TERM=dumb, and everywhere else, there are plain lines.
    """

    def __init__(self, quiet_stdout: bool = False) -> None:
        self.rich = _Rich(stderr=quiet_stdout, highlight=False, soft_wrap=True)
        on_terminal = self.rich.file.isatty()
        if on_terminal and (self.rich.no_color or self.rich.is_dumb_terminal):
            self.rich = _Rich(stderr=quiet_stdout, highlight=False, soft_wrap=True, force_terminal=False)
        elif not on_terminal:
            self.rich.width = max(self.rich.width, PLAIN_WIDTH)
        self._view = LiveView(self.rich, disable=not (on_terminal and self.rich.is_terminal))
        self._failures: list[Failure] = []
        self._progress_shown: dict[str, float] = {}
        """Step -> when the last plain line about its progress was written."""

    def say(self, text: str) -> None:
        self._print(escape(text))

    def recipes(self, recipes: Mapping[Path, str]) -> None:
        """Show recipes: path -> description."""
        if not recipes:
            self.say("no recipe here or in recipes/: name one, run-recipe PATH, or go to a folder that has some")
            self.say("run-recipe --help lists the options, and README.md shows how to write one")
            return
        width = max(len(str(path)) for path in recipes)
        for path, about in recipes.items():
            line = Text(f"{safe(str(path)):{width}}  {safe(about)}")
            line.stylize("bold", 0, width)
            self.rich.print(line, soft_wrap=False, no_wrap=True, overflow="ellipsis")
        self.say("\nrun one with: run-recipe RECIPE; run-recipe --help lists the options")

    def plan(self, plan: Plan, steps: Sequence[StepSummary]) -> None:
        """Show steps with their state and reason, for --plan."""
        table = Table("step", "kind", "state", box=None, header_style="bold")
        for column in table.columns:  # names are there to be copied
            column.no_wrap, column.overflow = True, "fold"
        has_fingerprints = self.rich.width >= FINGERPRINT_WIDTH
        for name in ("fingerprint", "why") if has_fingerprints else ("why",):
            table.add_column(name, overflow="fold")
        for step in steps:
            fingerprint = [(step.fingerprint or "unresolved")[:12]] if has_fingerprints else []
            table.add_row(*map(escape, (step.step, step.kind, step.state, *fingerprint, step.why)))
        self.rich.print(table)
        stages = {step.name: step.stage for step in plan.steps}
        self.by_stage("runs code", ((stages[s.step], s.step, code) for s in steps for code in s.runs_code))
        self.by_stage("reads", ((stages[s.step], s.step, ", ".join(s.reads)) for s in steps if s.reads))
        self.by_stage("asks", ((stages[s.step], s.step, request) for s in steps for request in s.asks))

    def notes(self, notes: Iterable[str]) -> None:
        """Show notes about likely slips."""
        for note in notes:
            self._print(f"[yellow]note[/] {escape(note)}")

    def by_stage(self, title: str, lines: Iterable[tuple[str, str, str]]) -> None:
        """Show stage, step and text: one line for each stage and text, with the number of its steps."""
        steps_of: dict[tuple[str, str], list[str]] = {}
        for stage, step, text in lines:
            steps_of.setdefault((stage, text), []).append(step)
        for (stage, text), steps in steps_of.items():
            subject = steps[0] if len(steps) == 1 else f"{stage} ({len(steps)} steps)"
            self._print(f"[yellow]{title}[/] {escape(subject)}: {escape(text)}")

    def preview(self, text: str, page: Path) -> None:
        """Show the preview of a step, drawn by its stage, and the path of its page."""
        self.rich.file.write(f"\n{text}\n")
        self.say(f"page: {page}")

    def estimate(self, tables: Iterable[Table], lines: Iterable[str]) -> None:
        """Show the cost of steps, for --estimate. A table that is too wide becomes one line for each row."""
        unlimited = self.rich.options.update(max_width=10_000)
        for table in tables:
            self.rich.print()
            if Measurement.get(self.rich, unlimited, table).maximum <= self.rich.width:
                self.rich.print(table)
                continue
            heads = [str(column.header) for column in table.columns]
            for step, *cells in zip(*(column.cells for column in table.columns), strict=True):
                row = ", ".join(f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True) if cell)
                self._print(f"[bold]{step}[/]: {row}")
        self.rich.print()
        for line in lines:
            self.say(line)

    def begin(self, steps: Mapping[str, StepRecord], width: int, logs: Path) -> None:
        """Steps are about to run, `width` at once: `steps` stays up to date, `logs` is the folder of their output."""
        self._view.steps, self._view.width, self._view.logs = steps, width, logs
        self._view.start()
        if self._view.disable:
            self.say(f"logs: {logs}/")

    def started(self, step: str, reason: str) -> None:
        self._view.begin_step(step)
        if self._view.disable:
            self._print(f"  [cyan]run[/]    {escape(step)} [dim]({escape(reason)})")

    def progress(self, step: str, progress: Progress) -> None:
        """A running step advanced. Without a terminal a line says so every few minutes."""
        done, total, note = progress
        if not self._view.disable:
            self._view.update_step(step, done, total, note)
        elif time.monotonic() - self._progress_shown.setdefault(step, time.monotonic()) >= PLAIN_SECONDS:
            self._progress_shown[step] = time.monotonic()
            self._print(f"  [dim]at[/]     {escape(step)} [dim]{done}/{total} {escape(note)}".rstrip())

    def ended(self, step: str) -> None:
        """A step does not run any more, however it ended."""
        self._view.end_step(step)

    def finished(self, step: str, notes: Sequence[str]) -> None:
        """A step was published; `notes` are its stage's remarks."""
        summary, seconds = self._view.summary(), self._view.steps[step].seconds
        self._print(f"  [green]done[/]   {escape(step)} [dim]{seconds:.1f} s ({escape(summary)})")
        for note in notes:
            self._print(f"         [dim]{escape(note)}")

    def skipped(self, step: str, failed: Sequence[str]) -> None:
        """A step cannot run because steps it depends on failed."""
        self._print(f"  [yellow]skip[/]   {escape(step)}: needs {escape(', '.join(failed))}")

    def failed(self, step: str, error: str, log: Path, is_user_error: bool) -> None:
        """A step failed. `failures` shows the details at the end of the run."""
        self._failures.append(Failure(step, error, log, is_user_error))
        self._print(f"  [red]failed[/] {escape(step)}: {escape(error)}")

    def failures(self, steps: Iterable[StepRecord], command: str) -> None:
        """At the end of a run: the failed steps and why, how many steps were skipped, and the command that
        continues."""
        self.close()
        skipped = sum(step.state == "skipped" for step in steps)
        suffix = f"; {skipped} more need them" if skipped else ""
        names = ", ".join(failure.step for failure in self._failures)
        self._print(f"\n[red]{len(self._failures)} failed[/]: {escape(names)}{suffix}")
        causes: dict[str, list[Failure]] = {}
        for failure in self._failures:
            causes.setdefault(failure.error, []).append(failure)
        for failure, *others in list(causes.values())[:MAX_FAILURES]:
            count = f" and {len(others)} more" if others else ""
            self._print(f"\n  [red]failed[/] {escape(failure.step)}{count}: {escape(failure.error)}")
            for line in [] if failure.is_user_error else _last_lines(failure):
                self._print(f"    [dim]{escape(line)}")
            self._print(f"    log: {escape(str(failure.log))}")
        if len(causes) > MAX_FAILURES:
            logs = self._failures[0].log.parent
            self.say(f"\n  and {len(causes) - MAX_FAILURES} more errors, with logs in the same folder: {logs}/")
        self.say(f"\nto continue with the steps that have no result:\n  {command}")

    def status(self, run: RunRecord) -> None:
        status = "killed: its process is gone; the same command continues it" if run.was_killed else run.status
        is_running = status == "running"
        self.say(f"{run.recipe}: {status}, as of {run.written}")
        self.say(f"  {progress_summary(run.steps, run.side_by_side) if is_running else count_steps(run.steps)}")
        for step in run.steps:
            if step.state == "running":
                done, total, note = step.progress or (0, 0, "")
                count = f" {done}/{total}" if total else ""
                self.say(f"  run    {step.step}{count} {step.seconds or 0:.0f} s {note}".rstrip())
        for step in run.steps:
            if step.state == "failed":
                self.say(f"  failed {step.step}: {step.error}")

    def results(self, folder: Path, metrics: Metrics) -> None:
        """Show a report's table and sentences, and the path of its page."""
        self.close()
        assert metrics.table is not None
        table = Table(*map(escape, metrics.table.columns), box=None, header_style="bold", pad_edge=False)
        for column in table.columns:
            column.overflow = "fold"
            column.justify = "right" if column is not table.columns[0] else "left"
        for row in metrics.table.rows:
            table.add_row(*map(escape, row))
        self.rich.print()
        self.rich.print(table, soft_wrap=False)
        self.rich.print()
        self.say(re.sub(r"(?<=\.) ", "\n", metrics.summary or ""))  # one sentence on each line
        self.say(f"report: {folder / 'report.html'}")

    def close(self) -> None:
        """Remove the live view from the screen."""
        if not self._view.disable:  # older versions of rich would print an empty line
            self._view.stop()

    def _print(self, text: str) -> None:
        """Print a line above the live view.

        The view's own lock is held meanwhile: its thread would otherwise draw between measuring the view's height and
        writing the line, and erase lines that are not its own. rich has no public name for the lock.
        """
        with self._view.live._lock:
            self.rich.print(text)


def _last_lines(failure: Failure) -> list[str]:
    """The last lines of the step's log without the error itself; of progress bars the last state."""
    if not failure.log.is_file():
        return []
    with failure.log.open("rb") as file:
        file.seek(max(0, failure.log.stat().st_size - LOG_BYTES))
        text = file.read().decode(errors="replace")
    raw = (line.rstrip().rpartition("\r")[2] for line in text.split("\n"))
    lines = [plain for line in raw if (plain := Text.from_ansi(line).plain.rstrip())]
    return [line for line in lines if line != failure.error][-LOG_LINES:]
