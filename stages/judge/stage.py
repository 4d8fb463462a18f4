"""Let one model answer the questions of MT-Bench and AlpacaEval, and the judge say how well.

Answers and judgements are kept as they come, by the step's fingerprint: a killed step pays for nothing twice.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.base import Context, UserError
from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.score_rows import score_row, write_samples
from stages.judge import alpaca_eval, mt_bench
from stages.judge.config import JudgeStage
from stages.judge.endpoint import Judge
from stages.judge.model_answers import Answerer
from stages.judge.questions import read_instructions, read_questions, read_templates
from stages.records.metrics import Metrics, ScoreRow


def run(context: Context) -> Metrics:
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
    kept = AnswerLog(context.checkpoints / "answers.jsonl")
    answerer = Answerer(config, context.inputs["model"].path, kept)
    count = _Count(context.progress, sum(estimate.calls for estimate in estimates))
    judge = Judge(config.judge, config.options, kept, count.judged)
    parts = []
    if config.mt_bench is not None:
        parts.append(_mt_bench(config, files, answerer, judge, count, context.out))
    if config.alpaca_eval is not None:
        parts.append(_alpaca_eval(config, files, answerer, judge, count, context))
    return Metrics(
        results=[row for rows, _ in parts for row in rows],
        seconds=round(time.monotonic() - began, 3),
        samples={name: f"samples_{name}.jsonl" for name in ("mt_bench", "alpaca_eval") if getattr(config, name)},
        notes=[note for _, notes in parts for note in notes],
        environment={
            "judge": config.judge,
            "backend": config.options.backend,
            **answerer.model.environment(),
        },
    )


class _Count:
    """What the console shows: answers of the model, then as many judgements."""

    def __init__(self, progress: Callable[[int, int, str], None], total: int) -> None:
        self.progress, self.total = progress, total
        self.made = self.graded = 0

    def answered(self, more: int) -> None:
        self.made += more
        self.progress(self.made, self.total, "answers")

    def judged(self) -> None:
        self.graded += 1
        self.progress(self.graded, self.total, "judgements")


Part = tuple[list[ScoreRow], list[str]]
"""The rows and the notes of one benchmark."""


def _mt_bench(
    config: JudgeStage, files: dict[str, Path], answerer: Answerer, judge: Judge, count: _Count, out: Path
) -> Part:
    questions, templates = read_questions(files, config.options.limit), read_templates(files)
    said = mt_bench.answers(questions, answerer, count.answered)
    grades = mt_bench.grades(questions, said, templates, judge)
    of_question = {q.id: [g for turn in (1, 2) if (g := grades[q.id, turn]) is not None] for q in questions}
    categories = {name: [q.id for q in questions if q.category == name] for name in {q.category for q in questions}}
    mean_of = {name: statistics.fmean(each) if each else None for name, each in of_question.items()}
    means = [mean for mean in mean_of.values() if mean is not None]
    every = [grade for each in of_question.values() for grade in each]
    rows = [
        score_row("mt_bench", "score_over_10", [g / 10 for g in every], [m / 10 for m in means], headline=True),
        score_row("mt_bench", "score", every, means),
    ]
    for turn in (1, 2):
        of_turn = [g for q in questions if (g := grades[q.id, turn]) is not None]
        rows.append(score_row(f"mt_bench_turn_{turn}", "score", of_turn, of_turn))
    for name, ids in sorted(categories.items()):
        each = [of_question[i] for i in ids if of_question[i]]
        rows.append(
            score_row(f"mt_bench_{name}", "score", [g for e in each for g in e], [statistics.fmean(e) for e in each])
        )
    samples = [
        {
            "prompts": q.turns,
            "category": q.category,
            "responses": said[q.id],
            "grades": [grades[q.id, turn] for turn in (1, 2)],
            "score": mean_of[q.id],
            "score_over_10": None if (mean := mean_of[q.id]) is None else mean / 10,
        }
        for q in questions
    ]
    write_samples(samples, out / "samples_mt_bench.jsonl")
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
    read = [row for row in annotated if not _is_missing(row["preference"])]
    notes = _unread("alpaca_eval", len(annotated) - len(read), len(annotated), config)
    found = alpaca_eval.metrics(section, annotated, files.get("alpaca_eval.length_control"), context.scratch)
    errors = {"win_rate": "standard_error", "length_controlled_winrate": "lc_standard_error"}
    rows = [
        ScoreRow(
            task="alpaca_eval",
            metric=metric,
            filter="none",
            value=None if found[metric] is None else float(found[metric]) / 100,
            stderr=None if found.get(error) is None else float(found[error]) / 100,
            n=len(read),
            headline=metric == section.metric,
            higher_is_better=True,
        )
        for metric, error in errors.items()
    ]
    rows.append(
        score_row("alpaca_eval", "length", [len(s) for s in said], [len(s) for s in said], higher_is_better=None)
    )
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
    write_samples(samples, context.out / "samples_alpaca_eval.jsonl")
    return rows, notes


def _is_missing(preference: Any) -> bool:
    return preference is None or math.isnan(preference)


def _unread(name: str, missing: int, of: int, config: JudgeStage) -> list[str]:
    if missing == of:
        raise UserError(f"{name}: none of the {of} judgements of {config.judge} can be read; is it able to judge?")
    if not missing:
        return []
    tries = f"{config.options.attempts} attempts" if config.options.attempts > 1 else "1 attempt"
    return [f"{name}: {missing} of {of} judgements could not be read after {tries}; they count nowhere"]
