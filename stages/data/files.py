"""Read data files (JSONL, JSON, CSV, Parquet) and data set folders lazily, one record at a time.

Imports pyarrow and datasets only where a file needs them, to keep planning fast.
"""

from __future__ import annotations

import csv
import json
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base import UserError

Record = dict[str, Any]
"""One row of a file: column -> value."""

PARQUET_BATCH = 256  # rows in memory at a time


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read, although later rows can."""

    reason: str


def read_rows(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield what `read_file` does, but raise UserError for a bad row."""
    for number, row in read_file(path):
        if isinstance(row, Unreadable):
            raise UserError(f"{path}:{number}: {row.reason}")
        yield number, row


def read_file(path: Path) -> Iterator[tuple[int, Record | Unreadable]]:
    """Yield (line or row number from 1, record) for every row of a file, with Unreadable for each bad row.

    Raises UserError if the file as such cannot be read, or is empty.
    """
    empty = True
    for number, row in _read_any(path):
        empty = False
        if not isinstance(row, (dict, Unreadable)):
            row = Unreadable(f"is {type(row).__name__}, not an object with named columns")
        yield number, row
    if empty:
        raise UserError(f"{path}: has no rows; add at least one, or name another file")


def read_folder(folder: Path, subset: str | None, split: str) -> Iterator[tuple[int, Record]]:
    """Yield (number from 1, record) for every row of one split of a data set folder, as datasets.load_dataset does.

    Raises UserError if the folder cannot be read, or has no such subset or split; the message lists those it has.
    """
    import datasets

    absolute = str(folder.resolve())  # a relative path could be read as the name of a data set on the hub
    try:
        subsets = datasets.get_dataset_config_names(absolute)
        if (subset or "default") not in subsets and (subset or len(subsets) > 1):
            problem = f"has no subset {subset!r}" if subset else "has several subsets"
            raise UserError(f"{folder}: {problem}; set data.subset to one of: {', '.join(subsets)}")
        builder = datasets.load_dataset_builder(absolute, name=subset)
        files = {str(name): files for name, files in (builder.config.data_files or {}).items()}
        if split not in files:
            raise UserError(
                f"{folder}: has no split {split!r}; set data.train_split or data.eval_split to one of:"
                f" {', '.join(files)}"
            )
        for file in (file for split_files in files.values() for file in split_files):
            _refuse_outside(folder, str(file))
        empty = True
        for number, row in enumerate(builder.as_streaming_dataset(split=split), 1):
            empty = False
            yield number, row
    except UserError:
        raise
    except Exception as error:  # the readers of datasets raise errors of any type
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(f"{folder}: cannot be read as a data set: {reason}") from None
    if empty:
        raise UserError(f"{folder}: split {split!r} has no rows; name another")


def _refuse_outside(folder: Path, file: str) -> None:
    """Refuse a file outside `folder`: a data set card can name any file of this machine and any address."""
    if not Path(os.path.normpath(file)).is_relative_to(folder.resolve()) or Path(file).suffix.lower() not in _READERS:
        raise UserError(f"{folder}: names {file}; a data set may only name {', '.join(_READERS)} files in its folder")


def _read_any(path: Path) -> Iterator[tuple[int, Any]]:
    """Read rows by the file's suffix; turn every error into a UserError."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown type of data file; use {', '.join(_READERS)}")
    try:
        yield from reader(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path}: is not a valid {path.suffix} file: {error}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                row = Unreadable(f"not valid JSON: {reason}; write one object per line")
            yield number, row


_WHITE_SPACE = re.compile(r"\s*")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Decode the items of the top-level list one by one, so that only the text is in memory."""
    text = path.read_text(encoding="utf-8-sig")
    decoder, number = json.JSONDecoder(), 0

    def skip_space(position: int) -> int:
        return _WHITE_SPACE.match(text, position).end()  # type: ignore[union-attr]  # matches always

    try:
        position = skip_space(0)
        if not text.startswith("[", position):
            decoder.raw_decode(text, position)
            raise UserError(f"{path}: a .json data file must be one list of rows; for one row per line use .jsonl")
        position = skip_space(position + 1)
        while number or not text.startswith("]", position):
            row, position = decoder.raw_decode(text, position)
            number += 1
            yield number, row
            position = skip_space(position)
            if not text.startswith(",", position):
                break
            position = skip_space(position + 1)
        if not text.startswith("]", position):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if (end := skip_space(position + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; write one list of objects") from None


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            too_long = Unreadable("has more cells than the header; quote cells that contain commas")
            yield reader.line_num, too_long if None in row else row


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(batch_size=PARQUET_BATCH) for row in batch.to_pylist())
        yield from enumerate(rows, 1)


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
