"""Preview an sft stage: prepare a few rows as the trainer does, and show the segment and weight of every token."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from stages.data.reader import source_name
from stages.sft.config import SFTStage
from stages.sft.preview_terminal import TerminalPreview
from stages.sft.token_display import SEGMENT_NAMES, TIMES, WHITE_SPACE_SYMBOLS, Preview, PreviewedRow, Token, TokenTexts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(
    step: str, stage: SFTStage, paths: dict[str, Path], count: int
) -> tuple[dict[str, Any], str, TerminalPreview]:
    """Return `count` evenly spaced rows of the training file as JSON, as an HTML page and as a rich renderable.

    `paths` has the training file as `train`, and a folder with the tokenizer as `model`.
    """
    from datasets import Dataset
    from trl import SFTConfig

    from stages.data.tokenization import prepare
    from stages.training.tokenizer import load_tokenizer

    path, data = paths["train"], stage.data
    total = sum(1 for _ in stage.rows(path, "train"))
    chosen = {index * total // count for index in range(count)}
    rows = [row for index, row in enumerate(stage.rows(path, "train")) if index in chosen]
    tokenizer = load_tokenizer(paths["model"], [row for _, row in rows], stage.trust_remote_code)
    max_length = stage.train.model_dump().get("max_length", SFTConfig.max_length)
    reading = data.reading("train", data.format)
    prepared = prepare(
        Dataset.from_list([row.columns() | {"row": number} for number, row in rows]),
        tokenizer,
        max_length,
        data.turns,
        data.on_bad_row,
        f"{source_name(path, reading)}:",
    )
    segment_weights = stage.weights.segment_weights
    examples = previewed_rows(prepared, tokenizer, segment_weights)
    segments = {token.segment for example in examples for token in example.tokens}
    weights = {name: w for name, w in zip(SEGMENT_NAMES, segment_weights, strict=True) if name in segments}
    shown_path = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    result = Preview(step, source_name(shown_path, reading), total, max_length, weights, examples)
    return result.as_json(), html_page(result), TerminalPreview(result)


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
            tokens.append(Token(id, texts.text(id), name, weight, texts.special(id), label))
        previewed.append(PreviewedRow(row["row"], tokens, row["cut"], row["merged"], row["problem"]))
    return previewed


def html_page(preview: Preview) -> str:
    """Render one self-contained page: no scripts, nothing to download."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {"fade_symbols": _fade_symbols, "repr": repr}
    return environment.get_template("preview.html.jinja").render(preview=preview)


def _label(segment: str, weight: float, multiplier: float) -> str:
    numbers = [0.0] if weight * multiplier == 0 else [n for n in (weight, multiplier) if n != 1] or [1.0]
    return segment + " " + "".join(f"{TIMES}{number:g}" for number in numbers)


def _fade_symbols(text: str) -> Markup:
    """Escape text, and wrap white space symbols in <i> so that they can be less prominent."""
    html = str(escape(text))
    for symbol in WHITE_SPACE_SYMBOLS.values():
        html = html.replace(symbol, f"<i>{symbol}</i>")
    return Markup(html.replace("↵</i>", "↵</i><br>"))
