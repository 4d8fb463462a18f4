"""Let one model answer the questions of MT-Bench and AlpacaEval, and the judge say how well.

Answers and judgements are kept as they come, by the step's fingerprint: a killed step pays for nothing twice.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from stages.base import BadInput, Context
from stages.judge import alpaca_eval, mt_bench
from stages.judge.answers import Answerer
from stages.judge.config import JudgeStage
from stages.judge.endpoint import Judge
from stages.judge.questions import read_instructions, read_questions, read_templates
from stages.kept import Kept


def run(context: Context) -> dict[str, Any]:
    """Measure `context.inputs["model"]`; leaves samples_mt_bench.jsonl and samples_alpaca_eval.jsonl.

    The result has the form of the lm_eval stage's: {"results": [row, ...], "seconds", "samples", "notes",
    "environment"}.
    """
    config: JudgeStage = context.config
    began = time.monotonic()
    files = {name: given.path for name, given in context.inputs.items() if name != "model"}
    estimates = config.estimates(files)
    for estimate in estimates:
        print(estimate, flush=True)
    context.progress(0, 1, f"loading {config.models[0]}")
    kept = Kept(context.checkpoints / "answers.jsonl")
    answerer = Answerer(config, context.inputs["model"].path, kept)
    calls = sum(estimate.calls for estimate in estimates)
    count = _Count(context.progress, calls, calls)
    judge = Judge(config.judge, config.options, kept, count.judged)
    parts = []
    if config.mt_bench is not None:
        parts.append(_mt_bench(config, files, answerer, judge, count, context.out))
    if config.alpaca_eval is not None:
        parts.append(_alpaca_eval(config, files, answerer, judge, count, context))
    return {
        "results": [row for rows, _ in parts for row in rows],
        "seconds": round(time.monotonic() - began, 3),
        "samples": {name: f"samples_{name}.jsonl" for name in ("mt_bench", "alpaca_eval") if getattr(config, name)},
        "notes": [note for _, notes in parts for note in notes],
        "environment": {
            "judge": config.judge,
            "backend": config.options.backend,
            "transformers": metadata.version("transformers"),
            "dtype": str(answerer.model.model.dtype).removeprefix("torch."),
            "device": answerer.model.device.type,
            "max_length": answerer.model.max_length,
        },
    }


class _Count:
    """What the console shows: answers of the model, then judgements."""

    def __init__(self, progress: Callable[[int, int, str], None], answers: int, judgements: int) -> None:
        self.progress, self.answers, self.judgements = progress, answers, judgements
        self.made = self.graded = 0

    def answered(self, more: int) -> None:
        self.made += more
        self.progress(self.made, self.answers, "answers")

    def judged(self) -> None:
        self.graded += 1
        self.progress(self.graded, self.judgements, "judgements")


Part = tuple[list[dict[str, Any]], list[str]]
"""The rows and the notes of one benchmark."""


def _mt_bench(
    config: JudgeStage, files: dict[str, Path], answerer: Answerer, judge: Judge, count: _Count, out: Path
) -> Part:
    questions, templates = read_questions(files, config.options.limit), read_templates(files)
    said = mt_bench.answers(questions, answerer, count.answered)
    grades = mt_bench.grades(questions, said, templates, judge)
    of_question = {q.id: [g for turn in (1, 2) if (g := grades[q.id, turn]) is not None] for q in questions}
    categories = {name: [q.id for q in questions if q.category == name] for name in {q.category for q in questions}}
    means = [statistics.fmean(each) for each in of_question.values() if each]
    every = [grade for each in of_question.values() for grade in each]
    rows = [
        _row("mt_bench", "score_over_10", [g / 10 for g in every], [m / 10 for m in means], headline=True),
        _row("mt_bench", "score", every, means),
    ]
    for turn in (1, 2):
        of_turn = [g for q in questions if (g := grades[q.id, turn]) is not None]
        rows.append(_row(f"mt_bench_turn_{turn}", "score", of_turn, of_turn))
    for name, ids in sorted(categories.items()):
        each = [of_question[i] for i in ids if of_question[i]]
        rows.append(
            _row(f"mt_bench_{name}", "score", [g for e in each for g in e], [statistics.fmean(e) for e in each])
        )
    samples = [
        {
            "prompts": q.turns,
            "category": q.category,
            "responses": said[q.id],
            "grades": [grades[q.id, turn] for turn in (1, 2)],
            "score": statistics.fmean(of_question[q.id]) if of_question[q.id] else None,
            "score_over_10": statistics.fmean(of_question[q.id]) / 10 if of_question[q.id] else None,
        }
        for q in questions
    ]
    _write(samples, out / "samples_mt_bench.jsonl")
    return rows, _unread("mt_bench", sum(grade is None for grade in grades.values()), len(grades), config)


def _alpaca_eval(
    config: JudgeStage, files: dict[str, Path], answerer: Answerer, judge: Judge, count: _Count, context: Context
) -> Part:
    section = config.alpaca_eval
    assert section is not None
    instructions = read_instructions(files, config.options.limit)
    asked = [[{"role": "user", "content": each.instruction}] for each in instructions]
    said = answerer.answer(asked, 0.0, "alpaca_eval", count.answered)
    annotated = alpaca_eval.annotate(section, instructions, said, config.models[0], judge)
    found = alpaca_eval.metrics(section, annotated, files.get("alpaca_eval.length_control"), context.scratch)
    read = [row for row in annotated if not _is_missing(row["preference"])]
    errors = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}
    rows = [
        {
            **_row("alpaca_eval", metric, [], [], headline=metric == section.metric),
            "value": None if found[metric] is None else float(found[metric]) / 100,
            "stderr": None if found.get(error) is None else float(found[error]) / 100,
            "n": len(read),
        }
        for metric, error in errors.items()
    ]
    rows.append(_row("alpaca_eval", "length", [len(s) for s in said], [float(len(s)) for s in said]))
    samples = [
        {
            "prompts": [row["instruction"]],
            "responses": [row["output_2"]],
            "reference": row["output_1"],
            "win_rate": None if _is_missing(row["preference"]) else row["preference"] - 1,
            "length_controlled_winrate": row.get("glm_preference"),
        }
        for row in annotated
    ]
    _write(samples, context.out / "samples_alpaca_eval.jsonl")
    return rows, _unread("alpaca_eval", len(annotated) - len(read), len(annotated), config)


def _is_missing(preference: Any) -> bool:
    return preference is None or math.isnan(preference)


def _unread(name: str, missing: int, of: int, config: JudgeStage) -> list[str]:
    if missing == of:
        raise BadInput(f"{name}: none of the {of} judgements of {config.judge} can be read; is it able to judge?")
    if not missing:
        return []
    tries = f"{config.options.attempts} attempts" if config.options.attempts > 1 else "1 attempt"
    return [f"{name}: {missing} of {of} judgements could not be read after {tries}; they count nowhere"]


def _row(
    task: str, metric: str, values: Sequence[float], items: Sequence[float], headline: bool = False
) -> dict[str, Any]:
    """The mean of `values`; its standard error is that of the items, deviation (n - 1) divided by sqrt(n)."""
    return {
        "task": task,
        "metric": metric,
        "filter": "none",
        "value": statistics.fmean(values) if values else None,
        "stderr": statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None,
        "n": len(items),
        "headline": headline,
        "higher_is_better": None if metric == "length" else True,
    }


def _write(samples: list[dict[str, Any]], file: Path) -> None:
    """One line for each item, in the form of an lm_eval stage's, by which a report pairs two models' items."""
    with file.open("w", encoding="utf-8") as lines:
        for number, sample in enumerate(samples):
            digest = hashlib.sha256(json.dumps(sample["prompts"]).encode()).hexdigest()
            head = {"doc_id": number, "doc_hash": digest, "filter": "none"}
            lines.write(json.dumps(head | sample, ensure_ascii=False) + "\n")
