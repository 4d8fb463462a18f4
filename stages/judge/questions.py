"""Read the files of MT-Bench and AlpacaEval, and estimate what the judge costs. Imports no torch: planning uses it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stages.base import UserError
from stages.data.columns import filled_list, read_as, text
from stages.data.files import BadRow, Record

WITH_REFERENCE = ("math", "reasoning", "coding")
"""MT-Bench's categories whose answers are graded with a reference answer."""
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Sampling temperature by category; the others are greedy."""
TEMPLATES = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
CHARACTERS_PER_TOKEN = 4  # rough average for English
TYPICAL_VERDICT_TOKENS = 250  # rough length of an MT-Bench judgement with its explanation
ALPACA_EVAL_PROMPT_TOKENS = 350  # rough length of the package's own prompt

Files = tuple[tuple[str, Path], ...]
"""Pairs of name and path. Estimates are cached, so that all models of a stage share one."""


@dataclass(frozen=True)
class Question:
    """A question of MT-Bench: two turns, with reference answers in some categories."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None
    temperature: float


@dataclass(frozen=True)
class Template:
    system: str
    prompt: str

    def messages(self, **values: str) -> list[dict[str, str]]:
        """Return the conversation, with `{name}` in the prompt replaced by values[name]. Other braces stay."""
        content = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.prompt)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": content}]


@dataclass(frozen=True)
class Instruction:
    """An instruction of AlpacaEval with its reference output."""

    instruction: str
    output: str
    generator: str


@dataclass(frozen=True)
class RequestEstimate:
    """Calls and tokens of the judge that one benchmark needs for one model."""

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
    """Read MT-Bench's questions. Raises UserError."""
    references = dict(read_as(files["mt_bench.references"], _reference))
    path = files["mt_bench.questions"]

    def question(row: Record, _: int) -> Question:
        name, category = _id(row), text(row, "category")
        reference = references.get(name) if category in WITH_REFERENCE else None
        if category in WITH_REFERENCE and reference is None:
            raise BadRow(None, f"is of the category {category}, but the references have no answer to {name}")
        return Question(name, category, _turns(row), reference, TEMPERATURES.get(category, 0.0))

    questions = read_as(path, question)
    if len({question.id for question in questions}) < len(questions):
        raise UserError(f"{path}: a question_id occurs more than once")
    return questions[:limit]


def _reference(row: Record, _: int) -> tuple[str, tuple[str, str]]:
    choice = filled_list(row, "choices")[0]
    if not isinstance(choice, dict):
        raise BadRow("choices", 'holds no object {"turns": [...]}')
    return _id(row), _turns(choice)


def _id(row: Record) -> str:
    value = row.get("question_id")
    if type(value) not in (int, str) or value == "":
        raise BadRow("question_id", "is missing" if value is None else f"is {value!r}, not a number or text")
    return str(value)


def _turns(row: Record) -> tuple[str, str]:
    turns = filled_list(row, "turns")
    if len(turns) != 2:
        raise BadRow("turns", f"holds {len(turns)}; MT-Bench has two")
    return text({"turns": turns[0]}, "turns"), text({"turns": turns[1]}, "turns")


def read_templates(files: Mapping[str, Path]) -> dict[str, Template]:
    path = files["mt_bench.prompts"]
    templates = dict(read_as(path, _template))
    if missing := [name for name in TEMPLATES if name not in templates]:
        raise UserError(f"{path}: has no prompt named {' or '.join(missing)}")
    return templates


def _template(row: Record, _: int) -> tuple[str, Template]:
    return text(row, "name"), Template(text(row, "system_prompt"), text(row, "prompt_template"))


def read_instructions(files: Mapping[str, Path], limit: int | None) -> list[Instruction]:
    """Read AlpacaEval's instructions with their reference outputs. Raises UserError."""
    path = files["alpaca_eval.instructions"]
    instructions = read_as(path, _instruction)
    if len({item.generator for item in instructions}) > 1:
        raise UserError(f"{path}: has outputs of several generators; keep those of one reference model")
    if len({item.instruction for item in instructions}) < len(instructions):
        raise UserError(f"{path}: an instruction occurs more than once, but the package would count it once")
    return instructions[:limit]


def _instruction(row: Record, _: int) -> Instruction:
    output = row.get("output")
    if not isinstance(output, str):
        raise BadRow("output", "is missing" if output is None else f"is {type(output).__name__}, not text")
    return Instruction(text(row, "instruction"), output, text(row, "generator"))


def template_names(question: Question) -> tuple[str, str]:
    name = "single-math-v1" if question.reference else "single-v1"
    return name, f"{name}-multi-turn"


@cache
def request_estimates(files: Files, limit: int | None, max_new_tokens: int) -> list[RequestEstimate]:
    """Estimate the requests of each benchmark that has files, with answers of full length. Raises UserError."""
    paths, estimates = dict(files), []
    if "mt_bench.questions" in paths:  # one request per turn
        questions, templates = read_questions(paths, limit), read_templates(paths)
        calls, tokens = 2 * len(questions), 3 * max_new_tokens * len(questions)
        for question in questions:
            for name in template_names(question):
                tokens += _tokens(templates[name].system + templates[name].prompt)
            for first, second in filter(None, (question.turns, question.reference)):  # the first is in both requests
                tokens += 2 * _tokens(first) + _tokens(second)
        estimates.append(RequestEstimate("MT-Bench", calls, tokens, calls * TYPICAL_VERDICT_TOKENS))
    if "alpaca_eval.instructions" in paths:  # one request per instruction
        instructions = read_instructions(paths, limit)
        tokens = (ALPACA_EVAL_PROMPT_TOKENS + max_new_tokens) * len(instructions)
        tokens += sum(_tokens(item.instruction) + _tokens(item.output) for item in instructions)
        estimates.append(RequestEstimate("AlpacaEval", len(instructions), tokens, len(instructions)))
    return estimates


def _tokens(words: str) -> int:
    return -(-len(words) // CHARACTERS_PER_TOKEN)
