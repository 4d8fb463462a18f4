"""Tokenise rows and mark the segment of every token.

Weights are applied when a batch is collated, so the same prepared rows serve every pair of weights.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any, ClassVar, Literal

import numpy
import pyarrow
import torch
import transformers
from datasets import Dataset, Features, List, Value
from pyarrow.compute import list_slice
from transformers import GenerationConfig, PreTrainedTokenizerBase

from stages.base import UserError
from stages.data.chat_rendering import Rendered, render_chat, render_text, target_turns
from stages.data.columns import weighted_tokens
from stages.data.files import BadRow, without_nulls
from stages.data.reader import bad_rows_error
from stages.data.segments import Segment

PREPARATION_VERSION = 3
"""Part of the cache key of prepared rows. Increase it when the same rows would be prepared differently."""
ROWS_PER_PROCESS = 5_000  # with fewer, starting a process takes longer than its share of the work

ROW_JSON = "json"
"""A column of rows as JSON, which keeps the keys and types of each row."""
ROW_COLUMNS = ({"prompt", "completion"}, {"messages"}, {"text"}, {"input_ids", "loss_weights"})
"""The sets of columns that rows can have."""

FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "segments": List(Value("int8")),
        "factors": List(Value("float32")),
        "row": Value("int64"),
        "cut": Value("int32"),
        "merged": Value("int32"),
        "unwritten": Value("int32"),
        "problem": Value("string"),
    }
)
"""The columns of prepared rows. Caches on disk have these names."""


def prepare(
    dataset: Dataset,
    preparer: "Preparer",
    on_bad_row: Literal["error", "drop"] = "error",
    place: Callable[[int], str] = "row {}".format,
    num_proc: int | None = None,
) -> Dataset:
    """Tokenise rows that have one of ROW_COLUMNS; the result is cached by the content of everything it depends on.

    Text gets the EOS token at its end, as in TRL; messages get what the chat template writes.

    Args:
        place: the name of a row in errors, by its number.
        num_proc: number of processes; by default one per core for large data sets.

    Returns:
        One row per input row, with the columns of `preparer.features`; those of Preparer are
        - `input_ids` and `segments` (values of Segment): lists of equal length, truncated on the right to `max_length`;
        - `factors`: the weight multiplier of each token, or an empty list if all are 1;
        - `row`: the input's `row`, or a number counted from 1;
        - `cut`: number of truncated tokens;
        - `merged`: number of boundary tokens, which reach from another segment into a completion;
        - `unwritten`: number of characters of earlier answers that the chat template leaves out by design;
        - `problem`: why the row cannot be used (it then has no tokens), else empty.

    Raises:
        UserError: a row cannot be used; with `on_bad_row="drop"` only if none can.
    """
    names = set(dataset.column_names)
    if names != {"row", ROW_JSON} and not any(names >= columns for columns in ROW_COLUMNS):
        raise UserError(
            f"the data has the columns {', '.join(sorted(names))}; rows need prompt and"
            " completion, or messages, or text, or input_ids and loss_weights"
        )
    prepared = dataset.map(
        preparer,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        features=preparer.features,
        new_fingerprint=content_key(dataset._fingerprint, preparer.key()),
        num_proc=num_proc or _process_count(len(dataset)),
    )
    bad = [f"{place(row)}: {problem}" for row, problem in problems(prepared)]
    if bad and (on_bad_row == "error" or len(bad) == len(prepared)):
        raise bad_rows_error(bad, len(bad))
    return prepared


def _process_count(rows: int) -> int | None:
    """Return the number of processes worth starting; None to work in this process."""
    count = min(torch.get_num_threads(), rows // ROWS_PER_PROCESS)
    return count if count > 1 else None


def problems(prepared: Dataset) -> Iterator[tuple[int, str]]:
    """Yield (row number, problem) for each prepared row that cannot be used."""
    for batch in prepared.select_columns(["row", "problem"]).iter(10_000):
        yield from ((row, problem) for row, problem in zip(batch["row"], batch["problem"], strict=True) if problem)


def stop_ids_of(tokenizer: PreTrainedTokenizerBase, config: GenerationConfig | None) -> set[int]:
    """Return the ids of the tokens that stop generation."""
    ids = config.eos_token_id if config else None
    return {each for each in [tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])] if each is not None}


def dates_in(template: str | None) -> list[str]:
    """Return the dates and times that a chat template would write now, in each of its formats."""
    formats = _DATE_FORMAT.findall(template or "")
    return [datetime.now().strftime(format or "%c") for format in formats]


def date_notes(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[str]:
    """Return a note if the chat template wrote the date or time in a row."""
    text = tokenizer.decode(token_ids)
    return [
        f"the chat template writes the date or time ({date}), so rows and results differ from day to day;"
        " set the template's variable for it in the rows' chat_template_kwargs"
        for date in dates_in(tokenizer.chat_template)[:1]
        if date in text
    ]


_DATE_FORMAT = re.compile(r"""strftime_now(?:\(\s*["']([^"']*))?""")  # without a literal format: any


def content_key(*parts: Any) -> str:
    """Return a cache key of what `parts` determine: 32 hex digits of the sha256 of their repr."""
    return hashlib.sha256(repr((PREPARATION_VERSION, *parts)).encode()).hexdigest()[:32]


@dataclass
class Preparer:
    """Tokenise batches of rows; see `prepare`."""

    features: ClassVar[Features] = FEATURES

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of `messages` are completion."""

    def __post_init__(self) -> None:
        self.eos = self.tokenizer.eos_token or ""
        adds_eos = self.tokenizer("a").input_ids[-1:] == [self.tokenizer.eos_token_id]
        self.added_eos = "" if adds_eos else self.eos
        self.headers: dict[str, int] = {}

    def key(self) -> tuple[Any, ...]:
        """Return everything that decides the result, except the rows."""
        tokenizer = self.tokenizer
        digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        special = sorted(tokenizer.special_tokens_map.items())
        options = (self.max_length, self.turns)
        dates = dates_in(tokenizer.chat_template)
        return (digest, tokenizer.chat_template, dates, special, *options, transformers.__version__)

    def __call__(self, columns: dict[str, list[Any]], indices: list[int]) -> pyarrow.Table:
        """Prepare a batch of rows, column -> values; ROW_JSON holds complete rows as JSON.

        Keys whose value is None are ignored: Arrow adds them for keys that only other rows have.
        """
        numbers = columns.pop("row", None)
        if not numbers or not all(isinstance(number, int) for number in numbers):
            numbers = [index + 1 for index in indices]
        if ROW_JSON in columns:
            return self.prepare([json.loads(row) for row in columns[ROW_JSON]], numbers)
        rows = zip(*columns.values(), strict=True)
        return self.prepare([without_nulls(dict(zip(columns, values, strict=True))) for values in rows], numbers)

    def prepare(self, rows: list[dict[str, Any]], numbers: Sequence[int]) -> pyarrow.Table:
        """Prepare rows, column -> value, with their numbers."""
        columns = self._pretokenised(rows) if "input_ids" in rows[0] else self._tokenise(rows)
        return pyarrow.table({**columns, "row": numbers}).select(list(FEATURES)).cast(FEATURES.arrow_schema)

    def _render_or_explain(self, row: dict[str, Any]) -> Rendered:
        try:
            rendered = self._render(row)
        except BadRow as error:
            return Rendered("", error.describe(row, {}))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            return Rendered("", f"cannot be read as {' and '.join(row)}: {type(error).__name__}: {error}")
        return rendered if rendered.text else Rendered("", "is empty; fill it or remove the row")

    def _render(self, row: dict[str, Any]) -> Rendered:
        options = row.get("chat_template_kwargs") or {}
        options = options | {name: row[name] for name in ("tools", "documents") if row.get(name)}
        if isinstance(options.get("tools"), str):
            options["tools"] = json.loads(options["tools"])
        if "messages" in row:
            messages = row["messages"]
            targets = target_turns(messages, self.turns)
            if not targets:
                raise BadRow(None, "has no assistant message, so there is nothing to learn; remove the row")
            return render_chat(self.tokenizer, messages, targets, options, headers=self.headers)
        if "completion" not in row:
            return render_text("", row["text"].removesuffix(self.eos), self.added_eos, Segment.TEXT)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(completion, str):
            return render_text(prompt, completion.removesuffix(self.eos), self.added_eos)
        targets = list(range(len(prompt), len(prompt) + len(completion)))
        return render_chat(self.tokenizer, [*prompt, *completion], targets, options, True, self.headers)

    def _tokenise(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokenise rendered rows. A token has the segment of its last character.

        So a boundary token belongs to the completion, where it is predicted. Tokens that the tokenizer adds without
        text, at (0, 0), join the token before. Arrays cover the tokens, or characters, of all rows one after the other.
        """
        rendered = [self._render_or_explain(row) for row in rows]
        is_chat = any("messages" in row or isinstance(row.get("completion"), list) for row in rows)
        self.tokenizer("")  # turns padding and truncation of its backend off
        texts = [row.text for row in rendered]
        encodings = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=not is_chat)
        good = [encoding for row, encoding in zip(rendered, encodings, strict=True) if not row.problem]
        lengths = numpy.asarray(
            [0 if row.problem else len(encoding) for row, encoding in zip(rendered, encodings, strict=True)]
        )
        total = int(lengths.sum())
        ids = numpy.fromiter(chain.from_iterable(encoding.ids for encoding in good), numpy.int32, total)
        offsets = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in good))
        spans = numpy.fromiter(offsets, numpy.int64, 2 * total).reshape(-1, 2)

        row_of = numpy.repeat(numpy.arange(len(rows)), lengths)
        text_lengths = numpy.asarray([len(text) for text in texts])
        text_start = (numpy.cumsum(text_lengths) - text_lengths)[row_of]
        end = numpy.maximum.accumulate(spans[:, 1] + text_start)
        last_char = numpy.maximum(end - 1, text_start)
        char_segments = numpy.concatenate([row.segments for row in rendered])
        segments = char_segments[last_char]
        multipliers = numpy.concatenate([row.weight_multipliers for row in rendered])[last_char]
        # a token starts where the one before ends: offsets can leave out the white space that it starts with
        first_char = numpy.minimum(numpy.maximum(numpy.concatenate([[0], end[:-1]])[:total], text_start), last_char)
        crosses = (char_segments[first_char] != Segment.COMPLETION) & (segments == Segment.COMPLETION)
        boundary_tokens = crosses & (spans[:, 1] > spans[:, 0])
        has_multipliers = numpy.bincount(row_of[multipliers != 1], minlength=len(rows)) > 0
        return self._truncate(
            lengths,
            input_ids=list_array(lengths, ids),
            segments=list_array(lengths, segments),
            factors=list_array(numpy.where(has_multipliers, lengths, 0), multipliers[has_multipliers[row_of]]),
        ) | {
            "merged": numpy.bincount(row_of[boundary_tokens], minlength=len(rows)),
            "unwritten": [sum(map(len, row.unwritten.values())) for row in rendered],
            "problem": [row.problem for row in rendered],
        }

    def _pretokenised(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Take over the tokens and weights of rows that have them; a weight is a multiplier of Segment.GIVEN's 1."""
        all_ids, all_weights, problems = zip(*map(_tokens_or_problem, rows), strict=True)
        lengths = numpy.asarray(list(map(len, all_ids)))
        ids = numpy.fromiter(chain.from_iterable(all_ids), numpy.int32)
        weights = numpy.fromiter(chain.from_iterable(all_weights), numpy.float32)
        segments = numpy.full(len(ids), Segment.GIVEN, dtype=numpy.int8)
        lists: dict[str, numpy.ndarray] = {"input_ids": ids, "segments": segments, "factors": weights}
        columns = self._truncate(lengths, **{name: list_array(lengths, values) for name, values in lists.items()})
        zeros = numpy.zeros(len(rows), dtype=numpy.int32)
        return columns | {"merged": zeros, "unwritten": zeros, "problem": problems}

    def _truncate(self, lengths: numpy.ndarray, **lists: pyarrow.ListArray) -> dict[str, Any]:
        """Cut the lists of tokens off at max_length, and count the tokens of rows of these lengths beyond it."""
        if self.max_length is None:
            return lists | {"cut": numpy.zeros_like(lengths)}
        truncated = {name: list_slice(values, 0, self.max_length) for name, values in lists.items()}
        return truncated | {"cut": numpy.maximum(lengths - self.max_length, 0)}


def _tokens_or_problem(row: dict[str, Any]) -> tuple[list[int], list[float], str]:
    try:
        return *weighted_tokens(row), ""
    except BadRow as error:
        return [], [], error.describe(row, {})


def list_array(lengths: numpy.ndarray, values: numpy.ndarray) -> pyarrow.ListArray:
    """Split `values` into consecutive lists of these lengths."""
    return pyarrow.ListArray.from_arrays(numpy.concatenate([[0], numpy.cumsum(lengths)]).astype(numpy.int32), values)
