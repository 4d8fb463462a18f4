"""Fixtures for judge stages: small files in the benchmarks' formats, and the context of a step that reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.base import Context, Input
from stages.judge.config import JudgeStage
from tests.stages.judge.server import KEY

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now {shorter}."]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who is older?", "And who younger?"]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "Twice that?"]},
    {"question_id": 141, "category": "stem", "turns": ["Why is it warm?", "And cold?"]},
    {"question_id": 142, "category": "stem", "turns": ["Why is it wet?", "And dry?"]},
]
REFERENCES = [
    {"question_id": 101, "choices": [{"turns": ["Ann is.", "Ben is."]}]},
    {"question_id": 111, "choices": [{"turns": ["2", "4"]}]},
]
PROMPTS = [
    {"name": "single-v1", "system_prompt": "Be fair.", "prompt_template": 'Rate "[[5]]".\nQ {question}\nA {answer}'},
    {
        "name": "single-math-v1",
        "system_prompt": "Be exact.",
        "prompt_template": "Q {question}\nR {ref_answer_1}\nA {answer}",
    },
    {
        "name": "single-v1-multi-turn",
        "system_prompt": "Be fair on the second.",
        "prompt_template": "Q {question_1}\nA {answer_1}\nQ {question_2}\nA {answer_2}",
    },
    {
        "name": "single-math-v1-multi-turn",
        "system_prompt": "Be exact on the second.",
        "prompt_template": "Q {question_1}\nR {ref_answer_1}\nA {answer_1}\n"
        "Q {question_2}\nR {ref_answer_2}\nA {answer_2}",
    },
]
INSTRUCTIONS = [
    {"instruction": f"Say {word}.", "output": f"It is {word}{'!' * i}", "generator": "reference", "dataset": "own"}
    for i, word in enumerate(["one", "two", "three", "four", "five", "six", "seven"])
]
MT_BENCH = {"questions": "questions.jsonl", "references": "references.jsonl", "prompts": "prompts.jsonl"}
ALPACA_EVAL = {"instructions": "instructions.jsonl"}


def write_files(folder: Path) -> None:
    """Write the files of both benchmarks."""
    files = {"questions": QUESTIONS, "references": REFERENCES, "prompts": PROMPTS, "instructions": INSTRUCTIONS}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def step(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Context]:
    """A function that builds a step's context as the pipeline does: step(url, mt_bench=..., alpaca_eval=...)."""
    write_files(tmp_path)
    count = 0

    def build(url: str, model: Path = model_folder, options: dict[str, Any] | None = None, **section: Any) -> Context:
        nonlocal count
        count += 1
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        defaults = {"max_new_tokens": 6, "timeout": 20.0}
        section = {"models": ["wit"], "judge": "gpt-judge", "options": defaults | (options or {})} | section
        config = JudgeStage(**section)
        inputs = {
            name: Input(model, "wit", "sft") if name == "model" else Input(tmp_path / need.value)
            for name, need in config.needs().items()
        }
        folders = [tmp_path / f"{count}-{name}" for name in ("out", "scratch", "checkpoints", "cache")]
        for folder in folders:
            folder.mkdir()
        return Context("tiny", "judge[wit]", config, inputs, *folders, progress=lambda *_: None)

    return build
