"""Outputs -> published atomically under their fingerprint, verified when read.

    STORE/KIND/FINGERPRINT/            what a step left, and stage.json, its manifest
    STORE/unfinished/FINGERPRINT/      what is being made, and what it takes to go on; never taken for a result
    STORE/locks/                       a step is made by one run at a time

A folder is complete before it is renamed into its place, so whatever stands there is whole.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.records.past_runs import MANIFEST
from stages.system.integrity import content_hash, damage, file_hash, files_in, write_json

KEYS = (
    "schema",
    "step",
    "kind",
    "version",
    "fingerprint",
    "config",
    "inputs",
    "outputs",
    "metrics",
    "environment",
    "started",
    "seconds",
)
"""What every manifest says, beside `sha256`: the hash of all of that."""
SCHEMA = 2
"""Of the manifest; raised when a reader of the old form would misread the new one."""

CHECKPOINTS = "checkpoints"
"""What is kept of an unfinished step, for whoever makes it next."""
BESIDE = ("unfinished", "locks")
"""Folders of a store that hold no published steps."""


@dataclass(frozen=True)
class Published:
    """One published step."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """The hash of what it consists of: two makings of one fingerprint are the same where their digests are."""
        return content_hash(self.manifest["outputs"])

    def damage(self, hash_of: Callable[[Path], str] = file_hash) -> str | None:
        """What is wrong with its files, by their hashes; None where nothing is."""
        return damage(self.path, self.manifest["outputs"], hash_of)


class BadManifest(Exception):
    """A manifest that cannot be trusted; the message says why."""


class Store:
    """The published steps below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, fingerprint: str) -> Path:
        """Where a step of this fingerprint is, or would be, published."""
        return self.root / kind / fingerprint

    def find(self, kind: str, fingerprint: str) -> Published | None:
        """The published step; None where there is none, or its manifest cannot be trusted."""
        try:
            return read(self.path(kind, fingerprint))
        except BadManifest:
            return None

    def places(self) -> Iterator[Path]:
        """Every folder where a step is published."""
        for kind in sorted(self.root.iterdir()) if self.root.is_dir() else []:
            if kind.is_dir() and kind.name not in BESIDE:
                yield from sorted(place for place in kind.iterdir() if place.is_dir())

    def unfinished(self, fingerprint: str) -> Path:
        """Where a step is being made."""
        return self.root / "unfinished" / fingerprint

    def lock(self, fingerprint: str) -> FileLock:
        """Held by the run that makes the step; not acquired yet. The system lets go of it when the run's process ends,
        however it ends."""
        folder = self.root / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / fingerprint)

    def publish(self, made: Path, manifest: dict[str, Any], outputs: dict[str, str] | None = None) -> Published:
        """Move the folder `made` to its place, with `manifest` completed and written last.

        What stood in that place before (a damaged result, or one that was to be made again) gives way at once.
        `outputs` are the hashes of the files, where they are known. The caller holds the step's lock. Raises OSError.
        """
        body = {"schema": SCHEMA, **manifest, "outputs": files_in(made) if outputs is None else outputs}
        write_json(made / MANIFEST, body | {"sha256": content_hash(body)})
        return self._place(made, body)

    def recover(self, fingerprint: str) -> Published | None:
        """Publish what was complete when its run was killed before it could; None where nothing was.

        The caller holds the step's lock. Raises OSError.
        """
        made = self.unfinished(fingerprint) / "out"
        try:
            found = read(made, fingerprint)
        except BadManifest:
            return None
        return None if found.damage() else self._place(made, found.manifest)

    def tidy(self, fingerprint: str) -> None:
        """Remove what is left of an unfinished step, but for its checkpoints. The caller holds the step's lock."""
        folder = self.unfinished(fingerprint)
        for left in list(folder.iterdir()) if folder.is_dir() else []:
            if left.name != CHECKPOINTS or not any(left.iterdir()):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()

    def sweep(self) -> None:
        """Tidy up after runs that were killed; what complete results they left is kept for `recover`."""
        for folder in list((self.root / "unfinished").glob("*")):
            with contextlib.suppress(Timeout), self.lock(folder.name).acquire(timeout=0):
                if not (folder / "out" / MANIFEST).is_file():
                    self.tidy(folder.name)

    def _place(self, made: Path, manifest: dict[str, Any]) -> Published:
        place = self.path(manifest["kind"], manifest["fingerprint"])
        place.parent.mkdir(parents=True, exist_ok=True)
        old = made.with_name("replaced")
        shutil.rmtree(old, ignore_errors=True)
        if place.exists():
            place.rename(old)
        made.rename(place)
        shutil.rmtree(self.unfinished(manifest["fingerprint"]), ignore_errors=True)
        return Published(place, manifest)


def read(path: Path, fingerprint: str | None = None) -> Published:
    """The published step in the folder `path`, whose name is its fingerprint unless one is given. Its files are not
    looked at.

    Raises:
        BadManifest: it has none that can be read, or it is not what was written.
    """
    try:
        body = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if body["schema"] != SCHEMA:
            raise BadManifest(f"{MANIFEST} is of form {body['schema']}, this program writes {SCHEMA}")
        promised = body.pop("sha256")
        manifest = {key: body[key] for key in KEYS}
    except FileNotFoundError:
        raise BadManifest(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadManifest(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from None
    if content_hash(body) != promised:
        raise BadManifest(f"{MANIFEST} was changed after it was written")
    if manifest["fingerprint"] != (fingerprint or path.name):
        raise BadManifest(f"{MANIFEST} is that of {manifest['fingerprint']}")
    return Published(path, manifest)
