"""Run a `characteristics` stage: describe prompts as the paper does (arXiv 2507.07817).

The paper leaves details of its definitions open; these are ours. Tokens are those of the model's tokenizer, words are
separated by white space. Over the rows of a set:

    prompt_length      mean number of tokens of a prompt
    generation_ratio   mean of tokens of the response / tokens of the prompt, over rows with a response
    ngram_diversity    sum over n = 1..4 of distinct n-grams of words / all n-grams of words, over all prompts together
    parse_tree_depth   mean over prompts of the depth of the deepest dependency tree among its sentences (a root has
                       depth 1), by spaCy's en_core_web_sm; not measured if that is not installed
    prompt_logprob     mean log-probability of a token, over all tokens of all prompts except the first of each; left
                       out if no prompt has a second token

and `parameters`, the number of the model's parameters.
"""

import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from stages.base import Context
from stages.characteristics.config import CharacteristicsStage
from stages.data.columns import Text
from stages.data.formats import Conversation, Example, PlainText, Row
from stages.evaluation.score_rows import counter, score_row
from stages.inference.engine import Engine
from stages.inference.loading import load_engine
from stages.inference.prefix_tree import Tokens
from stages.inference.requests import ScoreRequest
from stages.records.metrics import Metrics, ScoreRow

PARSER = "en_core_web_sm"


def run(context: Context) -> Metrics:
    """Describe the sets with the model `context.inputs["model"]`."""
    config: CharacteristicsStage = context.config
    start_time = time.monotonic()
    context.progress(0, 1, f"loading {config.models[0]}")
    path = context.inputs["model"].path
    model = load_engine(config, path)
    parse = _parser()
    notes = [] if parse else [f"parse_tree_depth is not measured: spaCy with {PARSER} is not installed"]
    size = float(sum(parameter.numel() for parameter in model.model.parameters()))
    results = [_row("model", "parameters", size)]
    for name, rows in ((s.name, config.rows(s, context.inputs[f"data.{s.name}"].path)) for s in config.sets):
        texts = [_texts(row) for row in rows]
        prompts = [prompt for prompt, _ in texts]
        encoded = [model.encode(prompt) for prompt in prompts]
        ratios = [
            len(model.encode(response)) / len(tokens)
            for tokens, (_, response) in zip(encoded, texts, strict=True)
            if response and tokens
        ]
        by_prompt = {
            "prompt_length": [float(len(tokens)) for tokens in encoded],
            "generation_ratio": ratios,
            "parse_tree_depth": [float(parse(prompt)) for prompt in prompts] if parse else [],
        }
        results += [score_row(name, key, each, each, higher_is_better=None) for key, each in by_prompt.items() if each]
        results.append(_row(name, "ngram_diversity", ngram_diversity(prompts)))
        log_prob, truncated = _mean_log_prob(model, encoded, context, name)
        if log_prob is not None:
            results.append(_row(name, "prompt_logprob", log_prob))
        if truncated:
            notes.append(f"{name}: {truncated} prompts are longer than the model's context; only their start is scored")
    return Metrics(
        results=results,
        seconds=round(time.monotonic() - start_time, 3),
        notes=notes + model.notes(),
        environment=model.environment(),
    )


def _row(task: str, metric: str, value: float) -> ScoreRow:
    """A value of a set as a whole, which has no standard error."""
    return score_row(task, metric, [value], [], higher_is_better=None)


def _texts(row: Row) -> tuple[str, str]:
    """Prompt and response of a row as text. Plain text is a prompt."""
    if isinstance(row, Example):
        return _joined(row.prompt), _joined(row.completion)
    if isinstance(row, Conversation):
        responses = [turn for turn in row.messages if turn["role"] == "assistant"]
        return _joined([turn for turn in row.messages if turn["role"] != "assistant"]), _joined(responses)
    return (row.text if isinstance(row, PlainText) else ""), ""


def _joined(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(turn["content"] or "" for turn in text)


def ngram_diversity(texts: Sequence[str]) -> float:
    """Sum over n = 1..4 of distinct n-grams / all n-grams (Shaib et al., arXiv 2403.00553), within texts."""
    words = [text.split() for text in texts]
    total = 0.0
    for n in range(1, 5):
        ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        total += len(set(ngrams)) / len(ngrams) if ngrams else 0.0
    return total


def tree_depth(heads: Sequence[int]) -> int:
    """Count the words on the longest path to a root. `heads` has the index of each word's head; a root is its own."""

    def depth(word: int) -> int:
        words = 1
        while heads[word] != word:
            word, words = heads[word], words + 1
        return words

    return max(map(depth, range(len(heads))), default=0)


def _parser() -> Callable[[str], int] | None:
    """A function from a prompt to the depth of its deepest tree. None if spaCy's model is not installed."""
    if not (find_spec("spacy") and find_spec(PARSER)):
        return None
    import spacy

    language = spacy.load(PARSER)
    return lambda text: tree_depth([word.head.i for word in language(text)])


def _mean_log_prob(model: Engine, encoded: list[Tokens], context: Context, name: str) -> tuple[float | None, int]:
    """Mean log-probability of a token, None if no prompt has a second token, and the number of truncated prompts."""
    longest = model.max_length or max(map(len, encoded))
    truncated = sum(len(tokens) > longest for tokens in encoded)
    requests = [ScoreRequest(tokens[:1], tokens[1:longest]) for tokens in encoded if len(tokens) > 1]
    scores = model.score(requests, counter(context.progress, lambda: len(requests), f"{name}: prompts"))
    count = sum(len(request.answer) for request in requests)
    return (math.fsum(score.log_prob for score in scores) / count if count else None), truncated
