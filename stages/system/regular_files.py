"""Regular files: what else has a name, a pipe or a device, can be read without end or without a first byte."""

from __future__ import annotations

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


def require_regular(path: Path) -> None:
    """Raise OSError if `path`, or what it links to, is neither a regular file nor a folder, or does not exist."""
    status = path.stat()
    kind = _KINDS.get(stat.S_IFMT(status.st_mode))
    if kind is None and stat.S_ISREG(status.st_mode) and status.st_dev in _kernel_file_systems():
        kind = "made up by the kernel as it is read"
    if kind is not None:
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))


@cache
def _kernel_file_systems() -> frozenset[int]:
    return frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.isdir(folder))  # noqa: PTH112, PTH116
