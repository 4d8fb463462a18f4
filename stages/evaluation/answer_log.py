"""Answers stored on disk as they arrive, so that a resumed step asks for none of them again."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any


class AnswerLog:
    """A mapping of keys to JSON values in an append-only file of JSON lines. The last value of a key counts.

    An incomplete last line, as a killed process leaves one, is removed.
    """

    def __init__(self, file: Path) -> None:
        self._values: dict[str, Any] = {}
        self._unwritten: dict[str, Any] = {}
        size = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
            if not line.endswith(b"\n"):
                break
            self._values |= json.loads(line)
            size += len(line)
        self._file = file.open("ab")
        self._file.truncate(size)
        self._lock = threading.Lock()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Add a value. The next flush writes all values added since the last one, in one line."""
        with self._lock:
            self._values[key] = self._unwritten[key] = value

    def flush(self) -> None:
        """Write the added values. They survive the end of the process; a power failure can lose them."""
        with self._lock:
            if self._unwritten:
                self._file.write(json.dumps(self._unwritten).encode() + b"\n")
                self._file.flush()
                self._unwritten = {}
