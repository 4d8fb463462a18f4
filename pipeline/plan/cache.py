"""Which steps of a plan are cached: fingerprints, looked up in the store. Of the others, why: the differences from the
most similar earlier result, in the words of the recipe.

A fingerprint covers the step's settings, the content of its inputs, the version of its kind, and the versions of
packages that give the settings their meaning. It never covers a path, a time, a cell of the matrix, or a name that only
people read.
"""

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan, Step
from pipeline.store.provenance import installed_version
from pipeline.store.references import display_name
from pipeline.store.store import Published, Store
from stages.records.manifest import InputRecord, Manifest, ManifestError, read_manifest
from stages.records.metrics import Metrics
from stages.records.run_record import read_run_record
from stages.system.integrity import content_hash

FINGERPRINT_LENGTH = 32
"""Hex digits of sha256 that name a result: 128 bits."""
MAX_CHANGES = 3
"""Number of changes that are named; the rest is counted."""


@dataclass(frozen=True)
class CacheDecision:
    """Whether a step is cached, and why not."""

    fingerprint: str | None
    """None if an input is on the hub and its commit is not known yet."""
    cached: bool
    reason: str
    """Why the step has to run; empty if it is cached."""
    published: Published | None
    """The result that is used; None if the step has to run."""


Decisions = Mapping[str, CacheDecision]
"""Name of each step of a plan -> decision."""


def decide(
    plan: Plan, store: Store, resolver: Resolver, forced: Collection[str] = (), damaged: Mapping[str, str] = {}
) -> Decisions:
    """Look up all steps of a plan in the store.

    Args:
        resolver: knows the contents of references. Results are checked by remembered file hashes: a change that the
            disk itself made is not seen.
        forced: steps that run even if they have a result.
        damaged: steps whose result is known to be damaged -> how.
    """
    earlier, decisions = cache(partial(_earlier_results, store, plan.recipe.name)), dict[str, CacheDecision]()
    for step in plan.steps:
        fingerprint = _fingerprint(step, plan, decisions, resolver)
        result: Published | None = None
        if step.name in forced:
            reason = "forced"
        elif fingerprint is None:
            reason = "an input on the hub is not resolved to a commit yet"
        elif not (path := store.path(step.kind, fingerprint)).exists():
            reason = _reason_missing(step, decisions, resolver, earlier().get((step.kind, step.name), []))
            reason += "; continues from its checkpoint" if store.has_checkpoint(fingerprint) else ""
        else:
            result, reason = _usable_result(step, path, decisions, resolver, damaged.get(step.name))
        decisions[step.name] = CacheDecision(fingerprint, not reason, reason, None if reason else result)
    return decisions


def cached_results(decisions: Decisions) -> dict[str, Published]:
    return {name: decision.published for name, decision in decisions.items() if decision.published}


def input_records(
    step: Step, decisions: Decisions, results: Mapping[str, Published], resolver: Resolver
) -> dict[str, InputRecord]:
    """What the manifest of a step's result says about its inputs."""
    records = {}
    for name, source in step.inputs.items():
        if isinstance(source, Step):
            digest = results[source.name].manifest.digest if source.name in results else None
            records[name] = InputRecord(step=source.name, fingerprint=decisions[source.name].fingerprint, digest=digest)
        else:
            reference = display_name(resolver.pinned(source))
            records[name] = InputRecord(reference=reference, content=resolver.content(source))
    return records


def changed_input(step: Step, result: Published, results: Mapping[str, Published]) -> str | None:
    """The dependency whose result now differs from the one that `result` was computed from, although its settings are
    the same; None if there is none."""
    for name, source in step.inputs.items():
        if isinstance(source, Step) and source.name in results:
            record = result.manifest.inputs.get(name)
            if record is None or record.digest != results[source.name].manifest.digest:
                return source.name
    return None


def current_reports(plan: Plan, results: Mapping[str, Published]) -> list[tuple[str, Metrics]]:
    """Name and metrics of each report that shows the present results of all steps it depends on."""
    stale = {s.name for s in plan.steps if s.name not in results or changed_input(s, results[s.name], results)}
    stale = plan.descendants(stale)
    return [
        (step.name, results[step.name].manifest.metrics)
        for step in plan.steps
        if step.config.output_kind == "report" and step.name not in stale
    ]


def _usable_result(
    step: Step, path: Path, decisions: Decisions, resolver: Resolver, damage: str | None
) -> tuple[Published | None, str]:
    """The result at `path`, or the reason why it cannot be used."""
    try:
        result = Published(path, read_manifest(path))
    except ManifestError as error:
        return None, f"its result is damaged: {error}"
    inputs = cached_results({source.name: decisions[source.name] for source in step.dependencies})
    if changed := changed_input(step, result, inputs):
        return None, f"{changed} has a new result"
    if damage := damage or result.damage(resolver.hashes.hash_file):
        return None, f"its result is damaged: {damage}"
    return result, ""


def _fingerprint(step: Step, plan: Plan, decisions: Decisions, resolver: Resolver) -> str | None:
    contents: dict[str, str | None] = {}
    for name, source in step.inputs.items():
        contents[name] = decisions[source.name].fingerprint if isinstance(source, Step) else resolver.content(source)
    if None in contents.values():
        return None
    covered: dict[str, Any] = {
        "kind": step.kind,
        "version": step.config.version,
        "settings": step.settings(),
        "inputs": contents,
    }
    if step.config.versioned_packages:
        covered["packages"] = {name: installed_version(name) for name in step.config.versioned_packages}
    if step.config.output_kind == "report":
        covered["names"] = [plan.recipe.name, *sorted(plan.ancestors({step.name}) - {step.name})]  # a report shows them
    return content_hash(covered)[:FINGERPRINT_LENGTH]


def _earlier_results(store: Store, recipe: str) -> dict[tuple[str, str], list[Manifest]]:
    """Kind and name of a step -> its results, with any settings and inputs, that the recipe's runs computed or its last
    run used."""
    results: dict[tuple[str, str], list[Manifest]] = {}
    used = set[str | None]()
    with contextlib.suppress(OSError, ValueError):
        used = {s.fingerprint for s in read_run_record(store.root.parent / recipe).steps if s.path}
    for folder in store.result_folders():
        with contextlib.suppress(ManifestError):
            manifest = read_manifest(folder)
            if manifest.recipe == recipe or manifest.fingerprint in used:
                results.setdefault((manifest.kind, manifest.step), []).append(manifest)
    return results


def _reason_missing(step: Step, decisions: Decisions, resolver: Resolver, earlier: Sequence[Manifest]) -> str:
    """Say what changed since a result was published under the step's name, and which steps run before it."""
    waiting = [source.name for source in step.dependencies if not decisions[source.name].cached]
    changes = [[*_settings(step, old), *_inputs(step, old.inputs, decisions, resolver)] for old in earlier]
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


def _inputs(step: Step, before: Mapping[str, InputRecord], decisions: Decisions, resolver: Resolver) -> Iterator[str]:
    """Changes of inputs, except of the settings of dependencies that have to run."""
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
            same = decisions[source.name].cached and decisions[source.name].fingerprint == old.fingerprint
            if source.name != old.step and not same:
                yield f"{key}: {before_name} -> {source.name}"
            elif decisions[source.name].cached and not same:
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
