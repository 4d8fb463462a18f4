"""Names that people gave -> file names."""

from __future__ import annotations

import hashlib
import re

LONGEST = 150
"""Bytes of a file name: file systems take 255, and what is written beside a file has a longer name than it."""


def file_name(name: str) -> str:
    """`name` as one file name: no slashes or control characters; where it is too long, cut and ended by its hash."""
    plain = re.sub(r"[/\x00-\x1f\x7f]", "_", name)
    raw = plain.encode(errors="replace")
    if len(raw) <= LONGEST:
        return raw.decode()
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:12]
    return f"{raw[: LONGEST - 13].decode(errors='ignore')}-{digest}"
