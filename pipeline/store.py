"""Outputs -> published atomically under their fingerprint, verified when read.

    STORE/KIND/FINGERPRINT/            what a step left, and stage.json, its manifest
    STORE/tmp/                         what is being made; never taken for a result
    STORE/locks/                       one publisher at a time

A folder is complete before it is renamed into its place, so whatever stands there is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "stage.json"
KEYS = (
    "schema",
    "step",
    "kind",
    "fingerprint",
    "config",
    "inputs",
    "outputs",
    "metrics",
    "environment",
    "started",
    "seconds",
)
"""What every manifest says."""
SCHEMA = 1
"""Of the manifest; raised when a reader of the old form would misread the new one."""


@dataclass(frozen=True)
class Published:
    """One published step."""

    path: Path
    manifest: dict[str, Any]

    @property
    def digest(self) -> str:
        """The hash of what it consists of: two makings of one fingerprint are the same where their digests are."""
        return content_hash(self.manifest["outputs"])

    def damage(self) -> str | None:
        """What is wrong with its files, by their hashes; None where nothing is."""
        for name, expected in sorted(self.manifest["outputs"].items()):
            file = self.path / name
            if not file.is_file():
                return f"{name} is missing"
            if file_hash(file) != expected:
                return f"{name} was changed after it was published"
        return None


class Store:
    """The published steps below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, kind: str, fingerprint: str) -> Path:
        """Where a step of this fingerprint is, or would be, published."""
        return self.root / kind / fingerprint

    def find(self, kind: str, fingerprint: str) -> Published | None:
        """The published step, if there is one whose manifest can be read and whose files are all there."""
        path = self.path(kind, fingerprint)
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            published = Published(path, {key: manifest[key] for key in KEYS})
            if manifest["schema"] != SCHEMA or manifest["fingerprint"] != fingerprint:
                return None
            return published if all((path / name).is_file() for name in manifest["outputs"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def workspace(self) -> Path:
        """A new empty folder on the store's own file system, to make a step in."""
        path = self.root / "tmp" / uuid.uuid4().hex
        path.mkdir(parents=True)
        return path

    def publish(self, made: Path, manifest: dict[str, Any]) -> Published:
        """Move the folder `made` to its place, with `manifest` completed and written last.

        What stood in that place before (a damaged result, or one that was to be made again) gives way at once.
        """
        outputs = {str(file.relative_to(made)): file_hash(file) for file in sorted(made.rglob("*")) if file.is_file()}
        manifest = {"schema": SCHEMA, **manifest, "outputs": outputs}
        write_json(made / MANIFEST, manifest)
        place = self.path(manifest["kind"], manifest["fingerprint"])
        place.parent.mkdir(parents=True, exist_ok=True)
        old = self.workspace()
        (self.root / "locks").mkdir(exist_ok=True)
        with FileLock(self.root / "locks" / place.name):
            if place.exists():
                place.rename(old / "replaced")
            made.rename(place)
        shutil.rmtree(old, ignore_errors=True)
        return Published(place, manifest)


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that the file is, at any moment, the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(value: Any) -> str:
    """sha256 of a value's canonical JSON, in hex: independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
