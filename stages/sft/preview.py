"""Preview an sft stage: the segment and weight of every token."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stages.data.tokenization import Preparer
from stages.preview.page import show_rows
from stages.preview.token_display import SEGMENT_NAMES, TIMES, Preview, PreviewedRow, TokenTexts
from stages.sft.config import SFTStage


def preview(step: str, stage: SFTStage, paths: dict[str, Path], count: int) -> tuple[dict[str, Any], str, Preview]:
    """Show `count` rows of the training file; see show_rows."""
    max_length = stage.train_options["max_length"]
    preparer = partial(Preparer, max_length=max_length, turns=stage.data.turns)
    weights = stage.weights.segment_weights
    display = partial(display_row, segment_weights=weights)
    by_name = dict(zip(SEGMENT_NAMES, weights, strict=True))
    return show_rows(step, stage, paths, count, preparer, display, max_length=max_length, weights=by_name)


def display_row(row: dict[str, Any], texts: TokenTexts, segment_weights: Sequence[float]) -> PreviewedRow:
    """Convert a row of `stages.data.tokenization.prepare`; `segment_weights` is indexed by Segment."""
    tokens = []
    multipliers = row["factors"] or [1.0] * len(row["input_ids"])
    for position, (id, segment, multiplier) in enumerate(
        zip(row["input_ids"], row["segments"], multipliers, strict=True)
    ):
        name, weight, label = SEGMENT_NAMES[segment], 0.0, "not predicted"
        if position:
            weight = float(f"{segment_weights[segment] * multiplier:.6g}")  # float32 has no more digits
            label = _label(name, segment_weights[segment], multiplier)
        tokens.append(texts.token(id, name, weight, label))
    return PreviewedRow(row["row"], tokens, row["cut"], row["merged"], row["problem"])


def _label(segment: str, weight: float, multiplier: float) -> str:
    numbers = [0.0] if weight * multiplier == 0 else [n for n in (weight, multiplier) if n != 1] or [1.0]
    return segment + " " + "".join(f"{TIMES}{number:g}" for number in numbers)
