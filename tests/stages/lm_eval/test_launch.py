"""An evaluation in two processes has the scores of an evaluation in one."""

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
    options: {{dtype: float32, bootstrap_iters: 20, limit: 19, max_length: 50}}
  two: {{<<: *one, launch: {{num_processes: 2}}}}
"""


def test_two_processes_give_the_scores_of_one(world: Path, model_path: Path) -> None:
    """The number of items is odd, so that the processes have different numbers of them."""
    (world / "r.yaml").write_text(RECIPE.format(model=model_path))
    process = command(world)
    assert process.returncode == 0, process.stdout + process.stderr
    metrics: list[dict[str, Any]] = []
    for name in ("one", "two"):
        manifest = json.loads((world / "runs" / "small" / f"{name}[base]" / "stage.json").read_text())
        metrics.append(manifest["metrics"])
    assert [step["environment"]["processes"] for step in metrics] == [1, 2]
    assert len(metrics[0]["results"]) > 2
    assert len(metrics[0]["notes"]) == 2  # both tasks have truncated items
    assert metrics[1]["notes"] == metrics[0]["notes"]
    for one, two in zip(metrics[0]["results"], metrics[1]["results"], strict=True):
        tolerance = 0.1 if one["metric"] == "chrf" else 1e-9  # a bootstrap depends on the order of the items
        assert two == one | {"stderr": pytest.approx(one["stderr"], rel=tolerance)}
    samples = [world / "runs" / "small" / f"{name}[base]" / "samples_tiny_choice.jsonl" for name in ("one", "two")]
    documents = [sorted(json.loads(line)["doc_id"] for line in file.open()) for file in samples]
    assert documents[0] == documents[1] == list(range(19))
