"""What a run left, read from its record and its manifests."""

from __future__ import annotations

import json
from pathlib import Path

from stages.records.past_runs import read_run


def test_equal_steps_of_one_run_are_all_there(tmp_path: Path) -> None:
    """Two cells that came to the same settings share one result, and each keeps its name and its cell."""
    place = tmp_path / "store" / "lm_eval" / "f"
    place.mkdir(parents=True)
    manifest = {"config": {"models": ["base"]}, "metrics": {"results": []}, "inputs": {}, "sha256": "x"}
    (place / "stage.json").write_text(json.dumps(manifest))
    same = {"kind": "lm_eval", "fingerprint": "f", "path": "store/lm_eval/f"}
    steps = [{"step": f"bench[base,x={x}]", "labels": {"x": x}, **same} for x in ("1", "1.0")]
    lost = {"step": "bench[base,x=2]", "labels": {"x": "2"}, "kind": "lm_eval", "fingerprint": "g", "path": None}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "run.json").write_text(json.dumps({"steps": [*steps, lost]}))
    found = read_run(tmp_path / "small")
    assert {step: given.labels for step, given in found.scores.items()} == {s["step"]: s["labels"] for s in steps}
    assert found.missing == ["bench[base,x=2]"]
