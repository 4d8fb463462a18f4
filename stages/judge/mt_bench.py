"""MT-Bench: answers to two turns, each graded by the judge from 1 to 10 (Zheng et al., NeurIPS 2023).

Turn by turn as the authors' code does: the second answer is given and graded with the first in view; math, reasoning
and coding are graded beside a right answer; writing and roleplay are answered at temperature 0.7, stem and humanities
at 0.1, the rest greedily. A model's score is the mean of all grades.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from stages.judge.endpoint import Judge
from stages.judge.model_answers import Answerer
from stages.judge.questions import Question, Template, template_names

GRADE = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
VERDICT_TOKENS = 2048
"""The longest judgement."""


def answers(
    questions: list[Question], answerer: Answerer, answered: Callable[[int], None]
) -> dict[str, tuple[str, str]]:
    """Question id -> the model's answers to both turns."""
    said: dict[str, list[str]] = {question.id: [] for question in questions}
    for turn in (0, 1):
        for temperature in sorted({question.temperature for question in questions}):
            asked = [question for question in questions if question.temperature == temperature]
            conversations = [_conversation(question, said[question.id]) for question in asked]
            place = f"mt_bench turn {turn + 1} at {temperature:g}"
            made = answerer.answer(conversations, temperature, place, answered)
            for question, answer in zip(asked, made, strict=True):
                said[question.id].append(answer)
    return {name: (first, second) for name, (first, second) in said.items()}


def _conversation(question: Question, said: list[str]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question.turns[0]}]
    if said:
        messages += [{"role": "assistant", "content": said[0]}, {"role": "user", "content": question.turns[1]}]
    return messages


def grades(
    questions: list[Question],
    said: Mapping[str, tuple[str, str]],
    templates: Mapping[str, Template],
    judge: Judge,
) -> dict[tuple[str, int], float | None]:
    """(question id, turn 1 or 2) -> the grade; None where the judge gave none that can be read."""
    requests: dict[str, list[dict[str, str]]] = {}
    places: dict[str, tuple[str, int]] = {}
    for question in questions:
        first, second = said[question.id]
        values = {"question": question.turns[0], "answer": first}
        values |= {"question_1": question.turns[0], "question_2": question.turns[1]}
        values |= {"answer_1": first, "answer_2": second}
        if question.reference:
            values |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
        for turn, name in enumerate(template_names(question), 1):
            key = f"mt_bench {question.id} {turn}"
            requests[key], places[key] = templates[name].messages(**values), (question.id, turn)
    found = judge.ask(requests, grade, max_tokens=VERDICT_TOKENS, temperature=0)
    return {places[key]: value for key, (_, value) in found.items()}


def grade(choice: Mapping[str, Any]) -> float | None:
    """The number from 1 to 10 that a judgement ends with, as [[7]]; None where it holds none."""
    found = GRADE.findall(choice["message"].get("content") or "")
    value = float(found[-1]) if found else 0.0
    return value if 1 <= value <= 10 else None
