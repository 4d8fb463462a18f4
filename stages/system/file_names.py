"""File names for steps, tasks and figures, whose own names may contain any character."""

import hashlib
import re

LONGEST = 150
"""Longest file name in bytes. File systems allow 255; suffixes and temporary prefixes need the rest."""


def file_name(name: str) -> str:
    """Replace slashes and control characters in `name` by `_`. Cut a name that is too long and append its hash."""
    plain = re.sub(r"[/\x00-\x1f\x7f]", "_", name)
    raw = plain.encode(errors="replace")
    if len(raw) <= LONGEST:
        return raw.decode()
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:12]
    return f"{raw[: LONGEST - 13].decode(errors='ignore')}-{digest}"
