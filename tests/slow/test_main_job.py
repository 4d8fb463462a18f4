"""The default recipe, whole: two runs in different folders give the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.run.test_command import environment

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(folder: Path) -> Path:
    """The main job from a copy of the recipes in `folder`; the folder of its results."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    call = [sys.executable, "-P", "-m", "pipeline.cli", "recipes/wit_dpo.yaml"]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "wit-dpo"


def test_two_fresh_runs_are_equal(tmp_path: Path) -> None:
    """FRESH_RUN names a folder of runs that `make run` has just made in a fresh clone: it is the first of the two."""
    folder = os.environ.get("FRESH_RUN")
    first = Path(folder) / "wit-dpo" if folder else run(tmp_path / "first")
    second = run(tmp_path / "a" / "much" / "longer" / "path")
    assert (first / "report" / "results.csv").read_bytes() == (second / "report" / "results.csv").read_bytes()
    for name in [step["step"] for step in json.loads((first / "run.json").read_text())["steps"]]:
        manifests = [json.loads((runs / name / "stage.json").read_text()) for runs in (first, second)]
        assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
        assert all(manifest["environment"]["repeatable"] for manifest in manifests)
        if name != "report":  # which shows times
            assert manifests[0]["outputs"] == manifests[1]["outputs"], name
