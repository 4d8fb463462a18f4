"""How long the rows of a training stage are in tokens, from the rows themselves."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset

from stages.data.formats import Pair
from stages.data.tokenization import prepare
from stages.dpo.config import DPOStage
from stages.sft.config import SFTStage
from stages.training.config import TrainingStage
from stages.training.model_io import load_tokenizer

SAMPLE = 2_000
"""Of more rows than these the first are tokenised, and stand for all."""


@dataclass(frozen=True)
class Lengths:
    """Of one file's rows."""

    tokens: list[int]
    """Of each sampled row, cut at max_length; of a pair both answers' rows, one after the other."""
    rows: int
    """In the whole file."""
    per_row: int
    """How many sequences a row is: 2 for a pair."""

    @property
    def sampled(self) -> int:
        """How many rows were tokenised."""
        return len(self.tokens) // self.per_row

    @property
    def mean(self) -> float:
        """Tokens of a row."""
        return sum(self.tokens) / self.sampled

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.tokens)

    def padding(self, batch: int) -> float:
        """By how much a batch of so many rows, drawn at random, is larger with its padding than its tokens."""
        order = list(range(self.sampled))
        random.Random(0).shuffle(order)
        whole = 0
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            sequences = [self.tokens[r * self.per_row + i] for r in rows for i in range(self.per_row)]
            whole += max(sequences) * len(sequences)
        return whole / sum(self.tokens)


def lengths(stage: TrainingStage, path: Path, part: str, model: Path, max_length: int | None) -> Lengths:
    """Read all rows of `path` and tokenise the first, as training does. Raises UserError.

    Args:
        part: `train` or `eval`.
        model: a folder with the tokenizer.
    """
    every = stage.rows(path, part)
    sample = [row for _, row in islice(every, SAMPLE)]
    rows = len(sample) + sum(1 for _ in every)
    tokenizer = load_tokenizer(model, sample[:1], stage.trust_remote_code)
    if isinstance(stage, SFTStage):
        data = Dataset.from_list([row.columns() for row in sample])
        prepared = prepare(data, tokenizer, max_length, stage.data.turns, "drop", num_proc=1)
        found = [len(ids) for ids in prepared["input_ids"] if ids]
        return Lengths(found, rows, 1)
    assert isinstance(stage, DPOStage)
    both = [
        n for row in sample for n in (_answered(tokenizer, row, row.chosen), _answered(tokenizer, row, row.rejected))
    ]
    return Lengths([min(n, max_length or n) for n in both], rows, 2)


def _answered(tokenizer: Any, row: Pair, answer: Any) -> int:
    """Tokens of a prompt with one of its answers, as TRL's DPOTrainer puts them together."""
    if isinstance(row.prompt, str):
        return len(tokenizer(row.prompt + answer)["input_ids"]) + 1  # the EOS token
    text = tokenizer.apply_chat_template([*row.prompt, *answer], tools=row.tools, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
