"""Answers of batches equal those that transformers' generate gives to each prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stages.inference.generation import generate
from stages.inference.requests import GenerationRequest
from tests.stages.inference.conftest import SHARING, build

Prompts = list[tuple[int, ...]]
EOS = 2


def answers_of(model: Any, requests: list[GenerationRequest]) -> list[list[int]]:
    *_, answers = generate(model, requests, lambda request, answer: answer[-1] == EOS or len(answer) == request.limit)
    return answers


def alone(model: Any, request: GenerationRequest) -> list[int]:
    ids = torch.tensor([request.prompt])
    settings: dict[str, Any] = {"max_new_tokens": request.limit, "do_sample": False, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=EOS, **settings)
    return list(output[0, len(request.prompt) :].tolist())


@pytest.mark.parametrize("name", SHARING)
def test_greedy_answers_are_transformers_own(name: str, prompts: Prompts) -> None:
    model = build(SHARING[name])
    requests = [GenerationRequest(prompt, 4 + 3 * number) for number, prompt in enumerate(prompts)]
    assert answers_of(model, requests) == [alone(model, request) for request in requests]


def test_answers_that_end_early_leave_the_batch(prompts: Prompts) -> None:
    model = build(SHARING["llama"])
    limits = [1, 1, 1, 1, 1, 1, 1, 200]
    requests = [GenerationRequest(prompt, limit) for prompt, limit in zip(prompts, limits, strict=False)]
    rows: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    answers = answers_of(model, requests)
    assert rows[-1] == 1, "the last answer alone"
    assert answers == [alone(model, request) for request in requests]


def test_samples_depend_on_their_seed_alone(prompts: Prompts) -> None:
    """A request has the same answer in any batch; another seed has another."""
    model = build(SHARING["llama"])
    asked = [GenerationRequest(prompt, 12, temperature=0.8, seed=number) for number, prompt in enumerate(prompts)]
    together = answers_of(model, asked)
    assert together == [answers_of(model, [request])[0] for request in asked]
    assert answers_of(model, [GenerationRequest(prompts[0], 12, temperature=0.8, seed=99)])[0] != together[0]


def test_samples_have_the_model_s_probabilities(prompts: Prompts) -> None:
    """Over 2,000 seeds, the shares of the most probable tokens are within four standard errors."""
    model, count = build(SHARING["llama"]), 2_000
    requests = [GenerationRequest(prompts[0], 1, temperature=0.7, seed=seed) for seed in range(count)]
    drawn = torch.tensor(answers_of(model, requests)).flatten().bincount(minlength=512) / count
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor([prompts[0]])).logits[0, -1].double() / 0.7, -1)
    top = expected.topk(5).indices
    errors = (expected * (1 - expected) / count).sqrt()
    assert bool(((drawn - expected).abs()[top] < 4 * errors[top]).all())
