"""Fingerprints of the shipped recipes equal those of the code before the refactor, so users' results stay cached.

`fingerprints.json` holds the fingerprints that revision b7f1752 computed, with the versions of its kinds and packages.
Kinds whose version was raised since then (report, characteristics) are planned with the recorded version, and packages
count as the recorded ones, so every fingerprint is compared. References to the hub count as commit 0000..., in the file
too: without a hub their steps would have no fingerprint.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.kinds import KINDS
from tests.golden.fingerprints import compact, fixed_versions, plan_fingerprints, read_golden

GOLDEN = read_golden()
REMEDY = """
Users' results of these steps would be computed again. If a refactor caused this, repair it. If the results do change,
raise `version` in stages/KIND/config.py instead, which this test allows. If you changed the recipe or its data, record
the new fingerprints: python -m tests.golden.record fingerprints"""


@pytest.mark.parametrize("recipe", GOLDEN["recipes"])
def test_fingerprints_are_unchanged(recipe: str, tmp_path: Path) -> None:
    with fixed_versions(GOLDEN["versions"], GOLDEN["packages"]):
        planned = compact(plan_fingerprints(recipe, tmp_path))
    expected = GOLDEN["recipes"][recipe]
    problems = [f"{step}: no longer planned" for step in expected.keys() - planned.keys()]
    problems += [f"{step}: new" for step in planned.keys() - expected.keys()]
    problems += [
        f"{step}: {fingerprint} instead of {expected[step]}"
        for step, fingerprint in planned.items()
        if step in expected and fingerprint != expected[step]
    ]
    assert not problems, "\n".join([recipe, *problems, REMEDY])
    assert list(planned) == list(expected), "the order of the steps differs"


def test_versions_only_rise() -> None:
    lowered = {kind: version for kind, version in GOLDEN["versions"].items() if KINDS[kind].version < version}
    assert not lowered, "results of the recorded versions would be used again"
