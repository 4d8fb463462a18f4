"""`--verify`: read every file in a runs folder and report what is missing or changed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.store.store import CHECKPOINTS, Published, Store
from stages.records.manifest import MANIFEST, Manifest, ManifestError, read_manifest
from stages.system.integrity import SEAL, broken_seal, damage, file_hash
from stages.system.os_errors import explain_os_error


@dataclass(frozen=True)
class Finding:
    """One file or folder that is missing or changed; `path` is relative to the runs folder."""

    path: str
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Verification:
    runs: str
    steps: int
    files: int
    problems: list[Finding]


def verify(runs: Path) -> Verification:
    """Check every hash in `runs`, a folder used with --runs. Reads all of it."""
    problems: list[Finding] = []
    results: list[Published] = []
    for folder in Store(runs / "store").result_folders():
        try:
            results.append(Published(folder, read_manifest(folder)))
        except (ManifestError, PermissionError) as error:
            problems.append(Finding(str(folder.relative_to(runs)), explain_os_error(error) or str(error)))
    by_fingerprint = {result.path.name: result for result in results}
    for result in results:
        name = f"{result.path.relative_to(runs)} ({result.manifest.step})"
        problems += [Finding(name, text) for text in _wrong_files(result)]
        problems += [Finding(name, text) for text in _wrong_inputs(result.manifest, by_fingerprint)]
    problems += [Finding(str(path.relative_to(runs)), text) for path, text in _damaged_files(runs)]
    files = sum(len(result.manifest.outputs) for result in results)
    return Verification(str(runs), len(results), files, problems)


def _wrong_files(result: Published) -> Iterator[str]:
    outputs = result.manifest.outputs
    for name, sha256 in sorted(outputs.items()):
        try:
            if text := damage(result.path, {name: sha256}):
                yield text
        except PermissionError as error:
            yield explain_os_error(error) or str(error)
    for file in sorted(result.path.rglob("*")):
        name = str(file.relative_to(result.path))
        if file.is_file() and name not in outputs and name != MANIFEST:
            yield f"{name} was added after the result was published"


def _wrong_inputs(manifest: Manifest, results: Mapping[str, Published]) -> Iterator[str]:
    """The results of other steps that this one was computed from, and that are missing or different now."""
    for record in manifest.inputs.values():
        if record.step and record.fingerprint:
            if (source := results.get(record.fingerprint)) is None:
                yield f"was computed from {record.step} ({record.fingerprint}), which is missing"
            elif source.manifest.digest != record.digest:
                yield f"was computed from {record.step}, which was computed again since, with a different result"


def _damaged_files(runs: Path) -> Iterator[tuple[Path, str]]:
    """Damaged checkpoints, cached files and links. Folders without a seal were never complete and are never used."""
    patterns = ("cache/prepared/*", "cache/gguf/*", f"store/unfinished/*/{CHECKPOINTS}/*")
    for folder in (folder for pattern in patterns for folder in sorted(runs.glob(pattern))):
        if (folder / SEAL).exists() and (text := broken_seal(folder)) and folder.exists():  # not deleted meanwhile
            yield folder, text
    for file in sorted(runs.glob("cache/pypi/*/*")):
        if re.fullmatch("[0-9a-f]{64}", file.parent.name) and file_hash(file) != file.parent.name:
            yield file, "does not match its hash"
    for link in sorted(runs.glob("*/*")):
        if link.is_symlink() and not link.exists():
            yield link, f"points to {link.readlink()}, which is missing"
