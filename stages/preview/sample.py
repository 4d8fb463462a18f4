"""A few rows of a training file, prepared as for training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from stages.data.dataset_cache import prepare_rows
from stages.data.reader import source_name
from stages.data.tokenization import RowPreparer
from stages.training.model_io import load_tokenizer


@dataclass(frozen=True)
class Sample:
    """Prepared rows."""

    file: str
    """The name of the data in messages."""
    total: int
    """Number of rows in the file."""
    rows: list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase


def prepare_sample(
    stage: Any, paths: dict[str, Path], count: int, preparer_for: Callable[[PreTrainedTokenizerBase], RowPreparer]
) -> Sample:
    """Prepare `count` evenly spaced rows of the training file of a TrainingStage.

    `paths` has the training file as `train`, and a folder with the tokenizer as `model`.
    """
    path = paths["train"]
    total = sum(1 for _ in stage.rows(path, "train"))
    positions = {index * total // count for index in range(count)}
    rows = list(compress(stage.rows(path, "train"), (index in positions for index in range(total))))
    tokenizer = load_tokenizer(paths["model"], [row for _, row in rows], stage.trust_remote_code)
    with tempfile.TemporaryDirectory() as folder:
        prepared, _ = prepare_rows(stage, path, "train", iter(rows), preparer_for(tokenizer), Path(folder))
        prepared_rows = prepared.to_list()
    shown_path = Path(os.path.relpath(path)) if path.is_relative_to(Path.cwd()) else path
    file = source_name(shown_path, stage.data.reading("train", stage.data.format))
    return Sample(file, total, prepared_rows, tokenizer)
