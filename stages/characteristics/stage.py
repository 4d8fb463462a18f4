"""Describe prompts by what the paper correlates the best prompt weight with (arXiv 2507.07817).

Its definitions are not public in every detail; these are ours. Over the rows of a set, with a token counted by the
model's tokenizer and a word ended by white space:

    prompt_length      mean tokens of a prompt
    generation_ratio   mean of tokens of the response / tokens of the prompt; of sets with responses
    ngram_diversity    sum over n = 1..4 of different n-grams of words / all n-grams of words, over all prompts together
    parse_tree_depth   mean over prompts of the deepest dependency tree among its sentences, its root counted as 1, by
                       spaCy's en_core_web_sm; not measured where that is not installed
    prompt_logprob     log-probability of all tokens of all prompts, but for each one's first, / their number

and of the model `parameters`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from stages.base import Context
from stages.characteristics.config import CharacteristicsStage
from stages.data.columns import Text
from stages.data.formats import Conversation, Example, PlainText, Row
from stages.evaluation.score_rows import score_row
from stages.inference.language_model import LanguageModel, Tokens
from stages.records.metrics import Metrics

PARSER = "en_core_web_sm"
LONGEST_NGRAM = 4
CHUNK = 512
"""Prompts scored between two reports of progress."""


def run(context: Context) -> Metrics:
    """Describe the sets, as `context.inputs["model"]` finds them.

    The result has the form of the lm_eval stage's: {"results": [row, ...], "seconds", "notes", "environment"}.
    """
    config: CharacteristicsStage = context.config
    began = time.monotonic()
    context.progress(0, 1, f"loading {config.models[0]}")
    path = context.inputs["model"].path
    model = LanguageModel(path, config.models[0], config.options.dtype, config.trust_remote_code)
    parse = _parser()
    notes = [] if parse else [f"parse_tree_depth is not measured: spaCy with {PARSER} is not installed"]
    size = float(sum(parameter.numel() for parameter in model.model.parameters()))
    results = [score_row("model", "parameters", [size], [], higher_is_better=None)]
    for given in config.sets:
        rows = [_texts(row) for row in config.rows(given, context.inputs[f"data.{given.name}"].path)]
        prompts = [prompt for prompt, _ in rows]
        encoded = [model.encode(prompt) for prompt in prompts]
        ratios = [
            len(model.encode(answer)) / len(tokens)
            for tokens, (_, answer) in zip(encoded, rows, strict=True)
            if answer and tokens
        ]
        measured = {
            "prompt_length": [float(len(tokens)) for tokens in encoded],
            "generation_ratio": ratios,
            "parse_tree_depth": [float(parse(prompt)) for prompt in prompts] if parse else [],
        }
        for metric, values in measured.items():
            if values:
                results.append(score_row(given.name, metric, values, values, higher_is_better=None))
        results.append(score_row(given.name, "ngram_diversity", [ngram_diversity(prompts)], [], higher_is_better=None))
        logprob, cut = _logprob(model, encoded, config.options.batch_size, context, given.name)
        results.append(score_row(given.name, "prompt_logprob", [logprob], [], higher_is_better=None))
        if cut:
            notes.append(f"{given.name}: {cut} prompts are longer than the model takes; their beginnings are scored")
    return Metrics(
        results=results,
        seconds=round(time.monotonic() - began, 3),
        notes=notes,
        environment=model.environment(),
    )


def _texts(row: Row) -> tuple[str, str]:
    """Prompt and response of a row as text; a row of text alone is a prompt."""
    if isinstance(row, Example):
        return _joined(row.prompt), _joined(row.completion)
    if isinstance(row, Conversation):
        answers = [turn for turn in row.messages if turn["role"] == "assistant"]
        return _joined([turn for turn in row.messages if turn["role"] != "assistant"]), _joined(answers)
    return (row.text if isinstance(row, PlainText) else ""), ""


def _joined(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(turn["content"] or "" for turn in text)


def ngram_diversity(texts: Sequence[str]) -> float:
    """sum over n = 1..4 of different n-grams / all n-grams (Shaib et al., arXiv 2403.00553); no n-gram reaches over
    the end of a text. Between 0 and 4; 0 for no words at all."""
    words = [text.split() for text in texts]
    total = 0.0
    for n in range(1, LONGEST_NGRAM + 1):
        ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        total += len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return total


def tree_depth(heads: Sequence[int]) -> int:
    """The words on the longest way up to a root.

    Args:
        heads: for each word the place of its head; a root is its own.
    """
    depths: dict[int, int] = {}
    for word in range(len(heads)):
        way = [word]
        while way[-1] not in depths and heads[way[-1]] != way[-1]:
            way.append(heads[way[-1]])
        depth = depths.get(way[-1], 1)
        for place in reversed(way):
            depths[place] = depths.get(place, depth)
            depth = depths[place] + 1
    return max(depths.values(), default=0)


def _parser() -> Any:
    """Prompt -> depth of its deepest tree; None where there is no parser."""
    if not (find_spec("spacy") and find_spec(PARSER)):
        return None
    import spacy

    language = spacy.load(PARSER)
    return lambda text: tree_depth([word.head.i for word in language(text)])


def _logprob(
    model: LanguageModel, encoded: list[Tokens], batch_size: int, context: Context, name: str
) -> tuple[float, int]:
    """Mean log-probability of a token, and how many prompts were too long."""
    longest = model.max_length or max(map(len, encoded))
    cut = sum(len(tokens) > longest for tokens in encoded)
    fitting = [tokens[:longest] for tokens in encoded if len(tokens) > 1]
    sums: list[float] = []
    for start in range(0, len(fitting), CHUNK):
        context.progress(start, len(fitting), f"{name}: prompts")
        part = fitting[start : start + CHUNK]
        scored = model.log_probs([tokens[:1] for tokens in part], [[tokens[1:]] for tokens in part], batch_size)
        sums += [total for (total,) in scored]
    count = sum(len(tokens) - 1 for tokens in fitting)
    return (math.fsum(sums) / count if count else 0.0), cut
