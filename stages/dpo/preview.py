"""Preview a dpo stage: the tokens of prompt, chosen and rejected, and which of them training learns from."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stages.dpo.config import DPOStage
from stages.dpo.pairs import ID_COLUMNS, PairPreparer, kept, length_options
from stages.preview.page import show_rows
from stages.preview.token_display import SEGMENT_NAMES, TIMES, Preview, PreviewedRow, Token, TokenTexts

DIRECTIONS = {"chosen": 1.0, "rejected": -1.0}
"""The sign of a token's log-probability in DPO's objective; prompts have 0."""
EXPLANATION = (
    f"{TIMES}1: training raises the probability, against the reference; {TIMES}-1: lowers it; {TIMES}0: only read"
)


def preview(step: str, stage: DPOStage, paths: dict[str, Path], count: int) -> tuple[dict[str, Any], str, Preview]:
    """Show `count` pairs of the training file; see show_rows."""
    lengths = length_options(stage)
    preparer, display = partial(PairPreparer, **lengths), partial(_display, **lengths)
    weights, max_length = dict.fromkeys(SEGMENT_NAMES, 0.0) | DIRECTIONS, lengths["pair_length"]
    return show_rows(
        step, stage, paths, count, preparer, display, weights=weights, max_length=max_length, explanation=EXPLANATION
    )


def _display(pair: dict[str, Any], texts: TokenTexts, **lengths: Any) -> PreviewedRow:
    tokens = list(_tokens(pair, texts, lengths))
    remarks = [f"{pair['left_out']}, so training leaves this pair out"] if pair["left_out"] else []
    if pair["other_prompt"]:
        remarks.append("the tokens before chosen and before rejected differ; the prompt is what both start with")
    truncated = sum(len(pair[name]) for name in ID_COLUMNS) - len(tokens)
    return PreviewedRow(pair["row"], tokens, truncated, pair["merged"], pair["problem"], remarks)


def _tokens(pair: dict[str, Any], texts: TokenTexts, lengths: dict[str, Any]) -> Iterator[Token]:
    """Yield the prompt once, then what TRL keeps of both completions."""
    prompt, completions = pair["prompt_ids"], {name: pair[f"{name}_ids"] for name in DIRECTIONS}
    parts = {name: kept(len(prompt) + len(ids), **lengths) for name, ids in completions.items()}
    for position, (id, segment) in enumerate(zip(prompt, pair["prompt_segments"], strict=True)):
        readers = [name for name, part in parts.items() if part.start <= position < part.stop]
        if readers:  # with keep_end, chosen and rejected can keep different parts of the prompt
            only = f", before {readers[0]} only" if len(readers) == 1 else ""
            yield texts.token(id, SEGMENT_NAMES[segment], 0.0, f"{SEGMENT_NAMES[segment]} {TIMES}0{only}")
    for name, part in parts.items():
        for position, id in enumerate(completions[name], len(prompt)):
            if part.start <= position < part.stop:
                weight = 0.0 if position == part.start or pair["left_out"] else DIRECTIONS[name]
                label = "not predicted" if position == part.start else f"{name} {TIMES}{weight:g}"
                yield texts.token(id, name, weight, label)
