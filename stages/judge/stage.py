"""Run MT-Bench and AlpacaEval: one model answers, the judge grades the answers or compares them with references.

Answers and judgements are saved one by one under the step's fingerprint, so that a killed step pays for none twice.
"""

import time

from stages.base import Context, UserError
from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.score_rows import counter, score_row, write_samples
from stages.judge import alpaca_eval, mt_bench
from stages.judge.config import AlpacaEval, JudgeStage
from stages.judge.judge_client import Judge, judge_of
from stages.judge.model_answers import AnswerGenerator
from stages.judge.questions import read_instructions, read_questions, read_templates
from stages.models.generation_config import NOT_USED, describe
from stages.records.metrics import Metrics, ScoreRow
from stages.system.integrity import content_hash, write_json

RESAMPLES_FILE = "resamples_alpaca_eval.json"
BenchmarkResult = tuple[list[ScoreRow], list[str]]


def run(context: Context) -> Metrics:
    """Evaluate the input `model`; write samples_mt_bench.jsonl and samples_alpaca_eval.jsonl."""
    config: JudgeStage = context.config
    start = time.monotonic()
    evaluation = _Evaluation(context)
    benchmarks: dict[str, BenchmarkResult] = {}
    if config.mt_bench is not None:
        benchmarks["mt_bench"] = evaluation.mt_bench()
    if config.alpaca_eval is not None:
        benchmarks["alpaca_eval"] = evaluation.alpaca_eval(config.alpaca_eval)
    return Metrics(
        results=[row for rows, _ in benchmarks.values() for row in rows],
        seconds=round(time.monotonic() - start, 3),
        samples={name: f"samples_{name}.jsonl" for name in benchmarks},
        resamples={"alpaca_eval": RESAMPLES_FILE} if (context.out / RESAMPLES_FILE).exists() else {},
        notes=[note for _, notes in benchmarks.values() for note in notes]
        + evaluation.judge.notes()
        + describe(f"{config.models[0]}: {NOT_USED}", evaluation.generator.model.removed_defaults)
        + evaluation.generator.model.notes(),
        environment={"judge": config.judge, "backend": config.options.backend}
        | evaluation.generator.model.environment(),
    )


class _Evaluation:
    def __init__(self, context: Context) -> None:
        config: JudgeStage = context.config
        self.context, self.config = context, config
        self.files = {name: item.path for name, item in context.inputs.items() if name != "model"}
        estimates = config.request_estimates(self.files)
        print(*estimates, sep="\n", flush=True)
        context.progress(0, 1, f"loading {config.models[0]}")
        answer_log = AnswerLog(context.checkpoints / "answers.jsonl")
        calls = sum(estimate.calls for estimate in estimates)
        on_answers = counter(context.progress, lambda: calls, "answers")
        self.generator = AnswerGenerator(config, context.inputs["model"].path, answer_log, on_answers)
        self.judge = Judge(config, answer_log, counter(context.progress, lambda: calls, "judgements"))

    def mt_bench(self) -> BenchmarkResult:
        questions, templates = read_questions(self.files, self.config.options.limit), read_templates(self.files)
        answers = mt_bench.generate_answers(questions, self.generator)
        grades, judges = mt_bench.grade_answers(questions, answers, templates, self.judge)
        notes = self._check_unread("mt_bench", [grade for both in grades.values() for grade in both])
        write_samples(mt_bench.samples(questions, answers, grades, judges), self.context.out / "samples_mt_bench.jsonl")
        return mt_bench.score_rows(questions, grades), notes

    def alpaca_eval(self, section: AlpacaEval) -> BenchmarkResult:
        instructions = read_instructions(self.files, self.config.options.limit)
        conversations = [[{"role": "user", "content": item.instruction}] for item in instructions]
        outputs = self.generator.generate(conversations, 0.0, "alpaca_eval")
        annotations = alpaca_eval.annotate(section, instructions, outputs, self.judge)
        win_rates = [alpaca_eval.win_rate(annotation) for annotation in annotations]
        notes = self._check_unread("alpaca_eval", win_rates)
        length_control = self.files.get("alpaca_eval.length_control")
        scores = alpaca_eval.score(
            section, annotations, length_control, self.context.scratch, self.config.seed, self.context.progress
        )
        if scores.resamples:
            items = content_hash([self.config.seed, [item.instruction for item in instructions]])
            write_json(self.context.out / RESAMPLES_FILE, {"items": items, "values": scores.resamples})
        samples = [
            {
                "prompts": [item.instruction],
                "responses": [output],
                "reference": item.output,
                "win_rate": rate,
                "length_controlled_winrate": controlled,
                "judged_by": judge_of(annotation["reply"]) if isinstance(annotation["reply"], dict) else None,
            }
            for item, output, rate, controlled, annotation in zip(
                instructions, outputs, win_rates, scores.length_controlled, annotations, strict=True
            )
        ]
        write_samples(samples, self.context.out / "samples_alpaca_eval.jsonl")
        lengths = list(map(len, outputs))
        return [*scores.rows, score_row("alpaca_eval", "length", lengths, lengths, higher_is_better=None)], notes

    def _check_unread(self, benchmark: str, verdicts: list[float | None]) -> list[str]:
        """Return a note if judgements are unreadable. Raises UserError if none is readable."""
        missing, attempts = verdicts.count(None), self.config.options.attempts
        judgements = f"{len(verdicts)} judgements"
        if missing == len(verdicts):
            raise UserError(f"{benchmark}: none of the {judgements} of {self.config.judge} can be read; use another")
        tries = f"{attempts} attempts" if attempts > 1 else "1 attempt"
        note = (
            f"{benchmark}: {missing} of {judgements} could not be read after {tries}; the scores are of the other"
            f" {len(verdicts) - missing}"
        )
        return [note] if missing else []
