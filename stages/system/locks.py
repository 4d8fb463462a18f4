"""File locks that say who holds them."""

import contextlib
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock


def sign(lock: BaseFileLock) -> None:
    """Write who holds a lock that this process has acquired."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        Path(lock.lock_file).write_text(f"process {os.getpid()} on {socket.gethostname()}, since {since}", "utf-8")


def holder(lock: BaseFileLock) -> str:
    """Return who holds a lock, as far as it says so."""
    with contextlib.suppress(OSError, ValueError):
        return Path(lock.lock_file).read_text("utf-8")[:200] or "an unknown process"
    return "an unknown process"
