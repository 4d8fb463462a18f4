"""Prepared rows -> a batch with labels and weights: padded, packed, or one long row without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class WeightedCollator:
    """Collates prepared rows, or packs of them (rows with `seq_lengths`), into a batch.

    A batch holds, all of shape (rows, longest row):
    - `input_ids`, int64; `attention_mask`, int64, 1 at real tokens;
    - `segments`, int64, values of Segment;
    - `loss_weights`, float32: the segment's weight times the token's multiplier; 0 at padding and at the first token
      of each example, which is never predicted;
    - `labels`, int64: the token, or -100 where the weight is 0, so the number of labels is the loss denominator;
    - with packs or `flatten`, `position_ids`, int64: they restart at 0 with each example, and they alone keep the model
      from attending across examples; padding at the end counts as one more example;
    - `rows`: for each row of the batch the numbers of its data rows.
    """

    pad_token_id: int
    segment_weights: Sequence[float]
    """The weight of each Segment, indexed by its value."""
    pad_to_multiple_of: int | None = None
    flatten: bool = False
    """Concatenate all rows into one without padding, for attention kernels that handle variable lengths."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        row_numbers = [_row_numbers(row) for row in rows]
        packed = self.flatten or "seq_lengths" in rows[0]
        if self.flatten:
            rows, row_numbers = [_concatenated(rows)], [[number for numbers in row_numbers for number in numbers]]
        width = max(len(row["input_ids"]) for row in rows)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        shape = (len(rows), width)
        segment_weights = torch.tensor(self.segment_weights, dtype=torch.float32)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "segments": torch.zeros(shape, dtype=torch.long),
            "loss_weights": torch.zeros(shape),
        }
        position_ids = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            segments = torch.as_tensor(row["segments"], dtype=torch.long)
            weights = segment_weights[segments]
            if len(row.get("factors", ())):
                weights = weights * torch.as_tensor(row["factors"], dtype=torch.float32)
            lengths = torch.as_tensor(row.get("seq_lengths", [length]), dtype=torch.long)
            starts = lengths.cumsum(0) - lengths
            weights[starts[lengths > 0]] = 0
            batch["input_ids"][index, :length] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            batch["attention_mask"][index, :length] = 1
            batch["segments"][index, :length] = segments
            batch["loss_weights"][index, :length] = weights
            position_ids[index, :length] = torch.arange(length) - starts.repeat_interleave(lengths)
            position_ids[index, length:] = torch.arange(width - length)
        batch["labels"] = batch["input_ids"].masked_fill(batch["loss_weights"] == 0, -100)
        if packed:
            batch["position_ids"] = position_ids
        return {**batch, "rows": row_numbers}


def _concatenated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    multipliers: list[float] = []
    if any(len(row.get("factors", ())) for row in rows):
        multipliers = [value for row in rows for value in (row["factors"] or [1.0] * len(row["input_ids"]))]
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]],
        "segments": [segment for row in rows for segment in row["segments"]],
        "factors": multipliers,
        "seq_lengths": [n for row in rows for n in row.get("seq_lengths", [len(row["input_ids"])])],
    }


def _row_numbers(row: dict[str, Any]) -> list[int]:
    """The distinct numbers of the data rows in a row or pack, in order."""
    numbers = row.get("row", [])
    return [numbers] if isinstance(numbers, int) else list(dict.fromkeys(numbers))
