"""Hashes of files, remembered: a file is read again only where its size, its times or its inode changed.

So that planning hundreds of steps over gigabytes takes a moment. Every write through the file system changes the
times; what a failing disk changes does not, so whatever is about to be used is read in full (`pipeline.run.loop`).
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from stages.system.integrity import file_hash, write_json

SETTLED_SECONDS = 2.0
"""A file changed more recently may change again within the same tick of its file system's clock: not remembered."""

Signature = list[int]


class Hashes:
    """sha256 of files by path. `file` is where they are remembered from one run to the next."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, tuple[Signature, str]] = {}
        self._changed = False
        try:
            self._known = {path: (sig, sha) for path, (sig, sha) in json.loads(file.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            self._known = {}  # nothing is remembered, or nothing that can be read

    def of(self, path: Path) -> str:
        """The hash of the file's bytes, in hex. Raises OSError."""
        stat = path.stat()
        signature = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        key = str(path.absolute())
        if (known := self._known.get(key)) and known[0] == signature:
            return known[1]
        settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS
        found = file_hash(path)
        if settled:
            self._known[key] = (signature, found)
            self._changed = True
        return found

    def save(self) -> None:
        """Remember for the next run. Those of files that are gone are forgotten. Raises OSError."""
        if self._changed:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, {path: known for path, known in self._known.items() if Path(path).exists()})
            self._changed = False
