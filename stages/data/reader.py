"""Read the training rows of a file or folder one by one; report or drop rows that cannot be used."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from stages.base import UserError
from stages.data.columns import decode_messages
from stages.data.files import BadRow, Record, read_file
from stages.data.folders import read_folder, unread_files
from stages.data.formats import (
    FORMATS,
    OFFICIAL_PAIR,
    PAIR,
    TEMPLATE_COLUMNS,
    Example,
    Format,
    Pair,
    Row,
    TrainingRow,
    UnknownFormat,
    detect_format,
)

MAX_BAD_ROWS = 10  # bad rows in an error, which counts the others
DROPPED_ROWS = "dropped_rows.txt"  # beside the trained model: the rows that `on_bad_row: drop` left out


@dataclass
class RowReport:
    """What else a pass over the rows of a data file shows."""

    dropped: list[str] = field(default_factory=list)
    """`path:number: reason` for every row that `on_bad_row: drop` leaves out."""
    unread_columns: list[str] = field(default_factory=list)
    """Columns, keys of messages and template variables that nothing reads."""
    unread_files: list[str] = field(default_factory=list)
    """Data files of the folder that belong to no split."""


@dataclass(frozen=True)
class Reading:
    """How to read a file, or one split of a data set folder.

    The cache key of prepared rows has the repr of this class: new names here would prepare every data set again.
    """

    format: str = "auto"
    """A key of FORMATS; `auto` detects it from the first row's columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name of a column -> the file's name."""
    on_bad_row: Literal["error", "drop"] = "error"
    split: str = "train"
    """The split of a folder; ignored for a file."""
    subset: str | None = None
    """The subset of a folder that has several."""


def read_examples(path: Path, reading: Reading, report: RowReport | None = None) -> Iterator[tuple[int, Row]]:
    """Yield (number in the file, row) for the instruction rows of a file or data set folder.

    Args:
        report: filled while the rows are read.

    Raises:
        UserError: rows cannot be used. The error comes after the last good row, and lists all bad ones.
    """
    return _convert_rows(path, reading, None if reading.format == "auto" else FORMATS[reading.format], report)


def read_pairs(
    path: Path, reading: Reading, rejected: Literal["column", "other_row"], seed: int, report: RowReport | None = None
) -> Iterator[tuple[int, Pair]]:
    """Yield (number in the file, pair) for preference rows; see read_examples.

    Args:
        rejected: `column` reads pairs; `other_row` makes pairs of instruction rows, which are all held in memory.
        seed: decides which other row's completion is rejected.
    """
    if rejected == "column":
        yield from _convert_rows(path, reading, OFFICIAL_PAIR if reading.format == "official" else PAIR, report)
        return
    rows = list(read_examples(path, reading, report))
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
        template_columns = {name: getattr(example, name) for name in TEMPLATE_COLUMNS}
        yield number, Pair(example.prompt, example.completion, other, **template_columns)


def dropped_rows_text(dropped: list[str], path: Path) -> str:
    """Return the content of DROPPED_ROWS, one line per row, without the folder of `path`, which differs between
    machines."""
    return "".join(f"{line}\n" for line in dropped).replace(f"{path.parent}/", "")


def source_name(path: Path, reading: Reading) -> str:
    """Return the name of the data at `path` in messages."""
    return f"{path}[{reading.split}]" if path.is_dir() else str(path)


def bad_rows_error(lines: list[str], count: int) -> UserError:
    """Return the error for `count` bad rows, which lists the first MAX_BAD_ROWS of `lines`."""
    more = [f"and {count - MAX_BAD_ROWS} more rows like these"] if count > MAX_BAD_ROWS else []
    return UserError("\n".join([*lines[:MAX_BAD_ROWS], *more]))


def report_notes(report: RowReport) -> list[str]:
    """Return notes about what reading the rows showed."""
    notes = []
    if count := len(report.dropped):
        notes.append(f"{count} rows that cannot be used were dropped; {DROPPED_ROWS} lists them")
    if report.unread_columns:
        notes.append(f"columns not read: {', '.join(report.unread_columns)}")
    if report.unread_files:
        names = ", ".join(report.unread_files[:MAX_BAD_ROWS])
        notes.append(f"{len(report.unread_files)} files of the folder belong to no split: {names}")
    return notes


def _convert_rows(
    path: Path, reading: Reading, format: Format | None, report: RowReport | None
) -> Iterator[tuple[int, Any]]:
    """Convert every good row, and list or drop the bad ones. Rows of two kinds in one source are an error.

    Args:
        format: None detects it from the first row that fits one.
    """
    report = report or RowReport()
    bad, kind, listed, unseen = 0, None, list[str](), set(reading.columns)
    for place, number, record in _records(path, reading):
        try:
            renamed = _rename(record, reading.columns)
            unseen -= renamed.keys()
            format = format or detect_format(renamed)
            row = format.convert(renamed)
        except BadRow as error:
            bad += 1
            line = f"{place}: {error.describe(record, reading.columns)}"
            if isinstance(error, UnknownFormat) and reading.on_bad_row == "error":
                raise UserError(line) from None
            if bad <= MAX_BAD_ROWS or reading.on_bad_row == "drop":
                listed.append(line)
            continue
        report.unread_columns += [name for name in renamed if name not in (*format.columns, *report.unread_columns)]
        if kind not in (None, _kind(row)):
            raise UserError(f"{place}: some rows are plain text and others are messages; put each kind in its own file")
        kind = _kind(row)
        yield number, row
    if bad and (kind is None or reading.on_bad_row == "error"):
        raise bad_rows_error(listed, bad)
    report.dropped += listed
    if path.is_dir():
        report.unread_files = unread_files(path)
    if unseen:
        names = ", ".join(reading.columns[name] for name in sorted(unseen))
        raise UserError(f"{source_name(path, reading)}: no row has the column {names}; correct data.columns")


def _records(path: Path, reading: Reading) -> Iterator[tuple[str, int, Record | BadRow]]:
    """Yield (`file:line`, number, record); the number is the line of a file, or counts the rows of a folder's split."""
    if not path.is_dir():
        yield from ((f"{path}:{number}", number, record) for number, record in read_file(path))
        return
    for number, (file, line, record) in enumerate(read_folder(path, reading.subset, reading.split), 1):
        yield f"{file}:{line}", number, record


def row_place(path: Path, reading: Reading) -> Callable[[int], str]:
    """Return a function from the number of a row to its `file:line`, for messages."""
    if not path.is_dir():
        return lambda number: f"{path}:{number}"
    places = cache(lambda: [place for place, _, _ in _records(path, reading)])
    return lambda number: places()[number - 1]


def _rename(record: Record | BadRow, columns: dict[str, str]) -> Record:
    if isinstance(record, BadRow):
        raise record
    rest = {name: value for name, value in record.items() if name not in (*columns, *columns.values())}
    return decode_messages(rest | {ours: record[theirs] for ours, theirs in columns.items() if theirs in record})


def _kind(row: TrainingRow) -> tuple[type, set[bool]]:
    """Return the class of the row and whether it is plain text; all rows of a file must agree."""
    return type(row), {isinstance(value, str) for name, value in row.columns().items() if name not in TEMPLATE_COLUMNS}
