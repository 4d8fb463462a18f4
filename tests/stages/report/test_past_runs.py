"""Reading a past run from its record and its manifests."""

from __future__ import annotations

from pathlib import Path

from stages.evaluation.past_runs import read_past_run
from stages.records.manifest import Manifest, write_manifest
from stages.records.metrics import Metrics
from stages.records.run_record import StepRecord, write_run_record


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
    run = read_past_run(tmp_path / "small")
    assert {step: result.labels for step, result in run.scores.items()} == {s["step"]: s["labels"] for s in steps}
    assert run.missing == ["bench[base,x=2]"]
    assert run.recipe_file == "small.yaml"
