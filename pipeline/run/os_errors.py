"""Errors of the machine instead of the recipe: a full disk, too many open files."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL_DISK_BYTES = 2**20
"""A disk with less free space than this when something failed is the cause."""

FULL_DISK_TEXTS = ("No space left on device", "Not enough disk space")
"""The wordings of the system and of datasets."""


def explain_os_error(error: Exception, folder: Path | None = None) -> str | None:
    """Explain an error that the machine caused; None if it has another cause. Published results stay intact.

    Args:
        error: what was raised. Libraries word the cause in many ways, or hide it.
        folder: the folder that was written to.
    """
    number, text = getattr(error, "errno", None), str(error)
    remedy = "free some space and repeat the command: it continues where it stopped"
    if folder and folder.exists() and shutil.disk_usage(folder).free < FULL_DISK_BYTES:
        return f"the disk of {folder} is full ({type(error).__name__}); {remedy}"
    if number in (errno.ENOSPC, errno.EDQUOT) or any(full in text for full in FULL_DISK_TEXTS):
        return f"a disk is full ({text}); {remedy}"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
        return f"too many files are open at once ({text}); raise the limit, see `ulimit -n`"
    return None
