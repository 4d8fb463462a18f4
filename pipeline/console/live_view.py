"""The live view of a run on a terminal: a bar for each running step, and what is still to come, under the lines that
have scrolled by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TaskID
from rich.table import Table
from rich.text import Text

from stages.records.run_record import StepRecord
from stages.system.terminal_text import safe

LISTED = 16
"""A plan of more steps is counted, not listed."""
MEASURED_SECONDS = 300.0
"""How far back a step's speed is looked at for the time that is left."""
TIMES_A_SECOND = 4
BAR, SHORTEST_BAR = 24, 5
"""Columns of a bar; without room for the shortest there is none."""
SHORTEST_NAME = 12
STATE = 8
"""Columns of a step's state, as in the lines that scroll by."""


class View(Progress):
    """rich's Progress, with a note under every bar and the steps that have not begun below. It is as wide and high as
    the terminal at most.

    Args:
        console: a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._terminal = console
        self.steps: Mapping[str, StepRecord] = {}
        """Step -> what run.json says of it, as long as the run goes on."""
        self.logs = Path()
        """Where the steps' logs lie."""
        self.summary = ""
        """How far the whole run is."""
        self._by_step: dict[str, TaskID] = {}
        super().__init__(  # which draws the view once, so all that it shows is there
            console=console,
            transient=True,
            refresh_per_second=TIMES_A_SECOND,
            speed_estimate_period=MEASURED_SECONDS,
        )

    def begin_step(self, step: str) -> None:
        """A bar for a step, which pulses until it is known how much there is to do."""
        self._by_step[step] = self.add_task(safe(step), total=None, note="")

    def update_step(self, step: str, done: int, total: int, note: str) -> None:
        """How far a step is; one thing to do says nothing of how long that takes."""
        self.update(self._by_step[step], completed=done, total=total if total > 1 else None, note=safe(note))

    def end_step(self, step: str) -> None:
        """Take the step's bar away, if it has one, once it was seen where it ended."""
        if step in self._by_step:
            self.refresh()
            self.remove_task(self._by_step.pop(step))

    def get_renderables(self) -> Iterable[RenderableType]:
        """The lines of the view: as many of them as the terminal has room for, the running steps first."""
        width, height = self._terminal.size
        tasks, room = self.tasks, height - 3  # the two last lines, and the cursor's
        with_notes = 2 * len(tasks) <= room
        shown = tasks if len(tasks) <= room else tasks[: room - 1]
        widths = _widths(tasks, width)
        for task in shown:
            yield _bar(task, *widths)
            if with_notes and task.fields["note"]:
                yield _line(" " * (STATE + 1) + task.fields["note"], "dim")
        if len(shown) < len(tasks):
            yield _line(f"  and {len(tasks) - len(shown)} more running", "dim")
        unmade = [step for step in list(self.steps.values()) if step.state in ("cached", "waiting")]
        if len(self.steps) <= LISTED and (1 + with_notes) * len(tasks) + len(unmade) <= room:
            for step in unmade:
                state = "wait" if step.state == "waiting" else step.state
                yield _line(f"  {state:6} {safe(step.step)}  {step.kind}", "dim")
        yield _line(f"  {self.summary}", "")
        yield _line(f"  logs: {safe(str(self.logs))}/", "dim")


def _widths(tasks: list[Task], width: int) -> tuple[int, int, int]:
    """Columns of names, bars and counts, the same for all steps; the name goes before the bar, the times before it."""
    count = max((len(_count(task)) for task in tasks), default=0)
    room = width - (STATE + 1) - (count + 1) - len("0:00:00 ") - len("0:00:00 left") - 2
    name = min(max((len(task.description) for task in tasks), default=0), max(SHORTEST_NAME, room - SHORTEST_BAR))
    return name, min(BAR, room - name), count


def _bar(task: Task, name: int, bar: int, count: int) -> Table:
    """One step on one line."""
    grid = Table.grid(padding=(0, 1))
    cells: list[tuple[int, RenderableType]] = [
        (STATE, Text("  run", "cyan")),
        (name, Text(task.description)),
        *([(bar, BarColumn(bar_width=bar).render(task))] if bar >= SHORTEST_BAR else []),
        (count, Text(_count(task), justify="right")),
        (7, Text(_clock(task.elapsed))),
        (12, Text(f"{_clock(task.time_remaining)} left" if task.time_remaining is not None else "")),
    ]
    for columns, _ in cells:
        grid.add_column(width=columns, no_wrap=True, overflow="ellipsis")
    grid.add_row(*(cell for _, cell in cells))
    return grid


def _count(task: Task) -> str:
    return f"{task.completed:.0f}/{task.total:.0f}" if task.total else ""


def _clock(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


def _line(text: str, style: str) -> Text:
    """One line, cut where the terminal ends."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")
