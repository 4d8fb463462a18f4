"""Evaluations on a CUDA device: `pytest -m gpu tests/gpu`. vLLM's need `pip install -e '.[vllm]'`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from stages.evaluation.config import EvaluationStage
from stages.inference.loading import load_engine
from stages.inference.requests import GenerationRequest, ScoreRequest
from tests.pipeline.run.test_command import command

pytestmark = pytest.mark.gpu
PROMPTS = ["Q: Who is it?\nA:", "Who?", "Q: Which one of them is it, please?\nA:"]
RECIPE = """\
name: pocket
model: {pocket}/model
stages:
  {backend}:
    kind: lm_eval
    models: [base]
    include_path: {pocket}/tasks
    tasks: [{{task: pocket_knowledge, num_fewshot: 0, data: {{test: {pocket}/data/knowledge.test.jsonl}}}}]
    options: {{apply_chat_template: true, dtype: float32, backend: {backend}}}
"""


def test_answers_and_log_probabilities_are_those_of_a_cpu(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        PartialState._reset_state()
        model = load_engine(EvaluationStage(models=["tiny"]), model_folder)
        model.model.to("cuda" if gpu else "cpu")  # type: ignore[arg-type]
        encoded = [model.encode(prompt) for prompt in PROMPTS]
        answers = model.generate([GenerationRequest(prompt, 8) for prompt in encoded])
        pairs = [ScoreRequest(prompt, tuple(answer)) for prompt in encoded for answer in answers]
        results.append((answers, [score.log_prob for score in model.score(pairs)]))
        assert model.notes() == []
    assert results[0][0] == results[1][0]
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-3)


@pytest.mark.parametrize("backend", ["hf", "vllm"])
def test_benchmarks_on_either_backend(tmp_path: Path, backend: str) -> None:
    pocket = Path(__file__).parents[2] / "recipes" / "pocket"
    (tmp_path / "r.yaml").write_text(RECIPE.format(pocket=pocket, backend=backend))
    done = command(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest: dict[str, Any] = json.loads((tmp_path / f"runs/pocket/{backend}[base]/stage.json").read_text())
    accuracy = next(row["value"] for row in manifest["metrics"]["results"] if row["metric"] == "acc")
    assert accuracy == pytest.approx(0.896, abs=0.01), "as README shows of the base model, measured on a CPU"
