"""Which step may start next: those whose needs are settled, in the order of the plan.

Every question costs the same whatever the number of steps, so that ten thousand are scheduled as briskly as ten. What a
step's needs came out as, and whether there is room for it, is judged by pipeline.run.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from pipeline.plan.planner import Step


class Schedule:
    """The steps of a plan, and how far they are.

    A step is *settled* when nothing more is to happen to it. It is *reached* when all that it needs is settled; whoever
    asks for it then either lets it start or settles it.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._position = {step.name: index for index, step in enumerate(steps)}
        self._dependents: dict[str, list[Step]] = {step.name: [] for step in steps}
        self._open: dict[str, int] = {}
        for step in steps:
            self._open[step.name] = len(step.needs)
            for need in step.needs:
                self._dependents[need.name].append(step)
        self._reached = deque(step for step in steps if not self._open[step.name])
        self._ready: list[tuple[int, Step]] = []

    def reached(self) -> Iterator[Step]:
        """The steps that have been reached since this was asked last, and those that settling them reaches."""
        while self._reached:
            yield self._reached.popleft()

    def settle(self, step: Step) -> None:
        """Nothing more happens to `step`."""
        for dependent in self._dependents[step.name]:
            self._open[dependent.name] -= 1
            if not self._open[dependent.name]:
                self._reached.append(dependent)

    def put(self, step: Step) -> None:
        """`step` may start."""
        heapq.heappush(self._ready, (self._position[step.name], step))

    def take(self) -> Step | None:
        """The first that may start, which is handed out once; None where there is none."""
        return heapq.heappop(self._ready)[1] if self._ready else None

    def put_back(self, steps: Iterable[Step]) -> None:
        """Those that were taken and could not start."""
        for step in steps:
            self.put(step)

    def __bool__(self) -> bool:
        """Whether any step may start."""
        return bool(self._ready)
