"""Limits to work that a foreign text decides: a chat template, or a regular expression of a recipe."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = 2**32
"""Bytes that a block may allocate."""
END_SIGNAL = signal.SIGPROF
END_TEXT = "a chat template, a pattern or a filter that it was given does not end; read those of its model and tasks"
"""Why a process ends by END_SIGNAL."""
_MEMORY_FILE = Path("/proc/self/statm")


class LimitExceeded(BaseException):
    """The block took longer than it may. Not an Exception, so that no library takes it for an error of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise LimitExceeded in a block that takes longer, and MemoryError if it allocates more than MEMORY.

    Regular expressions and templates can be interrupted. A single operation in C, such as the comparison of lists,
    cannot: after three times as many seconds of computing, END_SIGNAL ends the process. Only main threads have limits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    is_running = True

    def stop(*_: Any) -> None:
        if is_running:
            raise LimitExceeded(f"takes longer than {seconds:g} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if _MEMORY_FILE.exists() and soft == resource.RLIM_INFINITY:
        used = int(_MEMORY_FILE.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again, since Python ignores what a destructor raises
    signal.setitimer(signal.ITIMER_PROF, 3 * seconds)
    try:
        yield
    finally:
        is_running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
