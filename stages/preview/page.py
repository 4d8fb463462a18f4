"""Show a few rows of a training file, prepared as for training: for programs, as an HTML page and for a terminal."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import compress
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedTokenizerBase

from stages.data.dataset_cache import prepare_rows
from stages.data.reader import source_name
from stages.data.segments import describe_shares, segment_shares
from stages.data.tokenization import Preparer
from stages.models.tokenizer import load_training_tokenizer
from stages.preview.token_display import Preview, PreviewedRow, TokenTexts


def show_rows(
    step: str,
    stage: Any,
    paths: dict[str, Path],
    count: int,
    preparer_for: Callable[[PreTrainedTokenizerBase], Preparer],
    display: Callable[[dict[str, Any], TokenTexts], PreviewedRow],
    **shown: Any,
) -> tuple[dict[str, Any], str, Preview]:
    """Return `count` evenly spaced rows of the training file as JSON, as an HTML page and as a rich renderable.

    Args:
        stage: a TrainingStage.
        paths: the training file as `train`, and a folder with the tokenizer as `model`.
        display: converts a prepared row.
        shown: further fields of Preview; `weights` may have segments that do not occur.
    """
    path = paths["train"]
    total = sum(1 for _ in stage.rows(path, "train"))
    positions = {index * total // count for index in range(count)}
    rows = list(compress(stage.rows(path, "train"), (index in positions for index in range(total))))
    tokenizer = load_training_tokenizer(paths["model"], [row for _, row in rows], stage.trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        prepared, _ = prepare_rows(stage, path, "train", iter(rows), preparer_for(tokenizer), Path(folder))
        texts = TokenTexts(tokenizer)
        examples = [display(row, texts) for row in prepared]
    segments = {token.segment for example in examples for token in example.tokens}
    weighted: Counter[str] = sum((Counter(example.weighted) for example in examples), Counter())
    if len(weighted) > 1:
        shown.setdefault("explanation", f"In these rows, {describe_shares(segment_shares(weighted))}.")
    shown["weights"] = {name: weight for name, weight in shown["weights"].items() if name in segments}
    shown_path = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    file = source_name(shown_path, stage.data.reading("train", stage.data.format))
    preview = Preview(step=step, file=file, rows=total, examples=examples, **shown)
    return preview.as_json(), html_page(preview), preview


def html_page(preview: Preview) -> str:
    """Render one self-contained page: no scripts, nothing to download."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["repr"] = repr
    return environment.get_template("page.html.jinja").render(preview=preview)
