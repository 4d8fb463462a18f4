"""Rows -> tokens with segments. Each token is marked once; what a segment weighs is looked up when a batch is made,
so the same prepared rows serve every pair of weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy
import pyarrow
import torch
import transformers
from datasets import Dataset, Features, Json, List, Value
from transformers import PreTrainedTokenizerBase

from stages.base import UserError
from stages.data.chat_rendering import BadRender, Rendered, learnt_turns, render_chat, render_text
from stages.data.reader import bad_rows
from stages.data.segments import Segment

VERSION = 2
"""Raised when the same rows would be prepared otherwise, so that older prepared rows are not used."""

ROWS_PER_PROCESS = 5_000
"""Below as many rows, starting a process takes longer than its share of the work."""

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
    assistant messages of `messages` are completion. Raises UserError naming `place` and row of all that cannot be
    used, or with `on_bad_row="drop"` only where that is every row. `num_proc` processes share the work; if None, as
    many as this process has cores, but not for few rows.
    """
    preparer = Preparer(tokenizer, max_length, turns, not any(isinstance(f, Json) for f in dataset.features.values()))
    names = set(dataset.column_names)
    if not any(names >= kind for kind in KINDS):
        raise UserError(
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
        raise bad_rows(bad, len(bad))
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
            "input_ids": lists(kept_lengths, ids[kept]),
            "segments": lists(kept_lengths, segments[kept]),
            "factors": lists(numpy.where(weighed, kept_lengths, 0), factors[with_factor]),
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


def lists(lengths: numpy.ndarray, values: numpy.ndarray) -> pyarrow.ListArray:
    """All `values` in a row as lists of these lengths."""
    return pyarrow.ListArray.from_arrays(numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32), values)
