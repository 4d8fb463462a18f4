"""Preview an sft stage: the segment and weight of every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from stages.data.tokenization import Preparer
from stages.preview.page import show
from stages.preview.sample import prepare_sample
from stages.preview.terminal import TerminalPreview
from stages.preview.token_display import SEGMENT_NAMES, TIMES, Preview, PreviewedRow, TokenTexts
from stages.sft.config import SFTStage


def preview(
    step: str, stage: SFTStage, paths: dict[str, Path], count: int
) -> tuple[dict[str, Any], str, TerminalPreview]:
    """Return `count` rows of the training file as JSON, as an HTML page and as a rich renderable."""
    max_length = stage.train.model_dump().get("max_length", SFTConfig.max_length)
    sample = prepare_sample(stage, paths, count, partial(Preparer, max_length=max_length, turns=stage.data.turns))
    segment_weights = stage.weights.segment_weights
    examples = previewed_rows(sample.rows, sample.tokenizer, segment_weights)
    segments = {token.segment for example in examples for token in example.tokens}
    weights = {name: w for name, w in zip(SEGMENT_NAMES, segment_weights, strict=True) if name in segments}
    return show(Preview(step, sample.file, sample.total, max_length, weights, examples))


def previewed_rows(
    prepared: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, segment_weights: Sequence[float]
) -> list[PreviewedRow]:
    """Convert rows of `stages.data.tokenization.prepare` for display; `segment_weights` is indexed by Segment."""
    texts = TokenTexts(tokenizer)
    previewed = []
    for row in prepared:
        ids = row["input_ids"]
        multipliers = row["factors"] or [1.0] * len(ids)
        tokens = []
        for position, (id, segment, multiplier) in enumerate(zip(ids, row["segments"], multipliers, strict=True)):
            name, weight, label = SEGMENT_NAMES[segment], 0.0, "not predicted"
            if position:
                weight = float(f"{segment_weights[segment] * multiplier:.6g}")  # float32 has no more digits
                label = _label(name, segment_weights[segment], multiplier)
            tokens.append(texts.token(id, name, weight, label))
        previewed.append(PreviewedRow(row["row"], tokens, row["cut"], row["merged"], row["problem"]))
    return previewed


def _label(segment: str, weight: float, multiplier: float) -> str:
    numbers = [0.0] if weight * multiplier == 0 else [n for n in (weight, multiplier) if n != 1] or [1.0]
    return segment + " " + "".join(f"{TIMES}{number:g}" for number in numbers)
