"""Regular files: what else has a name, a pipe or a device, can be read without end or without a first byte."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from functools import cache
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_LARGE = 2**30
"""Bytes of a file from which on holes are looked for."""


def require_regular(path: Path) -> None:
    """Raise OSError if `path`, or what it links to, is neither a regular file nor a folder, or does not exist.

    Large files that are mostly holes are refused, too: to read one takes hours and finds nothing.
    """
    status = path.stat()
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None and stat.S_ISREG(status.st_mode) and status.st_dev in _kernel_file_systems():
        kind = "made up by the kernel as it is read"
    if kind is not None:
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))
    if status.st_size >= _LARGE and 2 * (holes := _holes(path, status.st_size)) > status.st_size:
        text = (
            f"{holes / 2**30:.1f} of its {status.st_size / 2**30:.1f} GiB were never written: an unfinished download?"
        )
        raise OSError(errno.EINVAL, text, str(path))


def _holes(path: Path, size: int) -> int:
    """How many bytes of a sparse file are holes, as far as its file system tells."""
    position = holes = 0
    with path.open("rb") as file, contextlib.suppress(OSError):
        while position < size:
            try:
                data = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # not: no data behind `position`
                    raise
                data = size
            holes += data - position
            position = os.lseek(file.fileno(), data, os.SEEK_HOLE) if data < size else size
    return holes


@cache
def _kernel_file_systems() -> frozenset[int]:
    return frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.isdir(folder))  # noqa: PTH112, PTH116
