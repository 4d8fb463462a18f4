"""The engine of a checkpoint: its checks, its log, and what it does when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.config import EvaluationStage
from stages.inference.engine import Engine
from stages.inference.loading import load_engine
from stages.inference.requests import GenerationRequest, ScoreRequest
from tests.stages.inference.conftest import PLAIN, SHARING, build
from tests.tiny import byte_tokenizer

Prompts = list[tuple[int, ...]]


def checkpoint(config: Any, folder: Path) -> Path:
    build(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def open_engine(folder: Path, log: AnswerLog | None = None, budget: int | None = None) -> Engine:
    engine = load_engine(EvaluationStage(models=["m"]), folder, log)
    engine.budget = budget or engine.budget
    return engine


def asked(prompts: Prompts) -> tuple[list[ScoreRequest], list[GenerationRequest]]:
    return (
        [ScoreRequest(prompt, prompt[:2]) for prompt in prompts],
        [GenerationRequest(prompt, 6) for prompt in prompts],
    )


def plain_scores(engine: Engine, requests: list[ScoreRequest]) -> list[float]:
    values = []
    for request in requests:
        with torch.no_grad():
            logits = engine.model(torch.tensor([request.tokens[:-1]]), use_cache=False).logits[0].double()
        log_probs = torch.log_softmax(logits, -1)[len(request.prompt) - 1 :]
        values.append(float(log_probs.gather(1, torch.tensor(request.answer)[:, None]).sum()))
    return values


@pytest.mark.parametrize("name", PLAIN)
def test_models_that_cannot_share_answer_one_by_one(name: str, prompts: Prompts, tmp_path: Path) -> None:
    engine = open_engine(checkpoint(PLAIN[name], tmp_path))
    scoring, generating = asked(prompts)
    scores = [score.log_prob for score in engine.score(scoring)]
    assert scores == pytest.approx(plain_scores(engine, scoring), abs=5e-5)
    answers = engine.generate(generating)
    ids = torch.tensor([prompts[0]])
    output = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert answers[0] == output[0, len(prompts[0]) :].tolist()
    assert any("one by one" in note for note in engine.notes())


def test_models_that_share_say_nothing(prompts: Prompts, tmp_path: Path) -> None:
    engine = open_engine(checkpoint(SHARING["llama"], tmp_path))
    scoring, generating = asked(prompts)
    assert [each.log_prob for each in engine.score(scoring)] == pytest.approx(plain_scores(engine, scoring), abs=5e-5)
    assert all(0 < len(answer) <= 6 for answer in engine.generate(generating))
    assert engine.notes() == []


def test_kept_answers_are_not_asked_again(prompts: Prompts, tmp_path: Path) -> None:
    folder, file = checkpoint(SHARING["llama"], tmp_path / "model"), tmp_path / "log.jsonl"
    scoring, generating = asked(prompts)
    first = open_engine(folder, AnswerLog(file))
    scores, answers = first.score(scoring), first.generate(generating)
    second = open_engine(folder, AnswerLog(file))
    second.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was asked again"))
    counts: list[int] = []
    assert second.score(scoring, counts.append) == scores
    assert second.generate(generating, counts.append) == answers
    assert counts == [len(scoring), len(generating)]


def test_a_stop_ends_an_answer(prompts: Prompts, tmp_path: Path) -> None:
    engine = open_engine(checkpoint(SHARING["llama"], tmp_path))
    (answer,) = engine.generate([GenerationRequest(prompts[0], 40)])
    text = engine.tokenizer.decode(answer[:5])
    (stopped,) = engine.generate([GenerationRequest(prompts[0], 40, stops=(text[-2:],))])
    assert stopped == answer[: len(stopped)]
    assert len(stopped) <= 5
    assert text[-2:] in engine.tokenizer.decode(stopped)


def test_a_stream_has_the_same_tokens(prompts: Prompts, tmp_path: Path) -> None:
    engine = open_engine(checkpoint(SHARING["llama"], tmp_path))
    request = GenerationRequest(prompts[0], 20)
    assert list(engine.stream(request)) == engine.generate([request])[0]


def test_passes_shrink_until_they_fit_the_memory(prompts: Prompts, tmp_path: Path) -> None:
    engine = open_engine(checkpoint(SHARING["llama"], tmp_path), budget=512)
    scoring, _ = asked(prompts)
    expected = plain_scores(engine, scoring)

    def run_out(_module: Any, _args: Any, options: dict[str, Any]) -> None:
        if options["input_ids"].numel() > 300:
            raise torch.OutOfMemoryError

    hook = engine.model.register_forward_pre_hook(run_out, with_kwargs=True)
    assert [score.log_prob for score in engine.score(scoring)] == pytest.approx(expected, abs=5e-5)
    assert engine.budget == 256
    hook.remove()
    engine.model.register_forward_pre_hook(run_out_always, with_kwargs=True)
    with pytest.raises(torch.OutOfMemoryError, match="needs more memory than there is"):
        engine.score([ScoreRequest(prompts[0], (5, 6, 7))])


def run_out_always(*_: Any) -> None:
    raise torch.OutOfMemoryError
