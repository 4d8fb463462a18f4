"""Outputs of every kind of stage equal the recorded ones. They guard the kinds' versions: a changed output needs a new
version, so that users' older results are computed again.

Texts, tokens and counts are compared exactly, floats that a model computes within TOLERANCE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.kinds import KINDS
from tests.golden.cases import CASES
from tests.golden.record import golden_file, run_case

TOLERANCE = 1e-4
"""Absolute; two machines differ in the last bits."""
EXACT_KEYS = ("learning_rate", "epoch")
"""Floats that no model computes."""
SHOWN = 12
"""Differences that a message shows at most."""


def differences(expected: Any, actual: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each difference."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in expected.keys() | actual.keys():
            path = f"{place}/{key}"
            if key not in actual:
                yield f"{path}: missing"
            elif key not in expected:
                yield f"{path}: new: {actual[key]!r}"
            else:
                yield from differences(expected[key], actual[key], path)
    elif isinstance(expected, list) and isinstance(actual, list):
        for number, (old, new) in enumerate(zip(expected, actual, strict=False)):
            yield from differences(old, new, f"{place}/{number}")
        if len(expected) != len(actual):
            yield f"{place}: {len(actual)} entries instead of {len(expected)}"
    elif isinstance(expected, float) and isinstance(actual, float):
        tolerance = 0.0 if place.endswith(EXACT_KEYS) else TOLERANCE
        if not math.isclose(expected, actual, rel_tol=1e-9, abs_tol=tolerance):
            yield f"{place}: {actual!r} instead of {expected!r}"
    elif expected != actual or type(expected) is not type(actual):
        yield f"{place}:\n    {actual!r}\n  instead of\n    {expected!r}"


def remedy(kind: str, recorded: int) -> str:
    """What to do about a changed output."""
    return (
        f"If the change is wanted: raise `version` in stages/{kind}/config.py if the version is still {recorded}; then"
        f" record the new output: python -m tests.golden.record {kind}; and add a line to CHANGELOG.md."
    )


def test_every_kind_has_a_case() -> None:
    assert CASES.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", CASES)
def test_outputs_are_unchanged(kind: str, tmp_path: Path) -> None:
    golden = json.loads(golden_file(kind).read_text(encoding="utf-8"))
    case = run_case(kind, tmp_path)
    lines = sorted(differences(golden["outputs"], case["outputs"]))
    shown = "\n".join(lines[:SHOWN]) + f"\n... {len(lines)} differences" * (len(lines) > SHOWN)
    assert not lines, f"{kind}: outputs differ from tests/golden/outputs/{kind}.json:\n{shown}\n" + remedy(
        kind, golden["version"]
    )
    assert case["version"] == golden["version"], (
        f"{kind}: version {case['version']}, but tests/golden/outputs/{kind}.json is of version {golden['version']}."
        f" Record it: python -m tests.golden.record {kind}; and add a line to CHANGELOG.md."
    )


def test_differences_are_found() -> None:
    """A loss at the fourth decimal, a text, a count, a missing key and a new row each give a line."""
    expected = {"loss": 1.0, "text": ["a", "b"], "count": 3, "gone": 1, "learning_rate": 3e-4}
    actual = {"loss": 1.0002, "text": ["a", "c", "d"], "count": 4, "new": 1, "learning_rate": 2.9e-4}
    places = sorted(line.partition(":")[0] for line in differences(expected, actual))
    assert places == ["/count", "/gone", "/learning_rate", "/loss", "/new", "/text", "/text/1"]
    assert list(differences({"loss": 1.0}, {"loss": 1.00005})) == []
