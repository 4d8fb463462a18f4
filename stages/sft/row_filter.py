"""Prepared rows -> those that one pair of weights learns from, and the counts of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import pyarrow
from datasets import Dataset

from stages.data.segments import TARGET_SEGMENTS, Segment


@dataclass(frozen=True)
class Used:
    """What became of the rows of a data set. Counts of rows and of tokens."""

    rows: int
    """All rows."""
    rows_used: int
    rows_bad: int
    """Rows that could not be used, with `on_bad_row: drop`."""
    rows_without_weight: int
    """Rows left out, for all that is left of them after cutting weighs nothing."""
    rows_without_completion: int
    """Rows whose whole completion was cut off, left out or not."""
    tokens: int
    """Of the rows that are used."""
    tokens_dropped: int
    """Of the rows without weight."""
    tokens_truncated: int
    """Cut off at max_length, of all rows."""
    tokens_merged: int
    """Tokens that reach over the boundary into a completion, of all rows; they belong to the completion."""
    longest: int
    """Tokens of the longest row that is used."""
    largest_id: int
    """The largest token id in those rows."""
    weighted: dict[str, int]
    """Predicted tokens of non-zero weight by segment, of the rows that are used."""


def select(prepared: Dataset, table: Sequence[float]) -> tuple[Dataset, Used]:
    """The rows of `prepared` that have a predicted token of non-zero weight, `table` being a weight by Segment."""
    weights = numpy.asarray(table, dtype=numpy.float32)
    kept: list[numpy.ndarray] = []
    by_segment = numpy.zeros(len(Segment), dtype=numpy.int64)
    sums = dict.fromkeys(("cut", "merged", "bad", "tokens", "dropped", "unanswered"), 0)
    longest = largest_id = 0
    start = 0
    for batch in prepared.with_format("arrow").iter(1_000):
        lengths, segments, weighs = _flat_weights(batch, weights)
        row_of = numpy.repeat(numpy.arange(len(lengths)), lengths)
        learns = numpy.bincount(row_of[weighs], minlength=len(lengths)) > 0
        kept.append(start + numpy.flatnonzero(learns))
        start += len(lengths)
        by_segment += numpy.bincount(segments[weighs], minlength=len(Segment))
        bad = numpy.asarray([bool(problem) for problem in batch["problem"].to_pylist()])
        answers = numpy.bincount(row_of[numpy.isin(segments, TARGET_SEGMENTS)], minlength=len(lengths)) > 0
        ids = flat(batch, "input_ids")[1][learns[row_of]]
        longest, largest_id = max(longest, *lengths[learns], 0), max(largest_id, ids.max(initial=0))
        sums["unanswered"] += int((~answers & (batch["cut"].to_numpy() > 0)).sum())
        sums["bad"] += int(bad.sum())
        sums["tokens"] += int(lengths[learns].sum())
        sums["dropped"] += int(lengths[~learns].sum())
        sums["cut"] += int(batch["cut"].to_numpy().sum())
        sums["merged"] += int(batch["merged"].to_numpy().sum())
    indices = numpy.concatenate(kept) if kept else numpy.zeros(0, dtype=numpy.int64)
    used = Used(
        rows=len(prepared),
        rows_used=len(indices),
        rows_bad=sums["bad"],
        rows_without_weight=len(prepared) - len(indices) - sums["bad"],
        rows_without_completion=sums["unanswered"],
        tokens=sums["tokens"],
        tokens_dropped=sums["dropped"],
        tokens_truncated=sums["cut"],
        tokens_merged=sums["merged"],
        longest=int(longest),
        largest_id=int(largest_id),
        weighted={s.name.lower(): int(by_segment[s]) for s in Segment if by_segment[s]},
    )
    return (prepared if len(indices) == len(prepared) else prepared.select(indices)), used


def _flat_weights(batch: pyarrow.Table, weights: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """The lengths of the rows, and of all their tokens in a row the segment and whether it weighs in the loss."""
    lengths, segments = flat(batch, "segments")
    factor_lengths, factors = flat(batch, "factors")
    weighs = weights[segments] != 0
    weighs[numpy.repeat(factor_lengths > 0, lengths)] &= factors != 0
    weighs[(numpy.cumsum(lengths) - lengths)[lengths > 0]] = False  # nothing predicts a row's first token
    return lengths, segments, weighs


def flat(batch: pyarrow.Table, column: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The lengths of a column's lists, and all their values in a row."""
    lists = batch[column].combine_chunks()
    return lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
