"""`--verify`: reads everything in a folder of runs and says what is missing or is not what was written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.store.store import CHECKPOINTS, MANIFEST, BadManifest, Published, Store, read
from stages.system.integrity import SEAL, broken_seal, damage, file_hash


@dataclass(frozen=True)
class Problem:
    """One thing that is not as it was left."""

    path: str
    """Relative to the folder of runs."""
    text: str

    def __str__(self) -> str:
        return f"{self.path}: {self.text}"


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what was found."""

    runs: str
    steps: int
    files: int
    problems: list[Problem]

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def verify(runs: Path) -> Verified:
    """Check every hash below `runs`, a folder given to --runs; reads all of it."""
    store = Store(runs / "store")
    problems: list[Problem] = []
    found: dict[tuple[str, str], Published] = {}
    for place in store.places():
        try:
            found[place.parent.name, place.name] = read(place)
        except BadManifest as error:
            problems.append(Problem(str(place.relative_to(runs)), str(error)))
    by_fingerprint = {fingerprint: step for (_, fingerprint), step in found.items()}
    for step in found.values():
        name = f"{step.path.relative_to(runs)} ({step.manifest['step']})"
        problems += [Problem(name, text) for text in (*_files(step), *_inputs(step.manifest, by_fingerprint))]
    for place, text in (*_kept(runs), *_links(runs)):
        problems.append(Problem(str(place.relative_to(runs)), text))
    return Verified(str(runs), len(found), sum(len(step.manifest["outputs"]) for step in found.values()), problems)


def _files(step: Published) -> Iterator[str]:
    outputs: Mapping[str, str] = step.manifest["outputs"]
    for name, expected in sorted(outputs.items()):
        if wrong := damage(step.path, {name: expected}):
            yield wrong
    for file in sorted(step.path.rglob("*")):
        name = str(file.relative_to(step.path))
        if file.is_file() and name not in outputs and name != MANIFEST:
            yield f"{name} was not there when it was published"


def _inputs(manifest: Mapping[str, Any], found: Mapping[str, Published]) -> Iterator[str]:
    """What is wrong with the steps of the store that a step was made from."""
    for made_from in manifest["inputs"].values():
        if "step" in made_from:
            there = found.get(made_from["fingerprint"])
            if there is None:
                yield f"was made from {made_from['step']} ({made_from['fingerprint']}), which is missing"
            elif there.digest != made_from["digest"]:
                yield f"was made from {made_from['step']}, which was made again since and came out differently"


def _kept(runs: Path) -> Iterator[tuple[Path, str]]:
    """Damaged checkpoints and cached files. One without a seal was never complete: nothing uses it."""
    places = ("cache/prepared/*", "cache/gguf/*", f"store/unfinished/*/{CHECKPOINTS}/*")
    for place in (place for pattern in places for place in sorted(runs.glob(pattern))):
        if (place / SEAL).exists() and (wrong := broken_seal(place)) and place.exists():  # not removed meanwhile
            yield place, wrong
    for file in sorted(runs.glob("cache/pypi/*/*")):
        if re.fullmatch("[0-9a-f]{64}", file.parent.name) and file_hash(file) != file.parent.name:
            yield file, "is not what its hash promises"


def _links(runs: Path) -> Iterator[tuple[Path, str]]:
    for link in sorted(runs.glob("*/*")):
        if link.is_symlink() and not link.exists():
            yield link, f"leads to {link.readlink()}, which is missing"
