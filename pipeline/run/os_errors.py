"""What the machine lacks when something fails, and what to do about it: room on a disk, file handles."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

FULL_DISK_BYTES = 2**20
"""A disk with less room than this when something failed is why it failed."""

FULL_DISK_TEXTS = ("No space left on device", "Not enough disk space")
"""As the system says it, and as datasets does."""


def explain_os_error(error: Exception, folder: Path | None = None) -> str | None:
    """Why `error` was raised while `folder` was written, if the machine is the reason: libraries say it in many ways,
    or not at all. What is published is whole whatever happened."""
    number, said = getattr(error, "errno", None), str(error)
    remedy = "free some space, and the same command goes on"
    if folder and folder.exists() and shutil.disk_usage(folder).free < FULL_DISK_BYTES:
        return f"the disk of {folder} is full ({type(error).__name__}); {remedy}"
    if number in (errno.ENOSPC, errno.EDQUOT) or any(text in said for text in FULL_DISK_TEXTS):
        return f"a disk is full ({said}); {remedy}"
    if number in (errno.EMFILE, errno.ENFILE) or "Too many open files" in said:
        return f"too many files are open at once ({said}); raise what `ulimit -n` says"
    return None
