"""Atomic JSON files, SHA-256 hashes, and folders that record the hashes of their files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

SEAL = "sealed.json"
"""Written last into a folder: {"files": {name: sha256}, ...}. A folder without it is unfinished."""


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON. Readers see the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(value: Any) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # names of files need not be UTF-8


def files_in(folder: Path) -> dict[str, str]:
    """Map the path of every file, relative to `folder`, to its SHA-256."""
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def damage(folder: Path, files: Mapping[str, str], hash_of: Callable[[Path], str] = file_hash) -> str | None:
    """Describe the first file that differs from `files` (path -> hash). None if all agree."""
    for name, expected in sorted(files.items()):
        try:
            if hash_of(folder / name) != expected:
                return f"{name} was changed after it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def seal(folder: Path, **details: Any) -> None:
    """Write SEAL into `folder`: the hashes of its files, and `details`."""
    write_json(folder / SEAL, {"files": files_in(folder), **details})


def broken_seal(folder: Path) -> str | None:
    """Describe why a sealed folder is unusable. None if it is complete and unchanged."""
    try:
        return damage(folder, read_seal(folder)["files"])
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"


def read_seal(folder: Path) -> dict[str, Any]:
    """Read SEAL. Raises OSError or ValueError if it is missing or unreadable."""
    return json.loads((folder / SEAL).read_text(encoding="utf-8"))


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Build `folder` unless it exists with an intact seal. Concurrent processes build it once.

    Args:
        folder: its name has no suffix.
        build: creates and fills the work folder, which is then sealed and renamed to `folder`.
    """
    work = folder.with_suffix(".unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if broken_seal(folder) is None:
            return
        for leftover in (work, folder):  # from a killed run, or damaged since
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            build(work)
            seal(work)
            work.rename(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
