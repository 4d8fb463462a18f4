"""Regular files: what else has a name, a pipe or a device, can be read without end or without a first byte."""

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
"""Bytes of a file from which on it is looked at for holes."""


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
    written = 512 * status.st_blocks  # or less than the size where the file system compresses
    if status.st_size >= _LARGE and 2 * written < status.st_size and _has_hole(path, status.st_size):
        text = f"only {written / 2**30:.1f} of its {status.st_size / 2**30:.1f} GiB were ever written"
        raise OSError(errno.EINVAL, f"{text}: an unfinished download?", str(path))


def _has_hole(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size


@cache
def _kernel_file_systems() -> frozenset[int]:
    return frozenset(os.stat(folder).st_dev for folder in ("/proc", "/sys") if os.path.isdir(folder))  # noqa: PTH112, PTH116
