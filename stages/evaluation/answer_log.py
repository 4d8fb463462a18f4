"""Answers stored on disk as they arrive, so that a resumed step asks for none of them again."""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

_DIGEST_LENGTH = 16


class AnswerLog:
    """A mapping of keys to JSON values in an append-only file of lines `checksum JSON`. The last value of a key counts.

    Lines that are incomplete, as a killed process leaves one, or changed are removed: what they held is asked again.
    Without a file, nothing is kept.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._values: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        if file is None:
            return
        lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
        good = [line for line in lines if line == _line(line[_DIGEST_LENGTH + 1 : -1])]
        for line in good:
            self._values |= json.loads(line[_DIGEST_LENGTH + 1 :])
        if len(good) < len(lines):
            temporary = file.with_name(f".{file.name}")
            temporary.write_bytes(b"".join(good))
            temporary.replace(file)
        self._file = file.open("ab")

    def get(self, key: str) -> Any:
        """Return the value of a key; None if it has none."""
        return self._values.get(key)

    def add(self, values: dict[str, Any]) -> None:
        """Add values, in one line. They survive the end of the process; a power failure can lose them."""
        if values and self._file:
            self._values |= values
            self._file.write(_line(json.dumps(values).encode()))
            self._file.flush()


def _line(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:_DIGEST_LENGTH].encode() + b" " + text + b"\n"
