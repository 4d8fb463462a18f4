"""An evaluation in two processes: each has a part of the items, and the scores are those of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline.run.test_command import command

pytestmark = pytest.mark.long

RECIPE = """\
name: small
model: {model}
stages:
  one: &one
    kind: lm_eval
    models: [base]
    include_path: ./tasks
    tasks:
      - {{task: tiny_choice, data: {{test: test.jsonl}}}}
      - {{task: tiny_generate, data: {{test: test.jsonl}}}}
    options: {{batch_size: 4, dtype: float32, bootstrap_iters: 20, limit: 19, max_length: 50}}
  two: {{<<: *one, launch: {{num_processes: 2}}}}
"""


def test_two_processes_give_the_scores_of_one(world: Path, model_path: Path) -> None:
    """Also where the items cannot be shared evenly."""
    (world / "r.yaml").write_text(RECIPE.format(model=model_path))
    done = command(world)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics: list[dict[str, Any]] = []
    for name in ("one", "two"):
        manifest = json.loads((world / "runs" / "small" / f"{name}[base]" / "stage.json").read_text())
        metrics.append(manifest["metrics"])
    assert [each["environment"]["processes"] for each in metrics] == [1, 2]
    assert len(metrics[0]["results"]) > 2
    assert len(metrics[0]["notes"]) == 2  # of each task some items do not fit
    assert metrics[1]["notes"] == metrics[0]["notes"]
    for one, two in zip(metrics[0]["results"], metrics[1]["results"], strict=True):
        tolerance = 0.1 if one["metric"] == "chrf" else 1e-9  # a bootstrap goes by the order of the items, a sum hardly
        assert two == one | {"stderr": pytest.approx(one["stderr"], rel=tolerance)}
    samples = [world / "runs" / "small" / f"{name}[base]" / "samples_tiny_choice.jsonl" for name in ("one", "two")]
    documents = [sorted(json.loads(line)["doc_id"] for line in file.open()) for file in samples]
    assert documents[0] == documents[1] == list(range(19))
