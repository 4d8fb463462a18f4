"""The small recipe, killed in every step and while publishing: benchmarks.faults on what runs in a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults import faults
from tests.pipeline.test_command import STEPS, environment, write_world


def test_killed_in_every_step(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path, model_folder)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kills, differ = faults(str(tmp_path / "r.yaml"), tmp_path, kills=len(STEPS), seed=1)
    assert [kill.step for kill in kills] == STEPS
    assert {kill.victim for kill in kills} == {"command", "worker", "both"}
    assert any(kill.while_publishing for kill in kills)
    assert differ == []
