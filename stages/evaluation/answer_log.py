"""Answers stored on disk as they arrive, so that a resumed step asks for none of them again."""

import hashlib
import json
from pathlib import Path
from typing import Any

_DIGEST_LENGTH = 16


class AnswerLog:
    """A mapping of keys to JSON values in an append-only file of lines `checksum JSON`. The last value of a key counts.

    Lines that are incomplete, as a killed process leaves one, or changed are removed: what they held is asked again.
    """

    def __init__(self, file: Path) -> None:
        self._values: dict[str, Any] = {}
        self._unwritten: dict[str, Any] = {}
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        good = [line for line in lines if line == _line(line[_DIGEST_LENGTH + 1 : -1])]
        for line in good:
            self._values |= json.loads(line[_DIGEST_LENGTH + 1 :])
        if len(good) < len(lines):
            temporary = file.with_name(f".{file.name}")
            temporary.write_bytes(b"".join(good))
            temporary.replace(file)
        self._file = file.open("ab")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def add(self, key: str, value: Any) -> None:
        """Add a value. The next flush writes all values added since the last one, in one line."""
        self._values[key] = self._unwritten[key] = value

    def flush(self) -> None:
        """Write the added values. They survive the end of the process; a power failure can lose them."""
        if self._unwritten:
            self._file.write(_line(json.dumps(self._unwritten).encode()))
            self._file.flush()
            self._unwritten = {}


def _line(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGEST_LENGTH].encode() + b" " + text + b"\n"
