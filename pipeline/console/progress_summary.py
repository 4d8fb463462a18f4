"""How far a run is, in one sentence: counts of steps and the time left."""

from collections import Counter
from collections.abc import Sequence

from stages.records.run_record import STATES, StepRecord


def progress_summary(steps: Sequence[StepRecord], width: int) -> str:
    """`12 of 107 steps done, 95 waiting, about 20 min left`."""
    seconds = seconds_left(steps, width)
    return count_steps(steps) + (f", about {format_duration(seconds)} left" if seconds else "")


def count_steps(steps: Sequence[StepRecord]) -> str:
    """`12 of 107 steps done, 1 cached, 2 running, 92 waiting`."""
    counts = Counter(step.state for step in steps)
    selected = len(steps) - counts["not asked for"]
    others = [f"{counts[state]} {state}" for state in STATES[1:-1] if counts[state]]
    return ", ".join([f"{counts['done']} of {selected} steps done", *others])


def seconds_left(steps: Sequence[StepRecord], width: int) -> float | None:
    """Estimate the seconds left from the mean time of each kind of step so far; None if a kind has not finished yet.

    `width` is how many steps run at once. Reports are not counted: they take a moment.
    """
    times: dict[str, list[float]] = {}
    for step in steps:
        if step.state == "done" and step.seconds is not None:
            times.setdefault(step.kind, []).append(step.seconds)
    means = {kind: sum(seconds) / len(seconds) for kind, seconds in times.items()}
    total, longest = 0.0, 0.0
    for step in steps:
        if step.state not in ("waiting", "running") or step.kind == "report":
            continue
        left = means.get(step.kind)
        if step.state == "running":
            elapsed, (done, count, _) = step.seconds or 0.0, step.progress or (0, 0, "")
            left = max(0.0, left - elapsed) if left else elapsed * (count - done) / done if done else None
        if left is None:
            return None
        total, longest = total + left, max(longest, left)
    return max(total / width, longest)


def format_duration(seconds: float) -> str:
    """`2 h 5 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
