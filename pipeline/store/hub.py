"""Repositories of the model hub: resolved to a commit and fetched into the hub's own cache."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from stages.base import UserError
from stages.data.files import DATA_SUFFIXES

MODEL_DESCRIPTION = ["*.json", "*.txt", "*.model", "*.jinja"]
MODEL_FILES = ["*.safetensors", *MODEL_DESCRIPTION]
"""Files fetched for a model. Pickles (*.bin, *.pt) can run code when they are read and are never fetched."""
MODEL_CODE = "*.py"
"""Also fetched if the stage trusts the model's code."""

DATA_FILES = [f"*{suffix}" for suffix in DATA_SUFFIXES]
"""Files fetched for a data set. Scripts are never fetched."""
DATA_CARD = "README.md"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<member>.+))?", re.ASCII)


@dataclass(frozen=True)
class Hub:
    """A repository of the hub, or one file in it."""

    repo: str
    revision: str | None
    """A branch, tag or commit; None for the default branch."""
    kind: Literal["model", "dataset"]
    member: str | None
    """A path inside the repository; None for a model folder or a complete data set."""

    @property
    def commit(self) -> str | None:
        """The revision if it is a full commit hash."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f"#{self.member}" if self.member else "")


def parse_hub(text: str, kind: Literal["model", "dataset"]) -> Hub | None:
    """Parse `org/name[@revision][#file]`; None if the text has another form. Raises UserError."""
    match = _HUB.fullmatch(text)
    if not match or ".." in text:
        return None
    member = match["member"]
    if kind == "model" and member and not member.endswith(".gguf"):
        raise UserError(f"{text!r}: only a .gguf file is a model on its own; leave #{member} out")
    return Hub(match["repo"], match["revision"], kind, member)


def resolve(hub: Hub, notice: Callable[[str], None] = lambda text: None) -> Hub:
    """Replace the branch or tag by its current commit. Raises UserError.

    `notice` receives a message if the hub does not answer and the commit comes from the local cache.
    """
    if hub.commit:
        return hub
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().repo_info(hub.repo, repo_type=hub.kind, revision=hub.revision, timeout=30)
    except Exception as error:
        commit = cached_commit(hub)
        if commit and not isinstance(error, HfHubHTTPError):  # no answer, rather than a refusal
            reason = f"the hub does not answer ({type(error).__name__})"
            notice(f"{hub}: {reason}; using the commit {commit} of its cache")
            return replace(hub, revision=commit)
        raise _hub_error(hub, error) from error
    return replace(hub, revision=info.sha)


def cached_hub_file(hub: Hub) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    if hub.member is None:
        return None
    path = try_to_load_from_cache(hub.repo, hub.member, revision=hub.revision, repo_type=hub.kind)
    return Path(path) if isinstance(path, str) else None


def fetch_hub_description(hub: Hub, code: bool) -> Path:
    """Fetch a model's config and tokenizer; return the cached files of other references. Raises UserError."""
    pinned, is_folder = resolve(hub), hub.kind == "model" and not hub.member
    patterns = _model_files(MODEL_DESCRIPTION, code) if is_folder else DATA_FILES
    try:
        return _download(pinned, patterns, local_files_only=not is_folder)
    except Exception as error:
        raise UserError(f"{hub}: is not fetched yet; use --prefetch ({type(error).__name__})") from None


def ref_file(hub: Hub) -> Path:
    """Return the file in the hub's cache that records the commit of a branch or tag."""
    from huggingface_hub import constants

    name = f"{hub.kind}s--{hub.repo.replace('/', '--')}"
    return Path(constants.HF_HUB_CACHE) / name / "refs" / (hub.revision or "main")


def cached_commit(hub: Hub) -> str | None:
    ref = ref_file(hub)
    commit = ref.read_text().strip() if ref.is_file() else ""
    return commit if _COMMIT.fullmatch(commit) else None


def fetch_hub(hub: Hub, code: bool, hash_file: Callable[[Path], str]) -> Path:
    """Fetch the repository's files, and check those that the hub's cache already had. Raises UserError."""
    pinned, is_model = resolve(hub), hub.kind == "model"
    from huggingface_hub import get_cached_repo_tree

    patterns = _model_files(MODEL_FILES, code) if is_model else [*DATA_FILES, DATA_CARD]
    try:
        path = _download(pinned, patterns)
        if not is_model and not hub.member:  # without the list of all files, a part would pass for all of them
            get_cached_repo_tree(hub.repo, repo_type=hub.kind, revision=pinned.commit)
    except Exception as error:
        raise _hub_error(hub, error) from error
    files = [file for pattern in patterns for file in (path.glob(pattern) if is_model else path.rglob(pattern))]
    if hub.member:
        files = [path]
    elif is_model and not any(file.suffix == ".safetensors" for file in files):
        raise UserError(f"{hub}: has no *.safetensors, and pickles are not read; name a revision that has them")
    elif not is_model and all(file.name == DATA_CARD for file in files):
        formats = ", ".join(DATA_FILES)
        raise UserError(f"{pinned}: has no {formats}, the only data formats; name another data set")
    for blob in {file.resolve() for file in files}:
        if not _has_named_content(blob, hash_file):
            raise UserError(f"{hub}: {blob} of the hub's cache was changed after it was fetched; delete it")
    return path


def _model_files(patterns: list[str], code: bool) -> list[str]:
    return [*patterns, MODEL_CODE] if code else patterns


def _download(hub: Hub, patterns: list[str], local_files_only: bool = False) -> Path:
    """Fetch the member, or the files that `patterns` match, of a model only those at its top; return their path."""
    from huggingface_hub import hf_hub_download, snapshot_download

    options: Any = {"repo_type": hub.kind, "revision": hub.commit, "local_files_only": local_files_only}
    if hub.member:
        return Path(hf_hub_download(hub.repo, hub.member, **options))
    ignored = ["*/*"] if hub.kind == "model" else None  # exports for other runtimes
    return Path(snapshot_download(hub.repo, allow_patterns=patterns, ignore_patterns=ignored, **options))


def _has_named_content(blob: Path, hash_file: Callable[[Path], str]) -> bool:
    """Whether a file in the hub's cache has the content that its name states: SHA-256, or git's SHA-1 of small files.

    Other names, as in a cache without links, state nothing.
    """
    if blob.parent.name != "blobs" or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return True
    if len(blob.name) == 64:
        return hash_file(blob) == blob.name
    content = blob.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == blob.name


def _hub_error(hub: Hub, error: Exception) -> UserError:
    from huggingface_hub import errors

    reasons: dict[Any, str] = {
        errors.GatedRepoError: "request access on its page, then set HF_TOKEN in the environment",
        errors.RepositoryNotFoundError: f"no such {hub.kind} on the hub, or a private one; "
        "check the name, or set HF_TOKEN",
        errors.RevisionNotFoundError: "no such revision; leave the @... out for the default branch",
        errors.RemoteEntryNotFoundError: "no such file in the repository; its page on the hub lists them",
        (errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError): "the hub's cache (HF_HOME) does not have"
        " all of it; with a network, --prefetch fetches it",
        Exception: f"cannot be fetched from the hub ({type(error).__name__}); offline, name a local path, "
        "or a full commit that the hub's cache (HF_HOME) already has",
    }
    return UserError(f"{hub}: {next(reason for kind, reason in reasons.items() if isinstance(error, kind))}")
