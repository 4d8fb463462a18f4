"""Run a `sensitivity` stage: measure one model's POSIX index (Chatterjee et al., Findings of EMNLP 2024).

For a set of N prompts x of one intent, with y_j the model's greedy response to x_j and L_j its length in tokens, EOS
included:

    psi = 1/(N (N - 1)) sum_i sum_j 1/L_j | log p(y_j | x_i) - log p(y_j | x_j) |

POSIX is the mean of psi over the sets.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stages.base import Context
from stages.evaluation.answer_log import AnswerLog
from stages.evaluation.score_rows import counter, score_row, write_samples
from stages.inference.engine import Engine
from stages.inference.loading import load_engine
from stages.inference.prefix_tree import Tokens
from stages.inference.requests import GenerationRequest, ScoreRequest
from stages.models.generation_config import NOT_USED, describe
from stages.records.metrics import Metrics
from stages.sensitivity.config import Options, SensitivityStage
from stages.sensitivity.sets import FewShotPrompt, Prompts, PromptSet, read_sets


class Measurement(NamedTuple):
    """The result for one set of N prompts."""

    responses: list[list[int]]
    log_probs: list[list[float]]
    """N x N: log p(y_j | x_i) in row i and column j."""
    psi: float


def run(context: Context) -> Metrics:
    """Measure `context.inputs["model"]`, and write samples_NAME.jsonl with one line per set and its matrix."""
    config: SensitivityStage = context.config
    start_time = time.monotonic()
    files = {key: source.path for key, source in context.inputs.items() if key != "model"}
    sets = {entry.name: read_sets(entry, files, config.seed) for entry in config.prompts}
    context.progress(0, 1, f"loading {config.models[0]}")
    path = context.inputs["model"].path
    model = load_engine(config, path, AnswerLog(context.checkpoints / "answers.jsonl"))
    # encode every file before the first answer: a prompt may be too long
    encoded = {entry.name: _encode(model, config.options, entry, sets[entry.name]) for entry in config.prompts}
    results, samples = [], {}
    for entry in config.prompts:
        measurements = measure(model, config.options, entry, encoded[entry.name], context.progress)
        indices = [measurement.psi for measurement in measurements]
        results.append(score_row(entry.name, "posix", indices, indices, headline=True, higher_is_better=False))
        samples[entry.name] = f"samples_{entry.name}.jsonl"
        lines = (_sample(*pair, model) for pair in zip(sets[entry.name], measurements, strict=True))
        write_samples(lines, context.out / samples[entry.name])
    return Metrics(
        results=results,
        seconds=round(time.monotonic() - start_time, 3),
        samples=samples,
        num_fewshot={entry.name: entry.num_fewshot for entry in config.prompts},
        notes=describe(f"{config.models[0]}: {NOT_USED}", model.removed_defaults) + model.notes(),
        environment=model.environment(),
    )


def psi(log_probs: Sequence[Sequence[float]], lengths: Sequence[int]) -> float:
    """Compute the index of one set from log p(y_j | x_i) in row i and column j, and the lengths L_j."""
    count = len(log_probs)
    total = math.fsum(abs(row[j] - log_probs[j][j]) / lengths[j] for row in log_probs for j in range(count))
    return total / (count * (count - 1))


def _encode(model: Engine, options: Options, entry: Prompts, sets: list[PromptSet]) -> list[list[Tokens]]:
    encoded = []
    for prompt_set in sets:
        place = f"prompts.{entry.name}: row {prompt_set.row} of {entry.data}"
        form = FewShotPrompt.messages if options.apply_chat_template else FewShotPrompt.text
        encoded.append([model.encode(form(prompt, options.system_instruction)) for prompt in prompt_set.prompts])
        model.check_length(max(encoded[-1], key=len), entry.max_new_tokens, place)
    return encoded


def measure(
    model: Engine,
    options: Options,
    entry: Prompts,
    sets: list[list[Tokens]],
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[Measurement]:
    """Answer the tokenised prompts of every set, and score each answer under all prompts of its set."""
    asked = [GenerationRequest(prompt, entry.max_new_tokens) for prompt_set in sets for prompt in prompt_set]
    answers = iter(model.generate(asked, counter(progress, lambda: len(asked), f"{entry.name}: answers")))
    responses = [[next(answers) for _ in prompt_set] for prompt_set in sets]
    # a response that several prompts of a set share is scored once
    distinct = [list(dict.fromkeys(map(tuple, set_responses))) for set_responses in responses]
    pairs = [
        ScoreRequest(prompt, answer)
        for prompt_set, set_answers in zip(sets, distinct, strict=True)
        for prompt in prompt_set
        for answer in set_answers
    ]
    scores = iter(model.score(pairs, counter(progress, lambda: len(pairs), f"{entry.name}: scores")))
    measurements = []
    for prompt_set, set_responses, set_answers in zip(sets, responses, distinct, strict=True):
        rows = [{answer: next(scores).log_prob for answer in set_answers} for _ in prompt_set]
        log_probs = [[row[tuple(response)] for response in set_responses] for row in rows]
        if options.convention == "package":
            index = psi(list(zip(*log_probs, strict=True)), [entry.max_new_tokens] * len(prompt_set))
        else:
            index = psi(log_probs, [len(response) for response in set_responses])
        measurements.append(Measurement(set_responses, log_probs, index))
    return measurements


def _sample(prompt_set: PromptSet, measurement: Measurement, model: Engine) -> dict[str, Any]:
    return {
        "posix": measurement.psi,
        "row": prompt_set.row,
        "prompts": [prompt.text(None) for prompt in prompt_set.prompts],
        "responses": [model.decode(response) for response in measurement.responses],
        "lengths": [len(response) for response in measurement.responses],
        "log_probs": measurement.log_probs,
    }
