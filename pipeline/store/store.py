"""The store: published results under their fingerprints.

    STORE/KIND/FINGERPRINT/            the files of a result, and stage.json, its manifest
    STORE/unfinished/FINGERPRINT/      work in progress and checkpoints; never used as a result
    STORE/locks/                       one run at a time works on a step

A folder is complete before it is renamed into its place, so every folder in a place is complete.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from stages.records.manifest import MANIFEST, Manifest, ManifestError, read_manifest, write_manifest
from stages.system.integrity import damage, delete, file_hash

CHECKPOINTS = "checkpoints"
"""The part of an unfinished step that its next attempt continues from."""


@dataclass(frozen=True)
class Published:
    path: Path
    manifest: Manifest

    def damage(self, hash_of: Callable[[Path], str] = file_hash) -> str | None:
        """The first file that is missing or changed, as a sentence; None if the result is intact."""
        return damage(self.path, self.manifest.outputs, hash_of)


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, fingerprint: str) -> Path:
        return self.root / kind / fingerprint

    def find(self, kind: str, fingerprint: str) -> Published | None:
        """The published result; None if it does not exist or its manifest is not valid."""
        path = self.path(kind, fingerprint)
        try:
            return Published(path, read_manifest(path))
        except ManifestError:
            return None

    def result_folders(self) -> Iterator[Path]:
        for kind in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if kind.is_dir() and kind.name not in ("unfinished", "locks"):
                yield from sorted(folder for folder in kind.iterdir() if folder.is_dir())

    def unfinished(self, fingerprint: str) -> Path:
        return self.root / "unfinished" / fingerprint

    def has_checkpoint(self, fingerprint: str) -> bool:
        checkpoints = self.unfinished(fingerprint) / CHECKPOINTS
        return checkpoints.is_dir() and any(checkpoints.iterdir())

    def lock(self, fingerprint: str) -> FileLock:
        """The lock of a step, for `publish`, `recover` and `clean_up`. It is released when the run's process ends."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / fingerprint)

    def publish(self, output: Path, manifest: Manifest) -> Published:
        """Complete the folder `output` with its manifest and move it to its place, over any older. Raises OSError."""
        write_manifest(output, manifest)
        return self._move(output, manifest)

    def recover(self, fingerprint: str) -> Published | None:
        """Publish a result that was complete when its run was killed; None if there is none. Raises OSError."""
        output = self.unfinished(fingerprint) / "out"
        try:
            manifest = read_manifest(output, fingerprint)
        except ManifestError:
            return None
        return None if damage(output, manifest.outputs) else self._move(output, manifest)

    def clean_up(self, fingerprint: str) -> None:
        """Delete what is left of an unfinished step, except its checkpoints."""
        folder = self.unfinished(fingerprint)
        for entry in list(folder.iterdir()) if folder.is_dir() else []:
            if entry.name != CHECKPOINTS or not any(entry.iterdir()):
                delete(entry)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def clean_up_killed_runs(self) -> None:
        """Delete what killed runs left, except checkpoints and complete results, which `recover` publishes."""
        for folder in list((self.root / "unfinished").glob("*")):
            with contextlib.suppress(Timeout), self.lock(folder.name).acquire(timeout=0):
                if not (folder / "out" / MANIFEST).is_file():
                    self.clean_up(folder.name)

    def _move(self, output: Path, manifest: Manifest) -> Published:
        path = self.path(manifest.kind, manifest.fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        _set_modes(output)
        replaced = output.with_name("replaced")
        delete(replaced)
        if path.exists():
            path.rename(replaced)
        output.rename(path)
        delete(self.unfinished(manifest.fingerprint))
        return Published(path, manifest)


def _set_modes(folder: Path) -> None:
    """Give files and folders the modes of the umask, which libraries that write through temporary files ignore."""
    mode = (folder / MANIFEST).stat().st_mode & 0o666  # a file that was opened in the ordinary way
    search = (mode & 0o444) >> 2
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            special = path.stat().st_mode & 0o7000  # such as a shared folder's setgid
            path.chmod(special | mode | (search if path.is_dir() else 0))
