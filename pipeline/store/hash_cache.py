"""Cache of file hashes, so that planning hundreds of steps over gigabytes is fast.

A file is read again only if its size, times or inode changed. A failing disk changes none of these, so a run verifies
the files it uses in full (pipeline.run.loop). A cache whose own checksum is wrong vouches for nothing.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from stages.system.integrity import content_hash, file_hash, read_json, write_json

SETTLED_SECONDS = 2.0
"""Files changed more recently are not cached: they may change again within one tick of the file system's clock."""


class HashCache:
    """sha256 of files by path; `file` keeps the hashes between runs."""

    def __init__(self, file: Path, say: Callable[[str], None]) -> None:
        """`say` shows how far a large file is read."""
        self.file, self._say = file, say
        self._hashes: dict[str, tuple[list[int], str]] = {}
        """Path -> size, times and inode; hash."""
        self._changed = False
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):  # no file, or a damaged one
            stored = read_json(file)
            if stored["sha256"] == content_hash(stored["hashes"]):
                self._hashes = {path: (signature, sha256) for path, (signature, sha256) in stored["hashes"].items()}

    def hash_file(self, path: Path) -> str:
        """Return the hash of the file's bytes, in hex. Raises OSError."""
        stat = path.stat()
        signature = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        key = str(path.absolute())
        if (cached := self._hashes.get(key)) and cached[0] == signature:
            return cached[1]
        settled = time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS
        sha256 = file_hash(path, self._say)
        if settled:
            self._hashes[key] = (signature, sha256)
            self._changed = True
        return sha256

    def save(self) -> None:
        """Write the hashes of files that still exist. Raises OSError."""
        if self._changed:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            hashes = {path: entry for path, entry in self._hashes.items() if Path(path).exists()}
            write_json(self.file, {"sha256": content_hash(hashes), "hashes": hashes})
            self._changed = False
