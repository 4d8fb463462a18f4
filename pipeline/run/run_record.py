"""run.json: how a run goes, step by step, for whoever looks while it runs and after.

`counted` and `seconds_left` say it in short, from what the file holds; `--status` and the console show the same.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stages.records.past_runs import FILE
from stages.system.integrity import write_json

EVERY_SECONDS = 1.0
"""How often the file is written while steps run, or less often where writing it takes long."""
SHARE = 0.05
"""Of the run's time that writing it may take."""
STATES = ("done", "cached", "failed", "skipped", "interrupted", "running", "waiting", "not asked for")


@dataclass
class Record:
    """What run.json says of a run that this process makes."""

    file: Path
    recipe: str
    width: int
    """How many steps run side by side."""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Step -> {step, kind, labels, state, fingerprint, path, seconds, error, progress}, in the plan's order."""
    _due: float = 0.0

    def write(self, status: str) -> None:
        """Write it. Raises OSError."""
        began = time.monotonic()
        write_json(self.file, self.as_json(status))
        now = time.monotonic()
        self._due = now + max(EVERY_SECONDS, (now - began) / SHARE)

    def write_if_due(self) -> bool:
        """Write it, unless that was done a moment ago; whether it was written."""
        due = time.monotonic() >= self._due
        if due:
            self.write("running")
        return due

    def as_json(self, status: str) -> dict[str, Any]:
        """The file's content."""
        return {
            "recipe": self.recipe,
            "status": status,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "side_by_side": self.width,
            "steps": list(self.steps.values()),
        }


def read(folder: Path) -> dict[str, Any]:
    """What the last run into `folder` left. Raises OSError or ValueError."""
    return json.loads((folder / FILE).read_text(encoding="utf-8"))


def is_gone(record: dict[str, Any]) -> bool:
    """Whether the run was killed: its file says that it runs, but its process, on this machine, does not."""
    if record["status"] != "running" or record["host"] != socket.gethostname():
        return False
    try:
        os.kill(record["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's
    return False


def counted(steps: list[dict[str, Any]]) -> str:
    """`12 of 107 steps done, 1 cached, 2 running, 92 waiting`."""
    counts = Counter(step["state"] for step in steps)
    asked = len(steps) - counts["not asked for"]
    rest = [f"{counts[state]} {state}" for state in STATES[1:-1] if counts[state]]
    return ", ".join([f"{counts['done']} of {asked} steps done", *rest])


def seconds_left(steps: list[dict[str, Any]], width: int) -> float | None:
    """How long the run will still take, as long as its kinds of steps took so far; None where a kind is still to come
    first. Reports are left out: they take a moment."""
    taken: dict[str, list[float]] = {}
    for step in steps:
        if step["state"] == "done":
            taken.setdefault(step["kind"], []).append(step["seconds"])
    means = {kind: sum(seconds) / len(seconds) for kind, seconds in taken.items()}
    work, longest = 0.0, 0.0
    for step in steps:
        if step["state"] not in ("waiting", "running") or step["kind"] == "report":
            continue
        mean = means.get(step["kind"])
        if step["state"] == "running":
            spent, (done, total, _) = step["seconds"] or 0.0, step["progress"] or (0, 0, "")
            mean = max(0.0, mean - spent) if mean else spent * (total - done) / done if done else None
        if mean is None:
            return None
        work, longest = work + mean, max(longest, mean)
    return max(work / width, longest)


def in_words(seconds: float) -> str:
    """`2 h 5 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
