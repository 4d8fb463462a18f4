"""Read data files (JSONL, JSON, CSV, Parquet, Arrow) lazily, one record at a time.

The same rows give the same records in every type of file. No text or number is converted. A key whose value is null is
left out, since Parquet and Arrow store null for an absent key. Imports pyarrow only for its files: planning stays fast.
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import UserError

if TYPE_CHECKING:
    import pyarrow

Record = dict[str, Any]
"""One row of a file: column -> value."""

ARROW_BATCH = 256  # rows in memory at a time


MISSING = "is missing"


class BadRow(ValueError):
    """A row that cannot be used, with the column at fault (None for the row itself) and the reason."""

    def __init__(self, column: str | None, reason: str) -> None:
        super().__init__(reason)
        self.column = column
        self.reason = reason

    def describe(self, record: Any, columns: dict[str, str]) -> str:
        """Return the reason with the file's own name of the column, `columns[our name]`."""
        if self.column is None:
            return self.reason
        has = f"; the row has {', '.join(record) or 'no columns'}" if self.reason == MISSING else ""
        return f"column {columns.get(self.column, self.column)!r} {self.reason}{has}"


def read_rows(path: Path) -> Iterator[tuple[int, Record]]:
    """Yield what `read_file` does, but raise UserError for a bad row."""
    for number, row in read_file(path):
        if isinstance(row, BadRow):
            raise UserError(f"{path}:{number}: {row}")
        yield number, row


def read_file(path: Path, is_part: bool = False) -> Iterator[tuple[int, Record | BadRow]]:
    """Yield (line or row number from 1, record) for every row of a file, with BadRow for each that cannot be read.

    Raises UserError if the file as such cannot be read, or is empty, as one of several (`is_part`) can be.
    """
    reader, number = _READERS.get(path.suffix.lower()), 0
    if reader is None:
        raise UserError(f"{path}: unknown type of data file; use {', '.join(DATA_SUFFIXES)}")
    try:
        for number, row in reader(path):
            if isinstance(row, dict):
                try:
                    row = without_nulls(row)
                except RecursionError:
                    row = BadRow(None, "is nested too deep")
            elif not isinstance(row, BadRow):
                row = BadRow(None, f"is {type(row).__name__}, not an object with named columns")
            yield number, row
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except UserError:
        raise
    except Exception as error:  # of pyarrow and what it calls, of any type
        raise UserError(f"{path}: is not a valid {path.suffix} file: {error}") from None
    if not number and not is_part:
        raise UserError(f"{path}: has no rows; add at least one, or name another file")


_NESTED = (dict, list)


def without_nulls(value: Any) -> Any:
    """Remove the keys of objects whose value is None, at every depth; None in lists remains."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) if isinstance(part, _NESTED) else part for part in value]
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError if a key occurs twice, where Python would keep the last value only."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice!r} twice; remove one")
    return value


def _finite(text: str) -> float:
    """Parse a number of a JSON file. Raises ValueError for one beyond float64, and for `NaN` and `Infinity`."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number; write it as text, or remove it")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _DECODER.decode(line)
            except json.JSONDecodeError as error:
                row = BadRow(None, f"not valid JSON: {error.msg}; write one object per line")
            except (ValueError, RecursionError) as error:
                row = BadRow(None, f"not valid JSON: {error}")
            yield number, row


_LIST_START = re.compile(r"\s*(\[\s*(\]\s*)?)?")
_SEPARATOR = re.compile(r"\s*([,\]]?)\s*")


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Decode the items of the top-level list one by one, so that only the text is in memory; else read JSONL."""
    if _has_object_per_line(path):
        yield from _read_jsonl(path)
        return
    text = path.read_text(encoding="utf-8-sig")
    number, start = 0, _LIST_START.match(text)
    assert start  # as any text does
    position, is_open = start.end(), not start[2]
    try:
        if not start[1]:
            _DECODER.raw_decode(text, position)
            raise UserError(f"{path}: a .json data file must be one list of rows, or have one object per line")
        while is_open:
            row, position = _DECODER.raw_decode(text, position)
            number += 1
            yield number, row
            separator = _SEPARATOR.match(text, position)
            assert separator
            position, is_open = separator.end(), separator[1] == ","
            if not separator[1]:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if position != len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}; write one list of objects") from None
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, position) + 1
        raise UserError(f"{path}:{line}: not valid JSON: {error}") from None


def _has_object_per_line(path: Path) -> bool:
    """Whether the first line is an object."""
    with path.open(encoding="utf-8-sig") as file:
        line = next((line for line in file if line.strip()), "")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """Read cells as text. A row has the number of the line that it starts at."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] = []
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error:
                raise UserError(
                    f"{path}:{number}: in the row that starts here, a quoted cell is not closed, or text follows the"
                    " quote that closes it; write a quote inside a quoted cell twice"
                ) from None
            if cells is None:
                return
            if cells and not header:
                header = _header(f"{path}:{number}", cells)
            elif cells:
                wrong = f"has {len(cells)} cells, but the header has {len(header)}; quote cells that contain commas"
                yield number, dict(zip(header, cells)) if len(cells) == len(header) else BadRow(None, wrong)  # noqa: B905


def _header(place: str, names: list[str]) -> list[str]:
    """Return the column names of a CSV file, which must be different and not empty."""
    for name, count in Counter(names).items():
        if not name.strip():
            raise UserError(f"{place}: a column has no name; name it, or remove it (pandas writes one: index=False)")
        if count > 1:
            raise UserError(f"{place}: two columns have the name {name!r}; rename or remove one")
    return names


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _arrow_rows(file.schema_arrow, file.iter_batches(batch_size=ARROW_BATCH))


def _read_arrow(path: Path) -> Iterator[tuple[int, Any]]:
    """Read a stream or file of Arrow's IPC format."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            ipc_file = pyarrow.ipc.open_file(file)
            batches = map(ipc_file.get_batch, range(ipc_file.num_record_batches))
            yield from _arrow_rows(ipc_file.schema, map(_validated, batches))
        else:
            yield from _arrow_rows(stream.schema, map(_validated, stream))


def _validated(batch: "pyarrow.RecordBatch") -> "pyarrow.RecordBatch":
    """Check the offsets and lengths in a batch, which are used as they are in the file. Raises ValueError."""
    batch.validate(full=True)
    return batch


def _arrow_rows(schema: "pyarrow.Schema", batches: "Iterable[pyarrow.RecordBatch]") -> Iterator[tuple[int, Any]]:
    """Yield numbered rows: maps are objects, and datasets' feature Json is decoded."""
    import pyarrow

    if len(set(schema.names)) < len(schema.names):
        raise ValueError("two columns have the same name")
    json_fields = [field for field in schema if "arrow.json" in str(field.type)]
    slices = (batch.slice(start, ARROW_BATCH) for batch in batches for start in range(0, len(batch), ARROW_BATCH))
    rows = (row for part in slices for row in part.to_pylist(maps_as_pydicts="strict"))
    if json_fields:
        from stages.data.exact_json import Features

        features = Features.from_arrow_schema(pyarrow.schema(json_fields))
        rows = (row | features.decode_example({name: row[name] for name in features}) for row in rows)
    yield from enumerate(rows, 1)


_READERS = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
DATA_SUFFIXES = tuple(_READERS)
