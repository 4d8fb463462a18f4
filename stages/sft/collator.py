"""Prepared rows -> a batch with labels and weights: padded, packed, or one long row without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What flash attention reads instead of `position_ids`. transformers derives it on the device, in every layer."""


class PackShape(NamedTuple):
    """The shape that every batch of packs is padded to, so that torch.compile compiles the model once."""

    rows: int
    length: int
    examples: int
    """The most examples that so many packs hold."""


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
    - with `flatten` and `boundaries`, `cu_seq_lens_q` and `_k`, int32 (examples + 1,): where each example starts, and
      the end of the last; `max_length_q` and `_k`: the length of the longest;
    - `rows`: for each row of the batch the numbers of its data rows.
    """

    pad_token_id: int
    segment_weights: Sequence[float]
    """The weight of each Segment, indexed by its value."""
    pad_to_multiple_of: int | None = None
    flatten: bool = False
    """Concatenate all rows into one without padding, for attention kernels that handle variable lengths."""
    boundaries: bool = False
    """Add what flash attention reads, with `flatten`."""
    shape: PackShape | None = None
    """Pad batches of packs to this shape: `length` tokens in each row, a multiple of `rows` rows."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        row_numbers = [_row_numbers(row) for row in rows]
        shape = self.shape if "seq_lengths" in rows[0] else None
        packed = self.flatten or "seq_lengths" in rows[0]
        count = -(-len(rows) // shape.rows) * shape.rows if shape else len(rows)
        row_lengths = [len(row["input_ids"]) for row in rows]
        width = sum(row_lengths) if self.flatten else max(row_lengths)
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if shape:
            width = shape.length * (count if self.flatten else 1)
        size = (1 if self.flatten else count, width)
        segment_weights = torch.tensor(self.segment_weights, dtype=torch.float32)
        batch = {
            "input_ids": torch.full(size, self.pad_token_id),
            "attention_mask": torch.zeros(size, dtype=torch.long),
            "segments": torch.zeros(size, dtype=torch.long),
            "loss_weights": torch.zeros(size),
        }
        position_ids = torch.arange(width).repeat(size[0], 1)
        for index, row in enumerate(rows):
            start = sum(row_lengths[:index]) if self.flatten else 0
            end = start + row_lengths[index]
            place = (0 if self.flatten else index), slice(start, end)
            segments = torch.as_tensor(row["segments"], dtype=torch.long)
            weights = segment_weights[segments]
            if len(row.get("factors", ())):
                weights = weights * torch.as_tensor(row["factors"], dtype=torch.float32)
            lengths = torch.as_tensor(row.get("seq_lengths", row_lengths[index : index + 1]), dtype=torch.long)
            starts = lengths.cumsum(0) - lengths
            weights[starts[lengths > 0]] = 0
            batch["input_ids"][place] = torch.as_tensor(row["input_ids"], dtype=torch.long)
            batch["attention_mask"][place] = 1
            batch["segments"][place] = segments
            batch["loss_weights"][place] = weights
            position_ids[place] = torch.arange(end - start) - starts.repeat_interleave(lengths)
            position_ids[place[0], end:] = torch.arange(width - end) % (shape.length if shape else width)
        batch["labels"] = batch["input_ids"].masked_fill(batch["loss_weights"] == 0, -100)
        if packed:
            batch["position_ids"] = position_ids
        if self.flatten and self.boundaries:
            batch |= _boundaries(position_ids[0], shape)
        return {**batch, "rows": [list(chain(*row_numbers))] if self.flatten else row_numbers}


def _boundaries(position_ids: torch.Tensor, shape: PackShape | None) -> dict[str, Any]:
    """The values of BOUNDARIES; for a fixed shape the end is repeated, as examples without a token."""
    ends = torch.tensor([len(position_ids)])
    ends = torch.cat([(position_ids == 0).nonzero()[:, 0], ends]).to(torch.int32)
    longest = int(ends.diff().max())
    if shape:
        missing = shape.examples + shape.rows + 1 - len(ends)
        ends, longest = torch.nn.functional.pad(ends, (0, max(missing, 0)), value=len(position_ids)), shape.length
    return dict(zip(BOUNDARIES, (ends, ends, longest, longest), strict=True))


def _row_numbers(row: dict[str, Any]) -> list[int]:
    """The distinct numbers of the data rows in a row or pack, in order."""
    numbers = row.get("row", [])
    return [numbers] if isinstance(numbers, int) else list(dict.fromkeys(numbers))
