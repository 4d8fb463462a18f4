"""Prepared rows -> the rows that training uses at one setting of the weights, with counts of rows and tokens."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace

import numpy
import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from stages.base import UserError
from stages.data.dataset_cache import PreparedRows
from stages.data.reader import RowReport, report_notes
from stages.data.segments import TARGET_SEGMENTS, Segment, segment_shares
from stages.data.tokenization import date_notes


@dataclass(frozen=True)
class DatasetStats:
    """Counts of rows and tokens of a data set."""

    rows: int
    rows_used: int
    rows_bad: int
    """Unusable rows, with `on_bad_row: drop`."""
    rows_without_weight: int
    """Rows left out because no token within max_length has a weight."""
    rows_without_completion: int
    """Rows whose completion lies entirely beyond max_length, left out or not."""
    rows_without_stop: int
    """Rows with a complete completion in which no token stops generation."""
    rows_unwritten: int
    """Rows with earlier answers of which the chat template leaves out text, such as reasoning, by design."""
    tokens: int
    """Of the rows that are used."""
    tokens_dropped: int
    """Of the rows without weight."""
    tokens_truncated: int
    """Beyond max_length, of all rows."""
    tokens_merged: int
    """Tokens that span the boundary before a completion, of all rows; they belong to the completion."""
    longest: int
    """Tokens of the longest row that is used."""
    largest_id: int
    """The largest token id in the rows that are used."""
    weighted: dict[str, int]
    """Predicted tokens of non-zero weight by segment, of the rows that are used."""
    weighted_share: dict[str, float]
    """The share of each segment among these tokens."""


def select(
    prepared: Dataset, segment_weights: Sequence[float], stop_ids: Collection[int] = ()
) -> tuple[Dataset, DatasetStats]:
    """Select the rows with a predicted token of non-zero weight, by the weight of each Segment.

    Args:
        stop_ids: token ids that stop generation; without any, no row counts as one without them.
    """
    weights, stops = numpy.asarray(segment_weights, dtype=numpy.float32), numpy.asarray(sorted(stop_ids))
    batches = [_batch_stats(batch, weights, stops) for batch in prepared.with_format("arrow").iter(1_000)]
    stats = _total([batch_stats for _, batch_stats in batches])
    if stats.rows_used == len(prepared):
        return prepared, stats
    return prepared.select(numpy.flatnonzero(numpy.concatenate([is_used for is_used, _ in batches]))), stats


def check_rows(name: str, stats: DatasetStats, max_length: int | None, completion_weight: float) -> None:
    """Raise UserError if no row of the data set `name` can be used, or if a prepared row is too long."""
    has_targets = any(segment.name.lower() in stats.weighted for segment in TARGET_SEGMENTS)
    if stats.rows_without_completion and completion_weight and not has_targets:
        text = f"every row of the {name} data lost its completion at max_length {max_length}; raise max_length"
        raise UserError(text, "train.max_length")
    if not stats.rows_used:
        raise UserError(f"no row of the {name} data has a token with a weight; raise the weights", "weights")
    if max_length and stats.longest > max_length:
        raise UserError(
            f"the {name} data were prepared with rows of up to {stats.longest} tokens, more than max_length"
            f" {max_length}; prepare them again, or raise max_length"
        )


def describe_rows(
    rows: Dataset, report: RowReport, stats: DatasetStats, tokenizer: PreTrainedTokenizerBase
) -> PreparedRows:
    """Add to prepared rows their counts, with those dropped on reading, and notes about what training does not read or
    use of them, or what they do not teach."""
    counts = {
        "rows have no token with a weight and were left out": stats.rows_without_weight,
        "rows lost their completion at max_length; raise train.max_length": stats.rows_without_completion,
        "tokens lie beyond max_length and were cut off": stats.tokens_truncated,
        "tokens span the boundary between prompt and completion": stats.tokens_merged,
        "rows have earlier answers of which the chat template leaves out text, such as reasoning": stats.rows_unwritten,
        "completions have no token that stops generation, so the model does not learn to stop": stats.rows_without_stop,
    }
    notes = [f"{count} {text}" for text, count in counts.items() if count]
    notes = report_notes(report) + date_notes(tokenizer, rows[0]["input_ids"]) + notes
    bad = len(report.dropped)
    stats = replace(stats, rows=stats.rows - stats.rows_bad + bad, rows_bad=bad)
    return PreparedRows(rows, stats, report.dropped, notes)


def _batch_stats(
    batch: pyarrow.Table, weights: numpy.ndarray, stop_ids: numpy.ndarray
) -> tuple[numpy.ndarray, DatasetStats]:
    """Whether each row is used, and the counts of the batch."""
    lengths, segments = flatten(batch, "segments")
    ids = flatten(batch, "input_ids")[1]
    row_of = numpy.repeat(numpy.arange(len(lengths)), lengths)
    multiplier_lengths, multipliers = flatten(batch, "factors")
    is_weighted = weights[segments] != 0
    is_weighted[numpy.repeat(multiplier_lengths > 0, lengths)] &= multipliers != 0
    is_weighted[(numpy.cumsum(lengths) - lengths)[lengths > 0]] = False  # a row's first token is never predicted
    is_used = numpy.bincount(row_of[is_weighted], minlength=len(lengths)) > 0
    is_target = numpy.isin(segments, TARGET_SEGMENTS)
    has_target = numpy.bincount(row_of[is_target], minlength=len(lengths)) > 0
    has_text = numpy.bincount(row_of[is_target & (segments != Segment.GIVEN)], minlength=len(lengths)) > 0
    has_stop = numpy.bincount(row_of[is_target & numpy.isin(ids, stop_ids)], minlength=len(lengths)) > 0
    truncated = batch["cut"].to_numpy()
    bad = sum(map(bool, batch["problem"].to_pylist()))
    weighted = numpy.bincount(segments[is_weighted], minlength=len(Segment))
    return is_used, DatasetStats(
        rows=len(lengths),
        rows_used=int(is_used.sum()),
        rows_bad=bad,
        rows_without_weight=int((~is_used).sum()) - bad,
        rows_without_completion=int((~has_target & (truncated > 0)).sum()),
        rows_without_stop=int((has_text & ~has_stop & (truncated == 0)).sum()) if len(stop_ids) else 0,
        rows_unwritten=int((batch["unwritten"].to_numpy() > 0).sum()),
        tokens=int(lengths[is_used].sum()),
        tokens_dropped=int(lengths[~is_used].sum()),
        tokens_truncated=int(truncated.sum()),
        tokens_merged=int(batch["merged"].to_numpy().sum()),
        longest=int(lengths[is_used].max(initial=0)),
        largest_id=int(ids[is_used[row_of]].max(initial=0)),
        weighted={segment.name.lower(): int(weighted[segment]) for segment in Segment if weighted[segment]},
        weighted_share={},
    )


def _total(batches: list[DatasetStats]) -> DatasetStats:
    values = {field.name: [getattr(batch, field.name) for batch in batches] for field in fields(DatasetStats)}
    counts: Counter[str] = sum(map(Counter, values.pop("weighted")), Counter())
    names = (segment.name.lower() for segment in Segment)
    weighted = {name: counts[name] for name in names if counts[name]}
    largest = {name: max(values.pop(name), default=0) for name in ("longest", "largest_id")}
    del values["weighted_share"]
    sums = {name: sum(numbers) for name, numbers in values.items()}
    return DatasetStats(**sums, **largest, weighted=weighted, weighted_share=segment_shares(weighted))


def flatten(batch: pyarrow.Table, column: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The lengths of a column's lists, and their concatenated values."""
    lists = batch[column].combine_chunks()
    return lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
