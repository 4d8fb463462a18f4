"""Why a step has to run, in the words of the recipe: what differs from the result that was made most like it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.store.provenance import installed_version
from pipeline.store.store import CHECKPOINTS, BadManifest, Published, Store, read

if TYPE_CHECKING:
    from pipeline.plan.planner import Plan, Step

SHOWN = 3
"""How many changes are named before the rest is counted."""


class Earlier:
    """The results in a store by the name of their step, read when the first is asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._by_step: dict[tuple[str, str], list[Published]] | None = None

    def of(self, step: Step) -> list[Published]:
        """Those made under this step's name, be it from other settings or inputs."""
        if self._by_step is None:
            self._by_step = {}
            for place in self.store.places():
                try:
                    found = read(place)
                except BadManifest:
                    continue
                self._by_step.setdefault((found.manifest["kind"], found.manifest["step"]), []).append(found)
        return self._by_step.get((step.kind, step.name), [])


def why_missing(step: Step, plan: Plan, earlier: Earlier) -> str:
    """Why a step has no result: what changed since one was made under its name, and what has to run before it."""
    waiting = [need.name for need in step.needs if need.state == "run"]
    told = min((changes(step, old, plan) for old in earlier.of(step)), key=len, default=["no result yet"])
    if not told and not waiting:
        told = ["names that it shows are others now"]  # of the recipe or its steps, which count for reports alone
    told = listed(told, SHOWN)
    told += [f"after {', '.join(listed(waiting, SHOWN))}"] if waiting else []
    kept = earlier.store.unfinished(step.fingerprint or "") / CHECKPOINTS
    told += ["goes on from where it was interrupted"] if kept.is_dir() and any(kept.iterdir()) else []
    return "; ".join(told)


def changes(step: Step, old: Published, plan: Plan) -> list[str]:
    """What differs between `step` and the settings and inputs that `old` was made from; what runs before the step is
    left out."""
    return [*_settings(step, old.manifest), *_inputs(step, old.manifest["inputs"], plan)]


def _settings(step: Step, manifest: Mapping[str, Any]) -> Iterator[str]:
    if manifest["version"] != step.config.version:
        yield f"stages of kind {step.kind} work otherwise now (version {manifest['version']} -> {step.config.version})"
    packages = manifest["environment"].get("packages", {})
    for name in step.config.versioned_packages:
        if packages.get(name) != (version := installed_version(name)):
            yield f"{name} {packages.get(name)} -> {version}"
    before = dict(_flat(step.without_references(manifest["config"])))
    now = dict(_flat(step.settings()))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            yield f"stages.{step.stage}.{key} {_shown(before, key)} -> {_shown(now, key)}"


def _inputs(step: Step, before: Mapping[str, Any], plan: Plan) -> Iterator[str]:
    from pipeline.plan.planner import Step

    needs = step.config.needs()
    for name in sorted(before.keys() | step.inputs.keys()):
        key = f"stages.{step.stage}.{needs[name].key if name in needs else name}"
        source = step.inputs.get(name)
        if source is None:
            yield f"{key} is not given any more"
        elif name not in before:
            yield f"{key} is new"
        elif isinstance(source, Step):
            if source.fingerprint != before[name].get("fingerprint") and source.state == "cached":
                yield f"{source.name} is made from other settings"
        elif plan.contents[source] != before[name].get("content"):
            yield f"{key}: {before[name].get('reference')} has other content"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value in nested mappings and lists under its dotted key."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{key}.{index}")
    else:
        yield key, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "unset"


def listed(names: Sequence[str], most: int) -> list[str]:
    """The first few names, and how many more there are."""
    if len(names) <= most:
        return list(names)
    return [*names[: most - 1], f"{len(names) - most + 1} more"]
