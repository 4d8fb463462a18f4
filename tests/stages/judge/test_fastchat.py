"""MT-Bench's prompts and grades, compared with the authors' code (the package fschat)."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest

from stages.base import Context
from stages.judge.stage import run
from tests.stages.judge.conftest import MT_BENCH, PROMPTS, QUESTIONS, REFERENCES
from tests.stages.judge.server import serving
from tests.stages.judge.test_mt_bench import place

TEXTS = [
    "Rating: [[7]]",
    "It is good.\nRating: [[8.5]]/10.",
    "**Rating: [[8]]**\n\nSince it is good.",
    "The rating is [[9]].",
    "Final score: [[10]]",
    "[[1]]",
    "Rating: [6]",
    "As [b] and [c] say, it is true. Rating: [[4]]",
    "Rating: [[7]]\nI gave [[7]] since it is good.",
    "Rating: [[3]] out of 10",
]
"""Judgements that both read, one for each answer."""


@pytest.fixture
def fastchat(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """fastchat.llm_judge.common, without its clients of paid services and its adapters of old models."""
    from fastchat.conversation import get_conv_template

    adapter, anthropic = ModuleType("fastchat.model.model_adapter"), ModuleType("anthropic")
    vars(adapter).update(
        get_conversation_template=lambda _: get_conv_template("chatgpt"),
        OPENAI_MODEL_LIST=["gpt-judge"],
        ANTHROPIC_MODEL_LIST=[],
    )
    monkeypatch.setitem(sys.modules, "anthropic", anthropic)
    monkeypatch.setitem(sys.modules, "fastchat.model", ModuleType("fastchat.model"))
    monkeypatch.setitem(sys.modules, "fastchat.model.model_adapter", adapter)
    yield importlib.import_module("fastchat.llm_judge.common")
    sys.modules.pop("fastchat.llm_judge.common", None)


def test_prompts_and_grades_are_those_of_the_authors_code(
    step: Callable[..., Context], fastchat: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [(question["question_id"], turn) for question in QUESTIONS for turn in (1, 2)]
    replies = dict(zip(order, TEXTS, strict=True))
    with serving(lambda request: replies[place(request)]) as server:
        context = step(server.url, mt_bench=MT_BENCH)
        assert run(context).notes == []
    ours = {place(request): request["messages"] for request in server.requests}
    samples = [json.loads(line) for line in (context.out / "samples_mt_bench.jsonl").open()]
    templates = {template["name"]: template | {"output_format": "[[rating]]"} for template in PROMPTS}
    references = {reference["question_id"]: reference for reference in REFERENCES}
    sent: list[Any] = []

    def respond(reply: str, _: str, conversation: Any, **parameters: Any) -> str:
        assert parameters["temperature"] == 0
        sent.append(conversation.to_openai_api_messages())
        return reply

    for question, sample in zip(QUESTIONS, samples, strict=True):
        reference = references.get(question["question_id"])
        for turn in (1, 2):
            key = (question["question_id"], turn)
            name = f"single-{'math-' if reference else ''}v1{'-multi-turn' if turn == 2 else ''}"
            judge = fastchat.Judge("gpt-judge", templates[name])
            monkeypatch.setattr(fastchat, "chat_completion_openai", partial(respond, replies[key]))
            answer = {"choices": [{"turns": sample["responses"]}]}
            grade, _, _ = fastchat.run_judge_single(question, answer, judge, reference, multi_turn=turn == 2)
            assert sample["grades"][turn - 1] == grade
            assert ours[key] == sent[-1]
    assert len(sent) == len(TEXTS)
