"""Errors of the machine instead of the recipe: a full disk, too many open files, no permission."""

import errno
import os
import shutil
from pathlib import Path

FULL_DISK_BYTES = 2**20
"""A disk with less free space than this when something failed is the cause."""

FULL_DISK_TEXTS = ("No space left on device", "Not enough disk space")
"""The wordings of the system and of datasets."""


def explain_os_error(error: BaseException, folder: Path | None = None) -> str | None:
    """Explain an error that the machine caused; None if it has another cause. Published results stay intact.

    Args:
        error: what was raised. Libraries word the cause in many ways, or hide it.
        folder: the folder that was written to.
    """
    number, text = getattr(error, "errno", None), str(error)
    if isinstance(error, PermissionError) and error.filename:
        return _explain_permission(Path(os.fsdecode(error.filename)))
    remedy = "free some space and repeat the command: it continues where it stopped"
    if folder and folder.exists() and shutil.disk_usage(folder).free < FULL_DISK_BYTES:
        return f"the disk of {folder} is full ({type(error).__name__}); {remedy}"
    if number in (errno.ENOSPC, errno.EDQUOT) or any(full in text for full in FULL_DISK_TEXTS):
        return f"a disk is full ({text}); {remedy}"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return f"too many files are open at once ({text}); raise the limit, see `ulimit -n`"
    return None


def _explain_permission(path: Path) -> str:
    """Name the path, or the folder above it, that this user may not use as needed."""
    while not os.access(path, os.F_OK) and path != path.parent:
        path = path.parent
    needed = "read" if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)) else "write"
    letters = {"read": "rX", "write": "w"}[needed]
    try:
        status = path.stat()
    except OSError:
        return f"no permission to {needed} {path}"
    try:
        owner = path.owner()
    except KeyError:  # of a user whom this machine does not know
        owner = f"user {status.st_uid}"
    text = f"no permission to {needed} {path}, which belongs to {owner} and has mode {status.st_mode & 0o777:04o}"
    return f"{text}; ask for `chmod -R g+{letters}`, or name another folder by --runs"
