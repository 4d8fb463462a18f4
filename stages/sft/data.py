"""Rows -> tokens with segments. Each token is marked once; what a segment weighs is looked up when a batch is made,
so the same prepared rows serve every pair of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy
import pyarrow
import torch
import transformers
from datasets import Dataset, Features, Json, List, Value
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from stages.base import BadInput
from stages.sft.render import BadRender, Rendered, learnt_turns, render_chat, render_text
from stages.sft.segments import LEARNT, Segment

VERSION = 1
"""Raised when the same rows would be prepared otherwise, so that older prepared rows are not used."""

ROWS_PER_PROCESS = 5_000
"""Below as many rows, starting a process takes longer than its share of the work."""

SHOWN = 10
"""How many bad rows an error lists before it counts the rest."""

KINDS = ({"prompt", "completion"}, {"messages"}, {"text"}, {"input_ids", "loss_weights"})
"""The columns that rows may hold."""

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
    num_proc: int | None = None,
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
    used, or with `on_bad_row="drop"` only where that is every row. `num_proc` processes share the work; if None, as
    many as this process has cores, but not for few rows.
    """
    preparer = Preparer(tokenizer, max_length, turns, not any(isinstance(f, Json) for f in dataset.features.values()))
    names = set(dataset.column_names)
    if not any(names >= kind for kind in KINDS):
        raise BadInput(
            f"the data has the columns {', '.join(sorted(names))}; rows hold prompt and"
            " completion, or messages, or text, or input_ids and loss_weights"
        )
    prepared = dataset.map(
        preparer,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=FEATURES,
        new_fingerprint=content_key(dataset._fingerprint, preparer.key()),
        num_proc=num_proc or _processes(len(dataset)),
    )
    bad = [f"{place}{row}: {problem}" for row, problem in problems(prepared)]
    if bad and (on_bad_row == "error" or len(bad) == len(prepared)):
        raise BadInput("\n".join([*bad[:SHOWN], *([f"and {len(bad) - SHOWN} more rows"] if len(bad) > SHOWN else [])]))
    return prepared


def _processes(rows: int) -> int | None:
    """How many processes are worth starting; None for none beside this one."""
    processes = min(torch.get_num_threads(), rows // ROWS_PER_PROCESS)
    return processes if processes > 1 else None


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
    gaps: bool = False
    """Whether None in a row is a gap that Arrow filled, where another row has something, and not the row's own."""

    def __post_init__(self) -> None:
        eos = self.tokenizer.eos_token or ""
        ends_by_itself = self.tokenizer("a").input_ids[-1:] == [self.tokenizer.eos_token_id]
        self.eos = "" if ends_by_itself else eos
        self.headers: dict[str, int] = {}

    def key(self) -> tuple[Any, ...]:
        """All that decides what comes out, beside the rows."""
        tokenizer = self.tokenizer
        digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        special = sorted(tokenizer.special_tokens_map.items())
        return (
            digest,
            tokenizer.chat_template,
            special,
            self.max_length,
            self.turns,
            self.gaps,
            transformers.__version__,
        )

    def __call__(self, rows: dict[str, list[Any]], indices: list[int]) -> pyarrow.Table:
        """A batch of rows, by column, as a batch of prepared rows."""
        numbers = rows.pop("row", None)
        if not numbers or not all(isinstance(number, int) for number in numbers):
            numbers = [index + 1 for index in indices]
        by_row = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        columns = self._given(by_row) if "input_ids" in rows else self._tokenised(by_row)
        return pyarrow.table({**columns, "row": numbers}).select(list(FEATURES)).cast(FEATURES.arrow_schema)

    def _rendered(self, row: dict[str, Any]) -> Rendered:
        try:
            if self.gaps:
                row = _without_none(row)
            rendered = self._render(row)
        except BadRender as error:
            return Rendered("", str(error))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            return Rendered("", f"cannot be read as {' and '.join(row)}: {type(error).__name__}: {error}")
        return rendered if rendered.text else Rendered("", "is empty; fill it or remove the row")

    def _render(self, row: dict[str, Any]) -> Rendered:
        options = row.get("chat_template_kwargs") or {}
        if row.get("tools"):
            options = options | {"tools": row["tools"]}
        if "messages" in row:
            messages = row["messages"]
            learnt = learnt_turns(messages, self.turns)
            if not learnt:
                raise BadRender("holds no assistant message, so there is nothing to learn; remove the row")
            return render_chat(self.tokenizer, messages, learnt, options, headers=self.headers)
        if "completion" not in row:
            return render_text("", row["text"], self.eos, Segment.TEXT)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, str):
            return render_text(prompt, completion, self.eos)
        learnt = list(range(len(prompt), len(prompt) + len(completion)))
        return render_chat(self.tokenizer, [*prompt, *completion], learnt, options, True, self.headers)

    def _tokenised(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Each token is what its last character is: one that reaches over the boundary belongs to the completion,
        where it is judged. What the tokenizer adds without text, at (0, 0), goes with the token before. The
        characters of all rows are taken as one text."""
        rendered = [self._rendered(row) for row in rows]
        chat = "messages" in rows[0] or not isinstance(rows[0].get("completion", ""), str)
        self.tokenizer("")  # sets its backend to neither pad nor cut
        texts = [row.text for row in rendered]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=not chat)
        lengths = numpy.asarray([0 if row.problem else len(one) for row, one in zip(rendered, encodings, strict=True)])
        used = [one for row, one in zip(rendered, encodings, strict=True) if not row.problem]
        total = int(lengths.sum())
        ids = numpy.fromiter(chain.from_iterable(one.ids for one in used), numpy.int32, total)
        ends_of = chain.from_iterable(chain.from_iterable(one.offsets for one in used))
        spans = numpy.fromiter(ends_of, numpy.int64, 2 * total).reshape(-1, 2)

        row_of = numpy.repeat(numpy.arange(len(rows)), lengths)
        chars = numpy.asarray([len(row.text) for row in rendered])
        start = (numpy.cumsum(chars) - chars)[row_of]
        end = numpy.maximum.accumulate(spans[:, 1] + start)
        last = numpy.maximum(end - 1, start)
        of_char = numpy.concatenate([row.segments for row in rendered])
        segments, factors = of_char[last], numpy.concatenate([row.factors for row in rendered])[last]
        # a token begins where the one before ends: offsets may leave out the white space that it begins with
        begins_in = of_char[numpy.minimum(numpy.maximum(numpy.concatenate([[0], end[:-1]])[:total], start), last)]
        merged = (begins_in != Segment.COMPLETION) & (segments == Segment.COMPLETION) & (spans[:, 1] > spans[:, 0])
        weighed = numpy.bincount(row_of[factors != 1], minlength=len(rows)) > 0
        return self._cut(lengths, ids, segments, factors, weighed) | {
            "merged": numpy.bincount(row_of[merged], minlength=len(rows)),
            "problem": [row.problem for row in rendered],
        }

    def _given(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows that come as tokens with a weight each."""
        problems = [_why_not(row["input_ids"], row["loss_weights"]) for row in rows]
        used = [row for row, problem in zip(rows, problems, strict=True) if not problem]
        lengths = numpy.asarray(
            [0 if problem else len(row["input_ids"]) for row, problem in zip(rows, problems, strict=True)]
        )
        total = int(lengths.sum())
        ids = numpy.fromiter(chain.from_iterable(row["input_ids"] for row in used), numpy.int32, total)
        factors = numpy.fromiter(chain.from_iterable(row["loss_weights"] for row in used), numpy.float32, total)
        segments = numpy.full(total, Segment.GIVEN, dtype=numpy.int8)
        columns = self._cut(lengths, ids, segments, factors, numpy.ones(len(rows), dtype=bool))
        return columns | {"merged": numpy.zeros(len(rows), dtype=numpy.int32), "problem": problems}

    def _cut(
        self,
        lengths: numpy.ndarray,
        ids: numpy.ndarray,
        segments: numpy.ndarray,
        factors: numpy.ndarray,
        weighed: numpy.ndarray,
    ) -> dict[str, Any]:
        """All rows' tokens as lists by row, each cut at max_length; factors only of the rows that are `weighed`."""
        kept_lengths = lengths if self.max_length is None else numpy.minimum(lengths, self.max_length)
        place = numpy.arange(len(ids)) - numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
        kept = place < numpy.repeat(kept_lengths, lengths)
        with_factor = kept & numpy.repeat(weighed, lengths)
        return {
            "input_ids": _lists(kept_lengths, ids[kept]),
            "segments": _lists(kept_lengths, segments[kept]),
            "factors": _lists(numpy.where(weighed, kept_lengths, 0), factors[with_factor]),
            "cut": lengths - kept_lengths,
        }


def _without_none(value: Any) -> Any:
    """`value` without the None in its mappings, however deep."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _why_not(ids: list[int] | None, weights: list[float] | None) -> str:
    """Why token ids and weights make no row; empty if they do."""
    if not ids or weights is None or None in ids or None in weights:
        return "has no input_ids, no loss_weights, or gaps in them"
    if len(ids) != len(weights):
        return f"has {len(ids)} input_ids but {len(weights)} loss_weights; give one for each"
    if any(not 0 <= weight < float("inf") for weight in weights):
        return "has a loss weight that is not a finite number >= 0"
    return ""


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
        answers = numpy.bincount(row_of[numpy.isin(segments, LEARNT)], minlength=len(lengths)) > 0
        ids = _flat(batch, "input_ids")[1][learns[row_of]]
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
    columns = {
        "input_ids": ids,
        "segments": _flat(batch, "segments")[1],
        "factors": factors,
        "row": numpy.repeat(batch["row"].to_numpy(), lengths),
    }
    return pyarrow.table({name: _lists(lengths, values) for name, values in columns.items()})


def _lists(lengths: numpy.ndarray, values: numpy.ndarray) -> pyarrow.ListArray:
    """All `values` in a row as lists of these lengths."""
    return pyarrow.ListArray.from_arrays(numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32), values)


def _flat(batch: pyarrow.Table, column: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The lengths of a column's lists, and all their values in a row."""
    lists = batch[column].combine_chunks()
    return lists.value_lengths().to_numpy(), lists.flatten().to_numpy()
