"""Rows -> tokens with segments. Each token is marked once; what a segment weighs is looked up when a batch is made,
so the same prepared rows serve every pair of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import pyarrow
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from stages.base import BadInput
from stages.sft.render import BadRender, Rendered, learnt_turns, render_chat, render_text
from stages.sft.segments import Segment

VERSION = 1
"""Raised when the same rows would be prepared otherwise, so that older prepared rows are not used."""

SHOWN = 10
"""How many bad rows an error lists before it counts the rest."""

COLUMNS = ("prompt and completion", "messages", "text", "input_ids and loss_weights")
"""What rows may hold."""

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "segments": List(Value("int8")),
        "factors": List(Value("float32")),
        "row": Value("int64"),
        "cut": Value("int32"),
        "merged": Value("int32"),
        "problem": Value("string"),
    }
)


def prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    turns: Literal["all", "last"] = "all",
    on_bad_row: Literal["error", "drop"] = "error",
    place: str = "row ",
    **map_options: Any,
) -> Dataset:
    """Tokenise rows of `prompt` and `completion` (text or messages), `messages`, `text`, or `input_ids` and
    `loss_weights`; in one batched pass, whose result is cached by the content of all that it depends on.

    Returns a row for each row, with the columns
    - `input_ids` and `segments` (values of Segment): lists of equal length, cut at `max_length` on the right;
    - `factors`: a list likewise, of what multiplies each token's weight, or empty where all are 1;
    - `row`: the row's number, its `row` column if it has one, else counted from 1;
    - `cut` and `merged`: how many tokens were cut off, and how many reach over the boundary into a completion;
    - `problem`: why the row cannot be used, and then it has no tokens; else empty.

    Text gets the EOS token at its end, as in TRL; messages get what the chat template writes. `turns` says which
    assistant messages of `messages` are completion. Raises BadInput naming `place` and row of all that cannot be
    used, or with `on_bad_row="drop"` only where that is every row.
    """
    preparer = Preparer(tokenizer, max_length, turns)
    names = set(dataset.column_names)
    if not names & {"text", "messages", "input_ids"} and not {"prompt", "completion"} <= names:
        raise BadInput(f"the data has the columns {', '.join(sorted(names))}; rows hold {', or '.join(COLUMNS)}")
    prepared = dataset.map(
        preparer,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=FEATURES,
        new_fingerprint=content_key(dataset._fingerprint, preparer.key()),
        **map_options,
    )
    bad = [f"{place}{row}: {problem}" for row, problem in problems(prepared)]
    if bad and (on_bad_row == "error" or len(bad) == len(prepared)):
        raise BadInput("\n".join([*bad[:SHOWN], *([f"and {len(bad) - SHOWN} more rows"] if len(bad) > SHOWN else [])]))
    return prepared


def problems(prepared: Dataset) -> Iterator[tuple[int, str]]:
    """(row number, why) for each prepared row that cannot be used."""
    for batch in prepared.select_columns(["row", "problem"]).iter(10_000):
        yield from ((row, why) for row, why in zip(batch["row"], batch["problem"], strict=True) if why)


def content_key(*parts: Any) -> str:
    """A name for what is made of `parts` alone."""
    return hashlib.sha256(repr((VERSION, *parts)).encode()).hexdigest()[:32]


@dataclass
class Preparer:
    """Tokenises batches of rows; see `prepare`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    turns: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        eos = self.tokenizer.eos_token or ""
        ends_by_itself = self.tokenizer("a").input_ids[-1:] == [self.tokenizer.eos_token_id]
        self.eos = "" if ends_by_itself else eos

    def key(self) -> tuple[Any, ...]:
        """All that decides what comes out, beside the rows."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        return digest, self.tokenizer.chat_template, self.eos, self.max_length, self.turns

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """A batch of rows as a batch of prepared rows, both by column."""
        numbers = rows.pop("row", None) or [index + 1 for index in indices]
        by_row = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        prepared = [self._given(row) for row in by_row] if "input_ids" in rows else self._tokenised(by_row)
        columns = {name: [row[name] for row in prepared] for name in FEATURES if name != "row"}
        return {**columns, "row": numbers}

    def _rendered(self, row: dict[str, Any]) -> Rendered | BadRender:
        try:
            if "messages" in row:
                messages = row["messages"]
                return render_chat(self.tokenizer, messages, learnt_turns(messages, self.turns), row.get("tools"))
            if "text" in row:
                return render_text("", row["text"], self.eos, Segment.TEXT)
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(completion, str):
                return render_text(prompt, completion, self.eos)
            learnt = range(len(prompt), len(prompt) + len(completion))
            return render_chat(self.tokenizer, [*prompt, *completion], learnt, row.get("tools"), to_the_end=True)
        except BadRender as error:
            return error

    def _tokenised(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rendered = [self._rendered(row) for row in rows]
        texts = [row.text for row in rendered if isinstance(row, Rendered)]
        if not texts:
            return [_prepared(problem=str(row)) for row in rendered]
        chat = "messages" in rows[0] or not isinstance(rows[0].get("completion", ""), str)
        encoded = self.tokenizer(
            texts, add_special_tokens=not chat, return_offsets_mapping=True, return_attention_mask=False
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            self._marked(row, *next(tokens)) if isinstance(row, Rendered) else _prepared(problem=str(row))
            for row in rendered
        ]

    def _marked(self, rendered: Rendered, ids: list[int], offsets: list[tuple[int, int]]) -> dict[str, Any]:
        """Each token is what its last character is: one that reaches over the boundary belongs to the completion,
        where it is judged. What the tokenizer adds without text (0, 0) goes with the token before."""
        spans = numpy.asarray(offsets, dtype=numpy.int64).reshape(-1, 2)[: self.max_length]
        last = numpy.maximum(numpy.maximum.accumulate(spans[:, 1]) - 1, 0)
        segments, factors = rendered.segments[last], rendered.factors[last]
        begins_in = rendered.segments[spans[:, 0].clip(max=last)]
        merged = (begins_in != Segment.COMPLETION) & (segments == Segment.COMPLETION) & (spans[:, 1] > spans[:, 0])
        return _prepared(
            input_ids=ids[: self.max_length],
            segments=segments,
            factors=factors if (factors != 1).any() else (),
            cut=len(ids) - len(spans),
            merged=int(merged.sum()),
        )

    def _given(self, row: dict[str, Any]) -> dict[str, Any]:
        ids, weights = row["input_ids"], row["loss_weights"]
        if len(ids) != len(weights):
            return _prepared(problem=f"has {len(ids)} input_ids but {len(weights)} loss_weights; give one for each")
        if any(not 0 <= weight < float("inf") for weight in weights):
            return _prepared(problem="has a loss weight that is not a finite number >= 0")
        kept = ids[: self.max_length]
        return _prepared(
            input_ids=kept,
            segments=[Segment.GIVEN] * len(kept),
            factors=weights[: self.max_length],
            cut=len(ids) - len(kept),
        )


def _prepared(
    input_ids: Sequence[int] | numpy.ndarray = (),
    segments: Sequence[int] | numpy.ndarray = (),
    factors: Sequence[float] | numpy.ndarray = (),
    cut: int = 0,
    merged: int = 0,
    problem: str = "",
) -> dict[str, Any]:
    """A prepared row, less its number."""
    return {
        "input_ids": numpy.asarray(input_ids, dtype=numpy.int32),
        "segments": numpy.asarray(segments, dtype=numpy.int8),
        "factors": numpy.asarray(factors, dtype=numpy.float32),
        "cut": cut,
        "merged": merged,
        "problem": problem,
    }


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
    tokens: int
    """Of the rows that are used."""
    tokens_dropped: int
    """Of the rows without weight."""
    tokens_truncated: int
    """Cut off at max_length, of all rows."""
    tokens_merged: int
    """Tokens that reach over the boundary into a completion, of all rows; they belong to the completion."""
    weighted: dict[str, int]
    """Predicted tokens of non-zero weight by segment, of the rows that are used."""


def select(prepared: Dataset, table: Sequence[float]) -> tuple[Dataset, Used]:
    """The rows of `prepared` that have a predicted token of non-zero weight, `table` being a weight by Segment."""
    weights = numpy.asarray(table, dtype=numpy.float32)
    kept: list[numpy.ndarray] = []
    by_segment = numpy.zeros(len(Segment), dtype=numpy.int64)
    sums = dict.fromkeys(("cut", "merged", "bad", "tokens", "dropped"), 0)
    start = 0
    for batch in prepared.with_format("arrow").iter(1_000):
        lengths, segments, weighs = _flat_weights(batch, weights)
        row_of = numpy.repeat(numpy.arange(len(lengths)), lengths)
        learns = numpy.bincount(row_of[weighs], minlength=len(lengths)) > 0
        kept.append(start + numpy.flatnonzero(learns))
        start += len(lengths)
        by_segment += numpy.bincount(segments[weighs], minlength=len(Segment))
        bad = numpy.asarray([bool(problem) for problem in batch["problem"].to_pylist()])
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
        tokens=sums["tokens"],
        tokens_dropped=sums["dropped"],
        tokens_truncated=sums["cut"],
        tokens_merged=sums["merged"],
        weighted={s.name.lower(): int(by_segment[s]) for s in Segment if by_segment[s]},
    )
    return (prepared if len(indices) == len(prepared) else prepared.select(indices)), used


def _flat_weights(batch: pyarrow.Table, weights: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """The lengths of the rows, and of all their tokens in a row the segment and whether it weighs in the loss."""
    lengths, segments = _flat(batch, "segments")
    factor_lengths, factors = _flat(batch, "factors")
    weighs = weights[segments] != 0
    weighs[numpy.repeat(factor_lengths > 0, lengths)] &= factors != 0
    weighs[(numpy.cumsum(lengths) - lengths)[lengths > 0]] = False  # nothing predicts a row's first token
    return lengths, segments, weighs


def pack(dataset: Dataset, max_length: int) -> Dataset:
    """Rows packed by TRL's best-fit-decreasing into rows of up to `max_length` tokens, none of them split.

    Adds `seq_lengths`, the lengths of the rows in each pack; `factors` and `row` get a value for each token.
    """
    return pack_dataset(dataset.with_format("arrow").map(_spread, batched=True), max_length, "bfd").with_format(None)


def _spread(batch: pyarrow.Table) -> pyarrow.Table:
    """The columns that are packed, as lists of the same lengths."""
    lengths, ids = _flat(batch, "input_ids")
    factor_lengths, given = _flat(batch, "factors")
    factors = numpy.ones(len(ids), dtype=numpy.float32)
    factors[numpy.repeat(factor_lengths > 0, lengths)] = given
    offsets = numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32)
    columns = {
        "input_ids": ids,
        "segments": _flat(batch, "segments")[1],
        "factors": factors,
        "row": numpy.repeat(batch["row"].to_numpy(), lengths),
    }
    return pyarrow.table({name: pyarrow.ListArray.from_arrays(offsets, values) for name, values in columns.items()})


def _flat(batch: pyarrow.Table, column: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The lengths of a column's lists, and all their values in a row."""
    lists = batch[column].combine_chunks()
    return lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
