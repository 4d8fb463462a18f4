"""Files -> records: reads JSONL, JSON, CSV and Parquet files, and folders that hold a data set of several, lazily.

What the columns mean is left to stages.rows. Light by intent: pyarrow and datasets are imported where they are needed.
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
"""One row as its file holds it: column -> value."""

BATCH = 256
"""Rows of a Parquet file in memory at a time."""


@dataclass(frozen=True)
class Unreadable:
    """What stands in a row's place where it cannot be read, though those after it can."""

    reason: str


def read_rows(path: Path) -> Iterator[tuple[int, Record]]:
    """(line or row number from 1, row) for every row of the file; at least one. Raises UserError."""
    for number, row in read_file(path):
        if isinstance(row, Unreadable):
            raise UserError(f"{path}:{number}: {row.reason}")
        yield number, row


def read_file(path: Path) -> Iterator[tuple[int, Record | Unreadable]]:
    """Likewise, with what cannot be read of single rows in their place. Raises UserError for what is wrong with all."""
    empty = True
    for number, row in _read(path):
        empty = False
        yield number, row if isinstance(row, (dict, Unreadable)) else _no_record(row)
    if empty:
        raise UserError(f"{path}: holds no rows; give it at least one, or name another file")


def read_folder(folder: Path, subset: str | None, split: str) -> Iterator[tuple[int, Record | Unreadable]]:
    """(number from 1, row) for every row of one split of the data set in `folder`, as datasets.load_dataset finds it.

    Raises UserError; for an unknown subset or split, with those there are.
    """
    import datasets

    place = str(folder.resolve())  # never a name that the hub could answer to
    try:
        subsets = datasets.get_dataset_config_names(place)
        if (subset or "default") not in subsets and (subset or len(subsets) > 1):
            said = f"has no subset {subset!r}" if subset else "is made of subsets"
            raise UserError(f"{folder}: {said}; name one as data.subset: {', '.join(subsets)}")
        builder = datasets.load_dataset_builder(place, name=subset)
        files = {str(name): files for name, files in (builder.config.data_files or {}).items()}
        if split not in files:
            raise UserError(
                f"{folder}: has no split {split!r}; name one as data.train_split or data.eval_split: {', '.join(files)}"
            )
        for file in (file for part in files.values() for file in part):
            _keep_inside(folder, str(file))
        empty = True
        for number, row in enumerate(builder.as_streaming_dataset(split=split), 1):
            empty = False
            yield number, row
    except UserError:
        raise
    except Exception as error:  # its readers raise what they please
        said = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(f"{folder}: cannot be read as a data set: {said}") from None
    if empty:
        raise UserError(f"{folder}: split {split!r} holds no rows; name another")


def _keep_inside(folder: Path, file: str) -> None:
    """A data set's card can name any file of this machine and any address; only data beside the card is read."""
    if not Path(os.path.normpath(file)).is_relative_to(folder.resolve()) or Path(file).suffix.lower() not in _READERS:
        raise UserError(
            f"{folder}: names {file}; a data set is read from {', '.join(_READERS)} files in its own folder"
        )


def _no_record(row: Any) -> Unreadable:
    return Unreadable(f"a row is an object with named columns, found {type(row).__name__}")


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows as the file's kind is read; whatever it cannot be read for is UserError."""
    try:
        yield from _READERS.get(path.suffix.lower(), _unknown)(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path}: is no valid {path.suffix} file: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                row = Unreadable(f"not valid JSON: {why}; one object per line")
            yield number, row


_SPACE = re.compile(r"\s*")


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of the one list, decoded one after the other; only the text is in memory as a whole."""
    text = path.read_text(encoding="utf-8-sig")
    decoder, number = json.JSONDecoder(), 0

    def skip_space(place: int) -> int:
        return _SPACE.match(text, place).end()  # type: ignore[union-attr]  # matches always

    try:
        place = skip_space(0)
        if not text.startswith("[", place):
            decoder.raw_decode(text, place)
            raise UserError(f"{path}: a .json data file holds one list of rows; for one row per line use .jsonl")
        place = skip_space(place + 1)
        while number or not text.startswith("]", place):
            row, place = decoder.raw_decode(text, place)
            number += 1
            yield number, row
            place = skip_space(place)
            if not text.startswith(",", place):
                break
            place = skip_space(place + 1)
        if not text.startswith("]", place):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        if (end := skip_space(place + 1)) != len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; one list of objects") from None


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            many = Unreadable("has more cells than the header; quote cells that hold commas")
            yield reader.line_num, many if None in row else row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        rows = (row for batch in file.iter_batches(batch_size=BATCH) for row in batch.to_pylist())
        yield from enumerate(rows, 1)


def _unknown(path: Path) -> Iterator[tuple[int, Any]]:
    raise UserError(f"{path}: unknown kind of data file; known are {', '.join(_READERS)}")


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
