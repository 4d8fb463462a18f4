"""File locks that say who holds them."""

import contextlib
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock

from stages.system.integrity import read_json, write_json


def sign(lock: BaseFileLock) -> None:
    """Write who holds a lock that this process has acquired."""
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        write_json(_signature(lock), f"process {os.getpid()} on {socket.gethostname()}, since {since}")


def holder(lock: BaseFileLock) -> str:
    """Return who holds a lock, as far as it says so."""
    with contextlib.suppress(OSError, ValueError):
        return str(read_json(_signature(lock)))[:200]
    return "an unknown process"


def _signature(lock: BaseFileLock) -> Path:
    """A file of its own, created each time: the lock's file may have a second name somewhere else."""
    return Path(f"{lock.lock_file}.json")
