"""Which steps of a plan are cached: fingerprints, looked up in the store.

A fingerprint covers the step's settings, the content of its inputs, the version of its kind, and the versions of
packages that give the settings their meaning. It never covers a path, a time, a cell of the matrix, or a name that only
people read.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.plan.cache_reason import EarlierResults, reason_missing
from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Plan, Step, ancestors
from pipeline.store.provenance import installed_version
from pipeline.store.references import display_name
from pipeline.store.store import Published, Store
from stages.records.manifest import InputRecord, ManifestError, read_manifest
from stages.records.metrics import Metrics
from stages.system.integrity import content_hash

FINGERPRINT_LENGTH = 32
"""Hex digits of sha256 that name a result: 128 bits."""


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
    plan: Plan,
    store: Store,
    resolver: Resolver,
    forced: Collection[str] = (),
    damaged: Mapping[str, str] | None = None,
) -> Decisions:
    """Look up all steps of a plan in the store.

    Args:
        resolver: knows the contents of references. Results are checked by remembered file hashes: a change that the
            disk itself made is not seen.
        forced: steps that run even if they have a result.
        damaged: steps whose result is known to be damaged -> how.
    """
    earlier, decisions = EarlierResults(store, plan.recipe.name), dict[str, CacheDecision]()
    for step in plan.steps:
        fingerprint = _fingerprint(step, plan, decisions, resolver)
        result: Published | None = None
        if step.name in forced:
            reason = "forced"
        elif fingerprint is None:
            reason = "an input on the hub is not resolved to a commit yet"
        elif not store.path(step.kind, fingerprint).exists():
            waiting = [source.name for source in step.dependencies if not decisions[source.name].cached]
            fingerprints = {source.name: decisions[source.name].fingerprint for source in step.dependencies}
            reason = reason_missing(step, fingerprints, waiting, resolver, earlier)
            reason += "; continues from its checkpoint" if store.has_checkpoint(fingerprint) else ""
        else:
            result, reason = _usable_result(step, fingerprint, store, decisions, resolver, damaged or {})
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
    return [
        (step.name, results[step.name].manifest.metrics)
        for step in plan.steps
        if step.config.output_kind == "report" and not stale & {step.name, *ancestors(step)}
    ]


def _usable_result(
    step: Step,
    fingerprint: str,
    store: Store,
    decisions: Decisions,
    resolver: Resolver,
    damaged: Mapping[str, str],
) -> tuple[Published | None, str]:
    """The published result, or the reason why it cannot be used."""
    path = store.path(step.kind, fingerprint)
    try:
        result = Published(path, read_manifest(path))
    except ManifestError as error:
        return None, f"its result is damaged: {error}"
    inputs = cached_results({source.name: decisions[source.name] for source in step.dependencies})
    if changed := changed_input(step, result, inputs):
        return None, f"{changed} has a new result"
    if damage := damaged.get(step.name) or result.damage(resolver.hashes.hash_file):
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
        covered["names"] = [plan.recipe.name, *sorted(ancestors(step))]  # a report shows them
    return content_hash(covered)[:FINGERPRINT_LENGTH]
