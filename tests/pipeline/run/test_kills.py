"""The small recipe, killed in every step and while publishing: benchmarks.faults on what runs in a minute."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.faults import faults
from tests.pipeline.run.test_command import RECIPE, environment, write_world

pytestmark = pytest.mark.long

STEPS = ["wit", "dpo", "bench[dpo]", "report"]
"""Of every kind; of training, with and without LoRA, and of one that starts from another's result."""


def test_killed_in_every_step(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path, model_folder)
    recipe = yaml.safe_load(RECIPE)
    del recipe["stages"]["it"]
    recipe["stages"]["bench"]["models"] = ["dpo"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kills, differ = faults(str(tmp_path / "r.yaml"), tmp_path, kills=len(STEPS), seed=1)
    assert [kill.step for kill in kills] == STEPS
    assert {kill.victim for kill in kills} == {"command", "worker", "both"}
    assert any(kill.while_publishing for kill in kills)
    assert differ == []
