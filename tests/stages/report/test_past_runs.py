"""Reading a past run from its record and its manifests."""

from __future__ import annotations

import json
from pathlib import Path

from stages.records.past_runs import read_run


def test_equal_steps_of_one_run_are_all_read(tmp_path: Path) -> None:
    """Two cells with the same settings share one result; each keeps its name and its cell."""
    place = tmp_path / "store" / "lm_eval" / "f"
    place.mkdir(parents=True)
    manifest = {"config": {"models": ["base"]}, "metrics": {"results": []}, "inputs": {}, "sha256": "x"}
    (place / "stage.json").write_text(json.dumps(manifest))
    same = {"kind": "lm_eval", "fingerprint": "f", "path": "store/lm_eval/f"}
    steps = [{"step": f"bench[base,x={x}]", "labels": {"x": x}, **same} for x in ("1", "1.0")]
    lost = {"step": "bench[base,x=2]", "labels": {"x": "2"}, "kind": "lm_eval", "fingerprint": "g", "path": None}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "run.json").write_text(json.dumps({"steps": [*steps, lost]}))
    past_run = read_run(tmp_path / "small")
    assert {step: result.labels for step, result in past_run.scores.items()} == {s["step"]: s["labels"] for s in steps}
    assert past_run.missing == ["bench[base,x=2]"]
