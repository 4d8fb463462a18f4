"""Which steps of a plan have their result already: its fingerprint, looked up in the store.

A fingerprint covers a step's settings, the content of its inputs, its stage's version and those of the packages that
decide what the settings mean; never a path, a time, a cell of the matrix or a name that only people read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.plan.cache_reason import Earlier, why_missing
from pipeline.plan.planner import Plan, Step, ancestors
from pipeline.store import references
from pipeline.store.provenance import installed_version
from pipeline.store.store import BadManifest, Store, read
from stages.system.integrity import content_hash

FINGERPRINT_LENGTH = 32
"""Hex digits of sha256 that name a published step: 128 bits."""


def refresh(plan: Plan, store: Store, forced: Iterable[str] = (), damaged: Mapping[str, str] | None = None) -> None:
    """Find out anew which steps are cached; `forced` ones never are, nor those known to be `damaged`, step -> how.

    Files are told to be whole by their remembered hashes: what a disk changed by itself is not seen.
    """
    earlier = Earlier(store)
    for source in (source for step in plan.steps for source in step.inputs.values()):
        if not isinstance(source, Step) and source not in plan.contents:
            plan.contents[source] = references.content_hash(source, plan.hashes.hash_file)
    for step in plan.steps:
        step.fingerprint, step.published = _fingerprint(step, plan), None
        step.why = _why_run(step, plan, store, earlier, set(forced), damaged or {})
        step.state = "run" if step.why else "cached"
        if step.why:
            step.published = None


def inputs_of(step: Step, plan: Plan) -> dict[str, dict[str, str | None]]:
    """What a manifest says of a step's inputs: which content they had."""
    found: dict[str, dict[str, str | None]] = {}
    for name, source in step.inputs.items():
        if isinstance(source, Step):
            digest = source.published.digest if source.published else None
            found[name] = {"step": source.name, "fingerprint": source.fingerprint, "digest": digest}
        else:
            found[name] = {"reference": references.display_name(source), "content": plan.contents[source]}
    return found


def changed_input(step: Step) -> str | None:
    """The step whose result is another than the one that `step` was made from, though their settings are the same."""
    assert step.published is not None
    for name, source in step.inputs.items():
        made_from = step.published.manifest["inputs"].get(name, {}).get("digest")
        if isinstance(source, Step) and source.published and made_from != source.published.digest:
            return source.name
    return None


def reports_of(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """The step name and metrics of every report that is made, and of what the plan's results are now."""
    made = [step for step in plan.steps if step.config.output_kind == "report" and step.published]
    stale = {step.name for step in plan.steps if step.published is None or changed_input(step)}
    return [
        (step.name, step.published.manifest["metrics"])
        for step in made
        if step.published and not stale & {step.name, *ancestors(step)}
    ]


def _why_run(
    step: Step, plan: Plan, store: Store, earlier: Earlier, forced: set[str], damaged: Mapping[str, str]
) -> str:
    """Why the step has to run; empty where its published result serves, which is then noted."""
    if step.name in forced:
        return "asked for"
    if step.fingerprint is None:
        return "an input on the hub is not resolved to a commit yet"
    place = store.path(step.kind, step.fingerprint)
    if not place.exists():
        return why_missing(step, plan, earlier)
    try:
        step.published = read(place)
    except BadManifest as error:
        return f"its result is damaged: {error}"
    if changed := changed_input(step):
        return f"{changed} was made again and came out differently"
    if damage := damaged.get(step.name) or step.published.damage(plan.hashes.hash_file):
        return f"its result is damaged: {damage}"
    return ""


def _fingerprint(step: Step, plan: Plan) -> str | None:
    contents: dict[str, str | None] = {}
    for name, source in step.inputs.items():
        contents[name] = source.fingerprint if isinstance(source, Step) else plan.contents[source]
    if None in contents.values():
        return None
    what = {"kind": step.kind, "version": step.config.version, "settings": step.settings(), "inputs": contents}
    if step.config.versioned_packages:
        what["packages"] = {name: installed_version(name) for name in step.config.versioned_packages}
    if step.config.output_kind == "report":
        what["names"] = [plan.recipe.name, *sorted(ancestors(step))]  # a report shows them
    return content_hash(what)[:FINGERPRINT_LENGTH]
