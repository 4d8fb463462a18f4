"""Files -> training rows, one after the other: which rows are read, and what becomes of those that cannot be used.

What columns mean is left to stages.rows, the kinds of files to stages.files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from stages.base import UserError
from stages.data.columns import MISSING, BadRow
from stages.data.files import Record, Unreadable, read_file, read_folder
from stages.data.formats import FORMATS, Example, NoFormat, Pair, Row, guess, official_pair, pair

SHOWN = 10
"""How many bad rows an error lists before it counts the rest."""

DROPPED_ROWS = "dropped_rows.txt"
"""The file beside a trained model that lists the rows that `on_bad_row: drop` left out."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Reading:
    """How a file, or one split of a folder that holds a data set, is to be read."""

    format: str = "auto"
    """One of FORMATS; `auto` looks at the first row's columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the file's."""
    on_bad_row: Literal["error", "drop"] = "error"
    split: str = "train"
    """Of a folder; a file has none."""
    subset: str | None = None
    """Of a folder that holds several."""


def read_examples(path: Path, reading: Reading, dropped: list[str] | None = None) -> Iterator[tuple[int, Row]]:
    """(number in the file, row) for the instruction rows of `path`, a file or a data set's folder, one by one.

    `dropped` receives `path:number: reason` for every row left out by `on_bad_row: drop`. Raises UserError, which
    names file, row, column and remedy; for bad rows after the last good one was yielded, so that all are named.
    """
    chosen = None if reading.format == "auto" else FORMATS[reading.format].convert

    def convert(row: Record) -> Row:
        nonlocal chosen
        chosen = chosen or guess(row)
        return chosen(row)

    return _convert(path, reading, convert, dropped)


def read_pairs(
    path: Path, reading: Reading, rejected: Literal["column", "other_row"], seed: int, dropped: list[str] | None = None
) -> Iterator[tuple[int, Pair]]:
    """Likewise for preference rows; `other_row` makes pairs of instruction rows, all of which it holds in memory."""
    if rejected == "column":
        return _convert(path, reading, official_pair if reading.format == "official" else pair, dropped)
    return _pair_up(path, reading, seed, dropped)


def listing(dropped: list[str], paths: Iterable[Path]) -> str:
    """What goes into DROPPED_ROWS: a line for each row, without the folders, which differ between machines."""
    lines = "".join(f"{told}\n" for told in dropped)
    for path in paths:
        lines = lines.replace(f"{path.parent}/", "")
    return lines


def place_of(path: Path, reading: Reading) -> str:
    """How messages name the data at `path`."""
    return f"{path}[{reading.split}]" if path.is_dir() else str(path)


def bad_rows(told: list[str], count: int) -> UserError:
    """The error for `count` bad rows, the first SHOWN of which are listed; `told` has at least those."""
    more = [f"and {count - SHOWN} more rows like these"] if count > SHOWN else []
    return UserError("\n".join([*told[:SHOWN], *more]))


def dropped_note(part: str, count: int) -> str:
    """How the console says that rows were dropped."""
    return f"{part} data: {count} rows that cannot be used were dropped; {DROPPED_ROWS} lists them"


def _convert(
    path: Path, reading: Reading, convert: Callable[[Record], Made], dropped: list[str] | None
) -> Iterator[tuple[int, Made]]:
    """Every good row; what the bad ones are, told or dropped. Rows of two kinds in one place are an error."""
    place = place_of(path, reading)
    bad, kind, shown = 0, None, []
    for number, record in _records(path, reading):
        try:
            row = convert(_rename(record, reading.columns))
        except BadRow as error:
            bad += 1
            told = f"{place}:{number}: {error.told(record, reading.columns)}"
            if isinstance(error, NoFormat) and reading.on_bad_row == "error":
                raise UserError(told) from None
            shown += [told] if bad <= SHOWN else []
            if reading.on_bad_row == "drop" and dropped is not None:
                dropped.append(told)
            continue
        if kind not in (None, _kind(row)):
            raise UserError(
                f"{place}:{number}: some rows are plain text and others are messages; keep each kind in its own file"
            )
        kind = _kind(row)
        yield number, row
    if bad and (kind is None or reading.on_bad_row == "error"):
        raise bad_rows(shown, bad)


def _records(path: Path, reading: Reading) -> Iterator[tuple[int, Record | Unreadable]]:
    if path.is_dir():
        return read_folder(path, reading.subset, reading.split)
    return read_file(path)


def _rename(record: Record | Unreadable, columns: dict[str, str]) -> Record:
    """The record under our names."""
    if isinstance(record, Unreadable):
        raise BadRow(None, record.reason)
    for ours, theirs in columns.items():
        if theirs not in record:
            raise BadRow(ours, MISSING)
    rest = {name: value for name, value in record.items() if name not in columns.values()}
    return rest | {ours: record[theirs] for ours, theirs in columns.items()}


def _kind(row: Any) -> tuple[type, set[bool]]:
    """What all rows of a file have in common: their type, and whether they are plain text."""
    return type(row), {isinstance(value, str) for name, value in row.columns().items() if name != "tools"}


def _pair_up(path: Path, reading: Reading, seed: int, dropped: list[str] | None) -> Iterator[tuple[int, Pair]]:
    """Each row's own completion against another row's that differs, drawn by `seed`."""
    rows = list(read_examples(path, reading, dropped))
    examples = [(number, row) for number, row in rows if isinstance(row, Example)]
    if len(examples) != len(rows):
        raise UserError(f"{path}: rejected: other_row needs rows of prompt and completion, or of alpaca's columns")
    completions = [example.completion for _, example in examples]
    if all(completion == completions[0] for completion in completions):
        raise UserError(f"{path}: rejected: other_row needs rows with different completions")
    draw = random.Random(seed)
    for number, example in examples:
        other = draw.choice(completions)
        while other == example.completion:
            other = draw.choice(completions)
        yield number, Pair(example.prompt, example.completion, other, example.tools)
