"""Why a step has no cached result: the differences from the most similar earlier result, in the words of the recipe."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Step
from pipeline.store.provenance import installed_version
from pipeline.store.references import display_name
from pipeline.store.store import Store
from stages.records.manifest import InputRecord, Manifest, ManifestError, read_manifest
from stages.records.run_record import read_run_record

MAX_CHANGES = 3
"""Number of changes that are named; the rest is counted."""


class EarlierResults:
    """The results in a store that a recipe's runs computed, or that its last one used, by the name of their step."""

    def __init__(self, store: Store, recipe: str) -> None:
        self.store, self.recipe = store, recipe
        self._by_step: dict[tuple[str, str], list[Manifest]] | None = None

    def of(self, step: Step) -> list[Manifest]:
        """The results that a step of this kind and name had, with any settings and inputs."""
        if self._by_step is None:
            self._by_step, used = {}, set[str | None]()
            with contextlib.suppress(OSError, ValueError):
                used = {s.fingerprint for s in read_run_record(self.store.root.parent / self.recipe).steps if s.path}
            for folder in self.store.result_folders():
                try:
                    manifest = read_manifest(folder)
                except ManifestError:
                    continue
                if manifest.recipe == self.recipe or manifest.fingerprint in used:
                    self._by_step.setdefault((manifest.kind, manifest.step), []).append(manifest)
        return self._by_step.get((step.kind, step.name), [])


def reason_missing(
    step: Step,
    fingerprints: Mapping[str, str | None],
    waiting: Sequence[str],
    resolver: Resolver,
    earlier: EarlierResults,
) -> str:
    """Say what changed since a result was published under the step's name, and which steps run before it.

    Args:
        step: a step without a result.
        fingerprints: the fingerprint of each of its dependencies.
        waiting: those of its dependencies that have to run.
    """
    settled = {name: value for name, value in fingerprints.items() if name not in waiting}
    changes = [[*_settings(step, old), *_inputs(step, old.inputs, settled, resolver)] for old in earlier.of(step)]
    reasons = min(changes, key=len, default=["no result yet"])
    if not reasons and not waiting:
        reasons = ["the recipe or a step that it shows has another name"]  # names count only for reports
    reasons = shorten(reasons, MAX_CHANGES)
    return "; ".join(reasons + ([f"after {', '.join(shorten(waiting, MAX_CHANGES))}"] if waiting else []))


def shorten(names: Sequence[str], most: int) -> list[str]:
    """The first names, and how many more there are."""
    if len(names) <= most:
        return list(names)
    return [*names[: most - 1], f"{len(names) - most + 1} more"]


def _settings(step: Step, manifest: Manifest) -> Iterator[str]:
    version = step.config.version
    if manifest.version != version:
        yield f"stages of kind {step.kind} have a new version ({manifest.version} -> {version})"
    packages = manifest.environment.get("packages", {})
    for name in step.config.versioned_packages:
        if packages.get(name) != (now := installed_version(name)):
            yield f"{name} {packages.get(name)} -> {now}"
    before, after = dict(_flat(step.settings(manifest.config))), dict(_flat(step.settings()))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"stages.{step.stage}.{key} {_text(before, key)} -> {_text(after, key)}"


def _inputs(
    step: Step, before: Mapping[str, InputRecord], fingerprints: Mapping[str, str | None], resolver: Resolver
) -> Iterator[str]:
    """Changes of inputs; `fingerprints` leaves out the dependencies that have to run."""
    needs = step.config.needs()
    for name in sorted(before.keys() | step.inputs.keys()):
        key = f"stages.{step.stage}.{needs[name].key if name in needs else name}"
        source, old = step.inputs.get(name), before.get(name, InputRecord())
        before_name = old.step or old.reference
        if source is None:
            yield f"{key} is no longer set"
        elif name not in before:
            yield f"{key} is new"
        elif isinstance(source, Step):
            if source.name != old.step and fingerprints.get(source.name) != old.fingerprint:
                yield f"{key}: {before_name} -> {source.name}"
            elif source.name in fingerprints and fingerprints[source.name] != old.fingerprint:
                yield f"{source.name} has other settings"
        elif resolver.content(source) != old.content:
            now = display_name(resolver.pinned(source))
            yield f"{key}: {before_name} -> {now}" if now != before_name else f"{key}: {now} has other content"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each single value in nested mappings and lists, with its dotted key."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{index}")
    else:
        yield key, value


def _text(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "unset"
