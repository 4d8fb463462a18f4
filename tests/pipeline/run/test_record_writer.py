"""run.json is written at most once a second, and nothing that happened in between is held back for longer."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipeline.run.record_writer import INTERVAL_SECONDS, RecordWriter
from stages.records.run_record import StepRecord


def written(folder: Path) -> str:
    return str(json.loads((folder / "run.json").read_text())["status"])


def test_what_comes_too_soon_is_written_as_soon_as_it_may(tmp_path: Path) -> None:
    record = RecordWriter(tmp_path, "r", "r.yaml")
    record.write("done")
    assert record.seconds_until_due() is None
    record.update(StepRecord(step="it", kind="sft", labels={}, state="running", fingerprint="f", path=None))
    assert not record.write_if_due()
    assert written(tmp_path) == "done"
    seconds = record.seconds_until_due()
    assert seconds is not None
    assert 0 < seconds <= INTERVAL_SECONDS
    time.sleep(seconds)
    assert record.seconds_until_due() == 0
    assert record.write_if_due()
    assert written(tmp_path) == "running"
    assert record.seconds_until_due() is None
    assert not record.write_if_due(), "nothing has changed"


def test_a_run_knows_whose_record_it_replaces(tmp_path: Path) -> None:
    first = RecordWriter(tmp_path, "r", "r.yaml")
    assert first.taken_over_from() is None
    first.write("done")
    assert first.taken_over_from() is None
    assert RecordWriter(tmp_path, "r", "../other/r.yaml").taken_over_from() == "r.yaml"
    (tmp_path / "run.json").write_text("{}")
    assert first.taken_over_from() is None
