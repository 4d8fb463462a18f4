"""The fingerprints of all steps of the shipped recipes, planned without a hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.plan.cache import decide
from pipeline.plan.planner import build_plan
from pipeline.plan.resolver import Resolver
from pipeline.plan.search import Search
from pipeline.recipe import loader
from pipeline.store.store import Store
from stages.kinds import KINDS

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("fingerprints.json")
COMMIT = "0" * 40
"""The commit that every branch of the hub is at."""
FULL_LIST = 40
"""The file lists this many steps of a recipe; a hash of all steps covers the others."""
ALL_STEPS = "sha256 of all steps"


def read_golden() -> dict[str, Any]:
    """Read the recorded versions, packages and fingerprints."""
    return json.loads(FILE.read_text(encoding="utf-8"))


@contextmanager
def fixed_versions(versions: Mapping[str, int], packages: Mapping[str, str]) -> Iterator[None]:
    """Plan as if the kinds had these versions, these packages were installed and every branch were at COMMIT."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, version in versions.items():
            patch.setattr(KINDS[kind], "version", version)
        patch.setattr("pipeline.plan.cache.installed_version", packages.get)
        patch.setattr("pipeline.store.hub.cached_commit", lambda _: COMMIT)
        yield


def plan_fingerprints(recipe: str, runs: Path) -> dict[str, str | None]:
    """Return step -> fingerprint, as `run-recipe RECIPE --plan` shows them; of a search the steps of its first rung."""
    resolver = Resolver(runs, lambda _: None)
    cells = loader.load(ROOT / recipe, [], [])
    plan = next(Search(build_plan(cells, resolver), cells, resolver, lambda _: None).plans())
    return {name: decision.fingerprint for name, decision in decide(plan, Store(runs / "store"), resolver).items()}


def compact(fingerprints: Mapping[str, str | None]) -> dict[str, str | None]:
    """Return the first FULL_LIST steps, with a hash of all steps if there are more."""
    if len(fingerprints) <= FULL_LIST:
        return dict(fingerprints)
    lines = "".join(f"{step}:{fingerprint}\n" for step, fingerprint in fingerprints.items())
    return dict(list(fingerprints.items())[:FULL_LIST]) | {ALL_STEPS: hashlib.sha256(lines.encode()).hexdigest()}
