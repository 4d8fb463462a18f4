"""run.json is written at most once a second, and nothing that happened in between is held back for longer."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.run import record_writer
from pipeline.run.record_writer import INTERVAL_SECONDS, MAX_SHARE, RecordWriter
from stages.records.run_record import StepRecord


class Clock:
    """Seconds that pass only when a test says so, however slow the disk is."""

    def __init__(self) -> None:
        self.now = self.seconds_per_reading = 0.0

    def monotonic(self) -> float:
        self.now += self.seconds_per_reading
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(record_writer, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def written(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def test_what_comes_too_soon_is_written_as_soon_as_it_may(tmp_path: Path, clock: Clock) -> None:
    record = RecordWriter(tmp_path, "r", "r.yaml")
    record.write("done")
    assert record.seconds_until_due() is None
    record.update(StepRecord(step="it", kind="sft", labels={}, state="running", fingerprint="f", path=None))
    assert not record.write_if_due()
    assert written(tmp_path) == "done"
    seconds = record.seconds_until_due()
    assert seconds is not None
    assert 0 < seconds <= INTERVAL_SECONDS
    clock.now += seconds
    assert record.seconds_until_due() == 0
    assert record.write_if_due()
    assert written(tmp_path) == "running"
    assert record.seconds_until_due() is None
    assert not record.write_if_due(), "nothing has changed"


def test_a_slow_write_makes_the_interval_longer(tmp_path: Path, clock: Clock) -> None:
    record = RecordWriter(tmp_path, "r", "r.yaml")
    clock.seconds_per_reading = 0.5  # the write reads the clock before and after
    record.write("done")
    clock.seconds_per_reading = 0.0
    record.update(StepRecord(step="it", kind="sft", labels={}, state="running", fingerprint="f", path=None))
    assert record.seconds_until_due() == pytest.approx(0.5 / MAX_SHARE)


def test_a_run_knows_whose_record_it_replaces(tmp_path: Path) -> None:
    first = RecordWriter(tmp_path, "r", "r.yaml")
    assert first.taken_over_from() is None
    first.write("done")
    assert first.taken_over_from() is None
    assert RecordWriter(tmp_path, "r", "../other/r.yaml").taken_over_from() == "r.yaml"
    (tmp_path / "run.json").write_text("{}")
    assert first.taken_over_from() is None
