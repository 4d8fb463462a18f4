"""Scores over the prefix tree equal those of one plain forward pass for each request."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from stages.inference.requests import Score, ScoreRequest
from stages.inference.scoring import TreeScorer
from tests.stages.inference.conftest import SHARING, build

Prompts = list[tuple[int, ...]]


def requests_for(prompts: Prompts) -> list[ScoreRequest]:
    rng = random.Random(1)
    answers = [tuple(rng.choices(range(3, 512), k=length)) for length in (1, 1, 2, 4, 60)]
    requests = [ScoreRequest(prompt, answer) for prompt in prompts for answer in answers]
    return [*requests, requests[0], ScoreRequest(prompts[0][:50], prompts[0][50:])]


@torch.no_grad()
def expected(model: Any, request: ScoreRequest) -> tuple[float, bool]:
    """The sum of log p of the answer's tokens in float64, from logits of the whole text."""
    logits = model(torch.tensor([request.tokens])).logits[0].double()
    log_probs = logits - torch.logsumexp(logits, -1, keepdim=True)
    places = range(len(request.prompt) - 1, len(request.tokens) - 1)
    values = [float(log_probs[place, request.tokens[place + 1]]) for place in places]
    return sum(values), all(int(logits[place].argmax()) == request.tokens[place + 1] for place in places)


def score(model: Any, requests: list[ScoreRequest], budget: int = 128) -> dict[int, Score]:
    scores: dict[int, Score] = {}
    TreeScorer(model, dict(enumerate(requests)), budget, None, scores.update).run(done=())
    return scores


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("budget", [64, 512])
def test_scores_equal_plain_forward_passes(name: str, budget: int, prompts: Prompts) -> None:
    model, requests = build(SHARING[name]), requests_for(prompts)
    scores = score(model, requests, budget)
    for number, request in enumerate(requests):
        log_prob, is_greedy = expected(model, request)
        assert scores[number].log_prob == pytest.approx(log_prob, abs=5e-5)
        assert scores[number].is_greedy == is_greedy


def test_greedy_answers_are_known_as_such(prompts: Prompts) -> None:
    model = build(SHARING["llama"])
    with torch.no_grad():
        best = int(model(torch.tensor([prompts[0]])).logits[0, -1].argmax())
    scores = score(model, [ScoreRequest(prompts[0], (best,)), ScoreRequest(prompts[0], (best ^ 1,))])
    assert [scores[0].is_greedy, scores[1].is_greedy] == [True, False]


@pytest.mark.parametrize("count", [1, 7, 40])
def test_an_interrupted_walk_ends_with_the_same_bytes(count: int, prompts: Prompts) -> None:
    model, requests = build(SHARING["llama"]), requests_for(prompts)
    uninterrupted = score(model, requests)
    first: dict[int, Score] = {}

    def stop(scores: dict[int, Score]) -> None:
        first.update(scores)
        if len(first) >= count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TreeScorer(model, dict(enumerate(requests)), 128, None, stop).run(done=())
    second: dict[int, Score] = {}
    TreeScorer(model, dict(enumerate(requests)), 128, None, second.update).run(done=first)
    assert first | second == uninterrupted
    assert len(second) < len(requests)
