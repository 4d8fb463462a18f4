"""Reading a past run from its record and its manifests."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.base import Input, UserError
from stages.evaluation.past_runs import read_past_run
from stages.records.manifest import InputRecord, Manifest, write_manifest
from stages.records.metrics import Metrics
from stages.records.run_record import StepRecord, write_run_record
from stages.report.config import ReportStage
from stages.report.runs import read_joined_runs, runs_table
from stages.system.integrity import files_in


def test_equal_steps_of_one_run_are_all_read(tmp_path: Path) -> None:
    """Two cells with the same settings share one result; each keeps its name and its cell."""
    place = tmp_path / "store" / "lm_eval" / "f"
    place.mkdir(parents=True)
    manifest = Manifest(
        step="bench[base,x=1]",
        kind="lm_eval",
        version=1,
        fingerprint="f",
        config={"models": ["base"]},
        inputs={},
        metrics=Metrics(results=[]),
        environment={},
        started="",
        seconds=1.0,
        outputs={},
    )
    write_manifest(place, manifest)
    same = {"kind": "lm_eval", "fingerprint": "f", "path": "store/lm_eval/f", "state": "done"}
    steps = [{"step": f"bench[base,x={x}]", "labels": {"x": x}, **same} for x in ("1", "1.0")]
    lost = {"step": "bench[base,x=2]", "labels": {"x": "2"}, "kind": "lm_eval", "fingerprint": "g", "path": None}
    (tmp_path / "small").mkdir()
    write_run_record(
        *(tmp_path / "small", "small", "done", 1),
        [StepRecord(**step) for step in (*steps, lost | {"state": "failed"})],
        "small.yaml",
    )
    section = ReportStage(runs=["small"])  # type: ignore[list-item]
    (run,) = read_joined_runs({"run:small": Input(tmp_path / "small")}, section)
    evaluations = run.results.evaluations
    assert {step: result.labels for step, result in evaluations.items()} == {s["step"]: s["labels"] for s in steps}
    assert run.missing == ["bench[base,x=2]"]
    assert [cell.text for cell in runs_table([run]).rows[0]] == ["small", "small/run.json", "small.yaml"]


def past_run(folder: Path, inputs: dict[str, dict[str, InputRecord]]) -> Path:
    """Write a run of evaluations: fingerprint -> inputs. Each has a file of samples."""
    for fingerprint, records in inputs.items():
        place = folder / "store/lm_eval" / fingerprint
        place.mkdir(parents=True)
        (place / "samples_x.jsonl").write_text('{"acc": 1.0}\n')
        manifest = Manifest(
            step=fingerprint, kind="lm_eval", version=1, fingerprint=fingerprint, config={}, inputs=records,
            metrics=Metrics(results=[]), environment={}, started="", seconds=1.0, outputs=files_in(place),
        )  # fmt: skip
        write_manifest(place, manifest)
    steps = [
        StepRecord(step=name, kind="lm_eval", labels={}, state="done", fingerprint=name, path=f"store/lm_eval/{name}")
        for name in inputs
    ]
    (folder / "r").mkdir()
    write_run_record(folder / "r", "r", "done", 1, steps, "r.yaml")
    return folder / "r"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage.json", r"a of r: stage\.json was changed after it was written; run its recipe again"),
        ("samples_x.jsonl", r"a of r: samples_x\.jsonl was changed after it was written; run its recipe again"),
    ],
)
def test_a_changed_digit_in_a_joined_run_is_found(tmp_path: Path, name: str, message: str) -> None:
    run = past_run(tmp_path, {"a": {}})
    assert list(read_past_run(run)[0]) == ["a"]
    file = tmp_path / "store/lm_eval/a" / name
    file.write_text(file.read_text().replace("1.0", "2.0"))
    with pytest.raises(UserError, match=message):
        read_past_run(run)


def test_a_result_that_was_computed_from_itself_is_refused(tmp_path: Path) -> None:
    inputs = {name: {"model": InputRecord(step=other, fingerprint=other)} for name, other in (("a", "b"), ("b", "a"))}
    with pytest.raises(UserError, match="was computed from itself; run its recipe again"):
        read_past_run(past_run(tmp_path, inputs))
