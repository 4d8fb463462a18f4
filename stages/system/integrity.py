"""Atomic JSON files, SHA-256 hashes, and folders that record the hashes of their files.

Only regular files are read: what else has a name, a pipe or a device, can be without end or without a first byte.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

SEAL = "sealed.json"
"""Written last into a folder: {"files": {name: sha256}, ...}. A folder without it is unfinished."""
PROGRESS_SECONDS = 3.0
_CHUNK = 2**22
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_LARGE = 2**30
"""Bytes of a file from which on it is looked at for holes."""


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


def read_json(path: Path) -> Any:
    """Read the JSON of a regular file. Raises OSError or ValueError."""
    require_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


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


def delete(path: Path) -> None:
    """Delete a file, a folder or a link, as far as possible; what a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def file_hash(path: Path, say: Callable[[str], None] | None = None) -> str:
    """Return the SHA-256 of a regular file's bytes, in hex. Raises OSError.

    `say` gets a sentence every PROGRESS_SECONDS on how far it is.
    """
    require_regular(path)
    digest, done, size, shown = hashlib.sha256(), 0, path.stat().st_size, time.monotonic()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if say and time.monotonic() - shown >= PROGRESS_SECONDS:
                shown = time.monotonic()
                say(f"reading {path.name}: {done / 2**30:.1f} of {size / 2**30:.1f} GiB")
    return digest.hexdigest()


def content_hash(value: Any) -> str:
    """Return the SHA-256 of a value's JSON with sorted keys, in hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # names of files need not be UTF-8


def files_in(folder: Path) -> dict[str, str]:
    """Map the path of every file, relative to `folder`, to its SHA-256."""
    return {str(file.relative_to(folder)): file_hash(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def damage(folder: Path, files: Mapping[str, str], hash_of: Callable[[Path], str] = file_hash) -> str | None:
    """Describe the first file that differs from `files` (path -> hash). None if all agree.

    Raises PermissionError: a file that this user may not read is not damaged.
    """
    for name, expected in sorted(files.items()):
        try:
            if hash_of(folder / name) != expected:
                return f"{name} was changed after it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except PermissionError:
            raise
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def seal(folder: Path, **details: Any) -> None:
    """Write SEAL into `folder`: the hashes of its files, and `details`."""
    write_json(folder / SEAL, {"files": files_in(folder), **details})


def broken_seal(folder: Path) -> str | None:
    """Describe why a sealed folder is unusable. None if it is complete and unchanged. Raises PermissionError."""
    try:
        return damage(folder, read_json(folder / SEAL)["files"])
    except PermissionError:
        raise
    except FileNotFoundError:
        return "it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{SEAL} cannot be read"


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
            delete(leftover)
        try:
            build(work)
            seal(work)
            work.rename(folder)
        finally:
            delete(work)
