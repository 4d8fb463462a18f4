"""The hooks that CONTRIBUTING.md recommends work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_hooks_before_a_commit_are_in_order() -> None:
    call = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    entries = re.findall(r"entry: \.venv/bin/(\w+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert entries == ["ruff", "ruff", "mypy"]
