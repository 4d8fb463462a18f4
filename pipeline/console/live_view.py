"""The live view of a run on a terminal: a bar for each running step, with queued steps below."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from pipeline.console.progress_summary import progress_summary
from stages.records.run_record import StepRecord
from stages.system.terminal_text import safe

MAX_QUEUED = 16
"""Plans with more steps list no queued steps."""
BAR_WIDTH, MIN_BAR_WIDTH, MIN_NAME_WIDTH = 24, 5, 12
"""In columns; a narrower bar is left out."""
STATE_WIDTH = 8
"""Columns of a step's state, as in the console's other lines."""


class LiveView(Progress):
    """rich's Progress with a note under each bar and the queued steps below, cut to the size of the terminal."""

    def __init__(self, console: Console, disable: bool = False) -> None:
        self._terminal = console
        self.steps: Mapping[str, StepRecord] = {}
        self.width = 1
        """How many steps run at once."""
        self.logs = Path()
        self._task_ids: dict[str, TaskID] = {}
        super().__init__(  # draws the view, so all other attributes are set above
            console=console,
            transient=True,
            refresh_per_second=4,
            speed_estimate_period=300,  # seconds that the remaining time is estimated from
            disable=disable,
        )

    def begin_step(self, step: str) -> None:
        """Add a bar for a step. It pulses until the amount of work is known."""
        self._task_ids[step] = self.add_task(safe(step), total=None, note="")

    def update_step(self, step: str, done: int, total: int, note: str) -> None:
        """Update a step's bar. It keeps pulsing for a total of 1, which gives no speed."""
        self.update(self._task_ids[step], completed=done, total=total if total > 1 else None, note=safe(note))

    def end_step(self, step: str) -> None:
        if step in self._task_ids:
            self.refresh()
            self.remove_task(self._task_ids.pop(step))

    def summary(self) -> str:
        return progress_summary(list(self.steps.values()), self.width)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return as many lines as the terminal has room for, the running steps first."""
        width, height = self._terminal.size
        tasks, room = self.tasks, height - 3  # minus the last two lines and the cursor's
        with_notes = 2 * len(tasks) <= room
        shown = tasks if len(tasks) <= room else tasks[: room - 1]
        widths = _widths(tasks, width)
        for task in shown:
            yield _bar(task, *widths)
            if with_notes and task.fields["note"]:
                yield _line(" " * (STATE_WIDTH + 1) + task.fields["note"], "dim")
        if len(shown) < len(tasks):
            yield _line(f"  and {len(tasks) - len(shown)} more running", "dim")
        queued = [step for step in list(self.steps.values()) if step.state in ("cached", "waiting")]
        if len(self.steps) <= MAX_QUEUED and (1 + with_notes) * len(tasks) + len(queued) <= room:
            for step in queued:
                state = "wait" if step.state == "waiting" else step.state
                yield _line(f"  {state:6} {safe(step.step)}  {step.kind}", "dim")
        yield _line(f"  {self.summary()}", "")
        yield _line(f"  logs: {safe(str(self.logs))}/", "dim")


def _widths(tasks: list[Task], width: int) -> tuple[int, int, int]:
    """Return the columns of names, bars and counts, the same for all steps. Bars shrink first, then names."""
    count = max((len(_count(task)) for task in tasks), default=0)
    room = width - (STATE_WIDTH + 1) - (count + 1) - len("0:00:00 ") - len("0:00:00 left") - 2
    name = min(max((len(task.description) for task in tasks), default=0), max(MIN_NAME_WIDTH, room - MIN_BAR_WIDTH))
    return name, min(BAR_WIDTH, room - name), count


def _bar(task: Task, name: int, bar: int, count: int) -> Table:
    cells: list[tuple[int, RenderableType]] = [
        (STATE_WIDTH, Text("  run", "cyan")),
        (name, Text(task.description)),
        *([(bar, BarColumn(bar_width=bar).render(task))] if bar >= MIN_BAR_WIDTH else []),
        (count, Text(_count(task), justify="right")),
        (7, Text(_clock(task.elapsed))),
        (12, Text(f"{_clock(task.time_remaining)} left" if task.time_remaining is not None else "")),
    ]
    columns = [Column(width=width, no_wrap=True, overflow="ellipsis") for width, _ in cells]
    grid = Table.grid(*columns, padding=(0, 1))
    grid.add_row(*(cell for _, cell in cells))
    return grid


def _count(task: Task) -> str:
    return f"{task.completed:.0f}/{task.total:.0f}" if task.total else ""


def _clock(seconds: float | None) -> str:
    return str(timedelta(seconds=int(seconds or 0)))


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")
