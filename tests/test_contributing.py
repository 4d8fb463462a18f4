"""CONTRIBUTING.md shows the house as it stands, and what it tells to use is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("room", ["pipeline", "stages"])
def test_the_map_has_every_file(room: str) -> None:
    """Every module and package is named in backticks in the table of its folder, and nothing else."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = re.split(r"\| question \| where in `(\w+)/` \|", text.split("## How we work")[0])
    rows = dict(zip(table[1::2], table[2::2], strict=True))[room]
    named = set(re.findall(r"`(\w+)`", rows))
    there = {path.stem for path in (ROOT / room).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    inside = there | {path.stem for path in (ROOT / room).rglob("*.py")}
    assert there - {"__init__"} <= named
    assert named <= inside


def test_the_hooks_before_a_commit_are_in_order() -> None:
    call = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = re.findall(r"entry: \.venv/bin/(\w+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert entries == ["ruff", "ruff", "mypy"]
