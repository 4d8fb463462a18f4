"""Measure one model's prompt sensitivity index, POSIX (Chatterjee et al., Findings of EMNLP 2024).

For a set of N prompts x of one intent, y_j the model's greedy response to x_j and L_j its length in tokens, the one
that ends it included:

    psi = 1/(N (N - 1)) sum_i sum_j 1/L_j | log p(y_j | x_i) - log p(y_j | x_j) |

and POSIX is the mean of psi over the sets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from stages.base import Context
from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.score_rows import score_row, write_samples
from stages.inference.language_model import LanguageModel, Tokens
from stages.records.metrics import Metrics
from stages.sensitivity.config import Options, Prompts, SensitivityStage
from stages.sensitivity.sets import Asked, PromptSet, read_sets

SETS = 64
"""How many sets are measured together, and kept when an interrupted step goes on."""


def run(context: Context) -> Metrics:
    """Measure `context.inputs["model"]`; leaves samples_NAME.jsonl, a line per set with its matrix.

    The result has the form of the lm_eval stage's: {"results": [row, ...], "seconds", "samples", "environment"}.
    """
    config: SensitivityStage = context.config
    began = time.monotonic()
    files = {key: given.path for key, given in context.inputs.items() if key != "model"}
    read = {prompts.name: read_sets(prompts, files, config.seed) for prompts in config.prompts}
    context.progress(0, 1, f"loading {config.models[0]}")
    path = context.inputs["model"].path
    model = LanguageModel(path, config.models[0], config.options.dtype, config.trust_remote_code)
    encoded = {prompts.name: _encoded(model, config.options, prompts, read[prompts.name]) for prompts in config.prompts}
    kept = AnswerLog(context.checkpoints / "measured.jsonl")
    results, samples = [], {}
    done, total = 0, sum(map(len, encoded.values()))
    for prompts in config.prompts:
        measured: list[Measured] = []
        for start in range(0, len(encoded[prompts.name]), SETS):
            context.progress(done, total, f"{prompts.name}: sets of prompts")
            if (key := f"{prompts.name} {start}") not in kept:
                kept.add(key, measure(model, config.options, prompts, encoded[prompts.name][start : start + SETS]))
                kept.flush()
            measured += kept[key]
            done += len(kept[key])
        indices = [index for *_, index in measured]
        results.append(score_row(prompts.name, "posix", indices, indices, headline=True, higher_is_better=False))
        samples[prompts.name] = f"samples_{prompts.name}.jsonl"
        lines = (_sample(given, *each, model) for given, each in zip(read[prompts.name], measured, strict=True))
        write_samples(lines, context.out / samples[prompts.name])
    return Metrics(
        results=results,
        seconds=round(time.monotonic() - began, 3),
        samples=samples,
        num_fewshot={prompts.name: prompts.num_fewshot for prompts in config.prompts},
        environment=model.environment(),
    )


def psi(matrix: Sequence[Sequence[float]], lengths: Sequence[int]) -> float:
    """The index of one set of N prompts.

    Args:
        matrix: N x N, log p(y_j | x_i) in row i and column j, natural logarithms.
        lengths: L_j in tokens.
    """
    count = len(matrix)
    return math.fsum(abs(matrix[i][j] - matrix[j][j]) / lengths[j] for i in range(count) for j in range(count)) / (
        count * (count - 1)
    )


Measured = tuple[list[Tokens], list[list[float]], float]
"""Of one set: the responses, the matrix and the index."""


def _encoded(model: LanguageModel, options: Options, prompts: Prompts, sets: list[PromptSet]) -> list[list[Tokens]]:
    """Every prompt as tokens; before any is answered, for a row may be too long. Raises UserError."""
    encoded = []
    for given in sets:
        place = f"prompts.{prompts.name}: row {given.row} of {prompts.data}"
        encoded.append([model.encode(_given(asked, options)) for asked in given.asked])
        model.check_length(max(encoded[-1], key=len), prompts.max_new_tokens, place)
    return encoded


def _given(asked: Asked, options: Options) -> list[dict[str, str]] | str:
    system = options.system_instruction
    return asked.messages(system) if options.apply_chat_template else asked.text(system)


def measure(model: LanguageModel, options: Options, prompts: Prompts, sets: list[list[Tokens]]) -> list[Measured]:
    size = options.batch_size
    flat = [prompt for given in sets for prompt in given]
    answered = iter(model.generate(flat, prompts.max_new_tokens, size))
    answers = [[next(answered) for _ in given] for given in sets]
    # a response that several prompts of a set get is scored once
    different = [list(dict.fromkeys(map(tuple, each))) for each in answers]
    unique = [[list(answer) for answer in each] for given, each in zip(sets, different, strict=True) for _ in given]
    scored = iter(model.log_probs(flat, unique, size))
    measured = []
    for given, each, unique_ in zip(sets, answers, different, strict=True):
        rows = [dict(zip(unique_, next(scored), strict=True)) for _ in given]
        matrix = [[row[tuple(answer)] for answer in each] for row in rows]
        if options.convention == "package":
            index = psi(list(zip(*matrix, strict=True)), [prompts.max_new_tokens] * len(given))
        else:
            index = psi(matrix, [len(answer) for answer in each])
        measured.append((each, matrix, index))
    return measured


def _sample(
    given: PromptSet, answers: list[Tokens], matrix: list[list[float]], index: float, model: LanguageModel
) -> dict[str, Any]:
    return {
        "posix": index,
        "row": given.row,
        "prompts": [asked.text(None) for asked in given.asked],
        "responses": [model.decode(answer) for answer in answers],
        "lengths": [len(answer) for answer in answers],
        "log_probs": matrix,
    }
