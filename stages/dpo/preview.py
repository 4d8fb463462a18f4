"""Preview a dpo stage: the tokens of prompt, chosen and rejected, and which of them training learns from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.dpo.config import DPOStage
from stages.dpo.pairs import PairPreparer, kept, length_options, why_left_out
from stages.preview.page import show
from stages.preview.sample import prepare_sample
from stages.preview.terminal import TerminalPreview
from stages.preview.token_display import SEGMENT_NAMES, TIMES, Preview, PreviewedRow, TokenTexts

DIRECTIONS = {"chosen": 1.0, "rejected": -1.0}
"""The sign of a token's log-probability in DPO's objective; prompts have 0."""
EXPLANATION = (
    f"{TIMES}1: training raises the probability, against the reference; {TIMES}-1: lowers it; {TIMES}0: only read"
)


def preview(
    step: str, stage: DPOStage, paths: dict[str, Path], count: int
) -> tuple[dict[str, Any], str, TerminalPreview]:
    """Return `count` pairs of the training file as JSON, as an HTML page and as a rich renderable."""
    sample = prepare_sample(stage, paths, count, PairPreparer)
    max_length, truncation_mode = length_options(stage)
    examples = previewed_pairs(sample.rows, sample.tokenizer, max_length, truncation_mode)
    segments = {token.segment for example in examples for token in example.tokens}
    weights = {name: DIRECTIONS.get(name, 0.0) for name in (*SEGMENT_NAMES, *DIRECTIONS) if name in segments}
    return show(Preview(step, sample.file, sample.total, max_length, weights, examples, EXPLANATION))


def previewed_pairs(
    prepared: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    truncation_mode: str,
) -> list[PreviewedRow]:
    """Convert pairs of PairPreparer for display: the prompt once, then what TRL keeps of both completions."""
    texts = TokenTexts(tokenizer)
    previewed = []
    for pair in prepared:
        prompt, reason = pair["prompt_ids"], why_left_out(pair, max_length, truncation_mode)
        parts = {name: kept(len(prompt), len(pair[f"{name}_ids"]), max_length, truncation_mode) for name in DIRECTIONS}
        tokens = []
        for position, (id, segment) in enumerate(zip(prompt, pair["prompt_segments"], strict=True)):
            readers = [name for name, part in parts.items() if part.prompt.start <= position < part.prompt.stop]
            if readers:  # with keep_end, chosen and rejected can keep different parts of the prompt
                only = f", before {readers[0]} only" if len(readers) == 1 else ""
                name = SEGMENT_NAMES[segment]
                tokens.append(texts.token(id, name, 0.0, f"{name} {TIMES}0{only}"))
        truncated = len(prompt) - len(tokens)
        for name, part in parts.items():
            ids = pair[f"{name}_ids"]
            truncated += len(ids) - len(ids[part.completion])
            for position, id in enumerate(ids[part.completion]):
                is_predicted = position or part.prompt.start < part.prompt.stop
                weight = DIRECTIONS[name] if is_predicted and not reason else 0.0
                tokens.append(
                    texts.token(id, name, weight, f"{name} {TIMES}{weight:g}" if is_predicted else "not predicted")
                )
        remarks = [f"{reason}, so training leaves this pair out"] if reason and not pair["problem"] else []
        if pair["other_prompt"]:
            remarks.append("the tokens before chosen and before rejected differ; the prompt is what both start with")
        previewed.append(PreviewedRow(pair["row"], tokens, truncated, pair["merged"], pair["problem"], tuple(remarks)))
    return previewed
