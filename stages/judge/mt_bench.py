"""MT-Bench (Zheng et al., NeurIPS 2023): questions of two turns, each answer graded by the judge from 1 to 10.

As in the authors' code, the second answer is generated and graded with the first turn in view; math, reasoning and
coding are graded with a reference answer; writing and roleplay are sampled at temperature 0.7, stem and humanities at
0.1, the rest is greedy. A model's score is the mean of all grades.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from stages.evaluation.score_rows import score_row
from stages.judge.judge_client import Judge, Reply, judge_of, text_of
from stages.judge.model_answers import AnswerGenerator
from stages.judge.questions import Question, Template, template_names
from stages.records.metrics import ScoreRow

MAX_VERDICT_TOKENS = 2048

Answers = dict[str, tuple[str, str]]
"""Question id -> the model's answers to both turns."""
Grades = dict[str, tuple[float | None, float | None]]
"""Question id -> grades of both turns; None if no reply of the judge is readable."""
Judges = dict[str, tuple[dict[str, str], dict[str, str]]]
"""Question id -> who graded both turns."""

_BRACKETS = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
"""Grades in the forms that the authors' code reads: [[7]], and [7] where there is none in double brackets."""
_LABEL = r"(?:(?:final|overall|my)\s+)?(?:rating|score|grade|verdict)(?:\W{1,4}(?:is|of))?"
_OF_TEN = r"(?:\s*/\s*10|\s+out of 10)?"
_OWN_LINE = re.compile(rf"^[\s*_#>`-]*(?:{_LABEL}[\s:*_`-]*)?@{_OF_TEN}[ \t.*_`]*$", re.IGNORECASE | re.MULTILINE)
_LAST_WORDS = re.compile(rf"\brating(?:\W{{1,4}}(?:is|of))?[\s:*_`-]*@{_OF_TEN}[\s.*_`]*\Z", re.IGNORECASE)
"""What a verdict is: a grade (here @) alone on its line but for a label, or the reply's last words after "rating"."""
_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


def generate_answers(questions: list[Question], generator: AnswerGenerator) -> Answers:
    answers: dict[str, list[str]] = {question.id: [] for question in questions}
    for turn in (1, 2):
        for temperature in sorted({question.temperature for question in questions}):
            group = [question for question in questions if question.temperature == temperature]
            conversations = [_conversation(question, answers[question.id]) for question in group]
            texts = generator.generate(conversations, temperature, f"mt_bench turn {turn} at {temperature:g}")
            for question, text in zip(group, texts, strict=True):
                answers[question.id].append(text)
    return {name: (first, second) for name, (first, second) in answers.items()}


def _conversation(question: Question, answers: list[str]) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": question.turns[0]}]
    if answers:
        messages += [{"role": "assistant", "content": answers[0]}, {"role": "user", "content": question.turns[1]}]
    return messages


def grade_answers(
    questions: list[Question], answers: Answers, templates: Mapping[str, Template], judge: Judge
) -> tuple[Grades, Judges]:
    """Let the judge grade every answer. Raises UserError if the endpoint fails."""
    requests: dict[str, list[dict[str, str]]] = {}
    for question in questions:
        first, second = answers[question.id]
        values = {"question": question.turns[0], "answer": first, "answer_1": first, "answer_2": second}
        values |= {"question_1": question.turns[0], "question_2": question.turns[1]}
        if question.reference:
            values |= {"ref_answer_1": question.reference[0], "ref_answer_2": question.reference[1]}
        for turn, name in enumerate(template_names(question), 1):
            requests[f"mt_bench {question.id} {turn}"] = templates[name].messages(**values)
    judgements = judge.ask(requests, parse_grade, max_tokens=MAX_VERDICT_TOKENS, temperature=0)
    both = {q.id: [judgements[f"mt_bench {q.id} {turn}"] for turn in (1, 2)] for q in questions}
    grades = {name: (first[1], second[1]) for name, (first, second) in both.items()}
    return grades, {name: (judge_of(first[0]), judge_of(second[0])) for name, (first, second) in both.items()}


def parse_grade(reply: Reply) -> float | None:
    """Return the reply's verdict, a grade from 1 to 10 as in "Rating: [[7]]"; None if there is not exactly one.

    Stricter than the authors' code, which takes the first number in double brackets wherever it is.
    """
    text = _THOUGHT.sub("", text_of(reply)).replace("@", "")
    for brackets in _BRACKETS:
        if grades := set(map(float, brackets.findall(text))):
            marked = brackets.sub("@", text)
            is_verdict = _OWN_LINE.search(marked) or _LAST_WORDS.search(marked)
            return grades.pop() if is_verdict and len(grades) == 1 and 1 <= min(grades) <= 10 else None
    return None


def score_rows(questions: list[Question], grades: Grades) -> list[ScoreRow]:
    """Mean grades of all questions, each turn and each category; standard errors are over the questions' means."""
    read = {question.id: _read(grades[question.id]) for question in questions}
    every, means = list(chain(*read.values())), [fmean(both) for both in read.values() if both]
    rows = [
        score_row("mt_bench", "score_over_10", [g / 10 for g in every], [m / 10 for m in means], headline=True),
        score_row("mt_bench", "score", every, means),
    ]
    for turn in (0, 1):
        turn_grades = _read([grades[question.id][turn] for question in questions])
        rows.append(score_row(f"mt_bench_turn_{turn + 1}", "score", turn_grades, turn_grades))
    for category in sorted({question.category for question in questions}):
        members = [both for q in questions if q.category == category and (both := read[q.id])]
        rows.append(score_row(f"mt_bench_{category}", "score", list(chain(*members)), list(map(fmean, members))))
    return rows


def samples(questions: list[Question], answers: Answers, grades: Grades, judges: Judges) -> list[dict[str, Any]]:
    means = {name: fmean(read) if (read := _read(both)) else None for name, both in grades.items()}
    return [
        {
            "prompts": question.turns,
            "category": question.category,
            "responses": answers[question.id],
            "grades": grades[question.id],
            "judged_by": judges[question.id],
            "score": (mean := means[question.id]),
            "score_over_10": None if mean is None else mean / 10,
            "repeats": {"score": (read := _read(grades[question.id])), "score_over_10": [grade / 10 for grade in read]},
        }
        for question in questions
    ]


def _read(grades: Sequence[float | None]) -> list[float]:
    return [grade for grade in grades if grade is not None]
