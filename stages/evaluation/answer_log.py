"""Answers kept on disk as they come, so that a killed step pays for none twice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any


class AnswerLog:
    """A mapping in a file that is only ever added to; of a key that was added twice, the last value counts.

    Args:
        file: made where it is not there. What was being written when its process was killed is dropped.
    """

    def __init__(self, file: Path) -> None:
        self._values: dict[str, Any] = {}
        self._new: dict[str, Any] = {}
        whole = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
            if not line.endswith(b"\n"):
                break
            self._values |= json.loads(line)
            whole += len(line)
        self._file = file.open("ab")
        self._file.truncate(whole)
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Add what JSON can hold; it is on disk after the next flush, all that was added since the last or nothing."""
        with self._lock:
            self._values[key] = self._new[key] = value

    def flush(self) -> None:
        """Write what was added: it outlives the process, though not always a machine that loses power."""
        with self._lock:
            if self._new:
                self._file.write(json.dumps(self._new).encode() + b"\n")
                self._file.flush()
                self._new = {}
