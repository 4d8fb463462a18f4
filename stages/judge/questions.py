"""The files of the two benchmarks -> questions, and how much the judge will be asked.

Light by intent: a recipe's files are checked before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from stages.base import UserError
from stages.data.columns import BadRow, filled_list, read_as, text
from stages.data.files import Record

WITH_REFERENCE = ("math", "reasoning", "coding")
"""MT-Bench's categories whose answers are judged beside a right one."""
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Those whose answers are drawn, with the temperature; the others' are greedy."""
TEMPLATES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
CHARACTERS_PER_TOKEN = 4
"""Of English, roughly."""
VERDICT_TOKENS = 250
"""An MT-Bench judgement with its explanation, roughly."""


@dataclass(frozen=True)
class Question:
    """One of MT-Bench: two turns, and right answers to them where the category has some."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None

    @property
    def temperature(self) -> float:
        """At which it is answered."""
        return TEMPERATURES.get(self.category, 0.0)


@dataclass(frozen=True)
class Template:
    """What the judge is told."""

    system: str
    prompt: str

    def messages(self, **values: str) -> list[dict[str, str]]:
        """The conversation, with `{name}` in the prompt replaced by values[name]; other braces stay."""
        parts = self.prompt.split("{")
        filled = parts[0]
        for part in parts[1:]:
            name, closed, rest = part.partition("}")
            filled += values[name] + rest if closed and name in values else "{" + part
        return [{"role": "system", "content": self.system}, {"role": "user", "content": filled}]


@dataclass(frozen=True)
class Instruction:
    """One of AlpacaEval, with the answer to compare with."""

    instruction: str
    output: str
    generator: str
    index: int = 0
    """Where it stands in its file, from 0."""


@dataclass(frozen=True)
class Estimate:
    """What a benchmark asks of the judge for one model."""

    benchmark: str
    calls: int
    tokens_in: int
    tokens_out: int

    def __str__(self) -> str:
        return (
            f"{self.benchmark}, {self.calls:,} calls, at most about {self.tokens_in:,} tokens in and"
            f" {self.tokens_out:,} out"
        )


def read_questions(files: Mapping[str, Path], limit: int | None) -> list[Question]:
    """MT-Bench's questions. Raises UserError."""
    references = dict(read_as(files["mt_bench.references"], _reference))
    path = files["mt_bench.questions"]

    def question(row: Record, _: int) -> Question:
        name, category = _id(row), text(row, "category")
        reference = references.get(name) if category in WITH_REFERENCE else None
        if category in WITH_REFERENCE and reference is None:
            raise BadRow(None, f"is of the category {category}, and the references have no answer to {name}")
        return Question(name, category, _turns(row), reference)

    questions = read_as(path, question)
    if len({question.id for question in questions}) < len(questions):
        raise UserError(f"{path}: holds a question_id more than once")
    return questions[:limit]


def _reference(row: Record, _: int) -> tuple[str, tuple[str, str]]:
    choice = filled_list(row, "choices")[0]
    if not isinstance(choice, dict):
        raise BadRow("choices", 'holds no object {"turns": [...]}')
    return _id(row), _turns(choice)


def _id(row: Record) -> str:
    value = row.get("question_id")
    if type(value) not in (int, str) or value == "":
        raise BadRow("question_id", "is missing" if value is None else f"is {value!r}, no number or text")
    return str(value)


def _turns(row: Record) -> tuple[str, str]:
    turns = filled_list(row, "turns")
    if len(turns) != 2:
        raise BadRow("turns", f"holds {len(turns)}; MT-Bench has two")
    return text({"turns": turns[0]}, "turns"), text({"turns": turns[1]}, "turns")


def read_templates(files: Mapping[str, Path]) -> dict[str, Template]:
    """The judge's prompts for MT-Bench. Raises UserError."""
    path = files["mt_bench.prompts"]
    found = dict(read_as(path, _template))
    if missing := [name for name in TEMPLATES if name not in found]:
        raise UserError(f"{path}: has no prompt named {' or '.join(missing)}")
    return found


def _template(row: Record, _: int) -> tuple[str, Template]:
    return text(row, "name"), Template(text(row, "system_prompt"), text(row, "prompt_template"))


def read_instructions(files: Mapping[str, Path], limit: int | None) -> list[Instruction]:
    """AlpacaEval's instructions with the answers to compare with. Raises UserError."""
    path = files["alpaca_eval.instructions"]
    found = [replace(each, index=index) for index, each in enumerate(read_as(path, _instruction))]
    if len({each.generator for each in found}) > 1:
        raise UserError(f"{path}: answers of several generators; one model is compared with")
    if len({each.instruction for each in found}) < len(found):
        raise UserError(f"{path}: holds an instruction more than once, which the package would count as one")
    return found[:limit]


def _instruction(row: Record, _: int) -> Instruction:
    output = row.get("output")
    if not isinstance(output, str):
        raise BadRow("output", "is missing" if output is None else f"is {type(output).__name__}, not text")
    return Instruction(text(row, "instruction"), output, text(row, "generator"))


def estimate_mt_bench(files: Mapping[str, Path], limit: int | None, max_new_tokens: int) -> Estimate:
    """Of one judgement a turn. Raises UserError."""
    questions, templates = read_questions(files, limit), read_templates(files)
    told = sum(
        _tokens(template.system + template.prompt)
        for question in questions
        for template in (templates[name] for name in template_names(question))
    )
    asked = sum(_tokens(q.turns[0]) * 2 + _tokens(q.turns[1]) for q in questions)
    asked += sum(_tokens(q.reference[0]) * 2 + _tokens(q.reference[1]) for q in questions if q.reference)
    calls = 2 * len(questions)
    return Estimate("MT-Bench", calls, told + asked + 3 * len(questions) * max_new_tokens, calls * VERDICT_TOKENS)


def template_names(question: Question) -> tuple[str, str]:
    """The prompts by which the answers to its two turns are judged."""
    name = "single-math-v1" if question.reference else "single-v1"
    return name, f"{name}-multi-turn"


def estimate_alpaca_eval(files: Mapping[str, Path], limit: int | None, max_new_tokens: int) -> Estimate:
    """Of one comparison an instruction. Raises UserError."""
    instructions = read_instructions(files, limit)
    asked = sum(_tokens(each.instruction) + _tokens(each.output) for each in instructions)
    told = 350 * len(instructions)  # the package's own prompt
    return Estimate(
        "AlpacaEval", len(instructions), asked + told + len(instructions) * max_new_tokens, len(instructions)
    )


def _tokens(words: str) -> int:
    return -(-len(words) // CHARACTERS_PER_TOKEN)
