"""Files -> training rows: reads JSONL, JSON, CSV and Parquet, knows the column formats, names every bad row.

Light by intent: a recipe's data is checked before anything runs, so torch and datasets are not imported here.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stages.base import BadInput

Text = str | list[dict[str, Any]]
"""Plain text, or a conversation: a list of messages {"role": ..., "content": ...}."""

SHOWN = 10
"""How many bad rows an error lists before it counts the rest."""

EOS_MARKER = "###eos_token###"
"""What the paper's data sets write where the tokenizer's EOS token belongs."""


@dataclass(frozen=True)
class Example:
    """One instruction row. A row of plain text has no prompt: all of it is completion."""

    prompt: Text
    completion: Text

    def columns(self) -> dict[str, Text]:
        """The row under the names that TRL's trainers read."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Pair:
    """One preference row."""

    prompt: Text
    chosen: Text
    rejected: Text

    def columns(self) -> dict[str, Text]:
        """The row under the names that TRL's trainers read."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}


class BadRow(ValueError):
    """Why one row cannot be used."""


def read_examples(path: Path, format: str) -> list[Example]:
    """All rows of `path` as instruction rows. Raises BadInput naming file, row, column and remedy."""
    rows = list(read_rows(path))
    how = _guess(path, rows[0][1]) if format == "auto" else format
    return _convert(path, rows, lambda row: _example(row, how))


def read_pairs(path: Path, format: str, rejected: Literal["column", "other_row"], seed: int) -> list[Pair]:
    """All rows of `path` as preference rows; `other_row` makes pairs of instruction rows. Raises BadInput."""
    if rejected == "column":
        return _convert(path, list(read_rows(path)), _pair)
    return _pair_up(path, read_examples(path, format), seed)


def _pair_up(path: Path, examples: list[Example], seed: int) -> list[Pair]:
    """Each row's own completion against another row's that differs, drawn by `seed`."""
    completions = [example.completion for example in examples]
    if all(completion == completions[0] for completion in completions):
        raise BadInput(f"{path}: rejected: other_row needs rows with different completions")
    draw = random.Random(seed)
    pairs = []
    for example in examples:
        other = draw.choice(completions)
        while other == example.completion:
            other = draw.choice(completions)
        pairs.append(Pair(example.prompt, example.completion, other))
    return pairs


def _convert(path: Path, rows: list[tuple[int, dict[str, Any]]], convert: Any) -> list[Any]:
    """Every row converted; all bad rows in one error."""
    good, bad = [], []
    for number, row in rows:
        try:
            good.append(convert(row))
        except BadRow as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        more = [f"and {len(bad) - SHOWN} more rows like these"] if len(bad) > SHOWN else []
        raise BadInput("\n".join([*bad[:SHOWN], *more]))
    styles = {isinstance(text, str) for row in good for text in row.columns().values()}
    if len(styles) > 1:
        raise BadInput(f"{path}: some rows are plain text and others are messages; keep each kind in its own file")
    return good


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or row number from 1, row) for every row of the file; at least one. Raises BadInput."""
    empty = True
    for number, row in _read(path):
        if not isinstance(row, dict):
            raise BadInput(f"{path}:{number}: a row is an object with named columns, found {type(row).__name__}")
        empty = False
        yield number, row
    if empty:
        raise BadInput(f"{path}: holds no rows; give it at least one, or name another file")


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """The rows as the file's kind is read; whatever it cannot be read for is BadInput."""
    try:
        yield from _READERS.get(path.suffix.lower(), _unknown)(path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeError:
        raise BadInput(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except (csv.Error, ValueError, RecursionError) as error:  # pyarrow's errors are ValueErrors
        raise BadInput(f"{path}: is no valid {path.suffix} file: {error}") from None


def _jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise BadInput(f"{path}:{number}: not valid JSON: {error.msg}; one object per line") from None


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}:{error.lineno}: not valid JSON: {error.msg}; one list of objects") from None
    if not isinstance(rows, list):
        raise BadInput(f"{path}: a .json data file holds one list of rows; for one row per line use .jsonl")
    yield from enumerate(rows, 1)


def _csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                raise BadInput(
                    f"{path}:{reader.line_num}: has more cells than the header; quote cells that hold commas"
                )
            yield reader.line_num, row


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)


def _unknown(path: Path) -> Iterator[tuple[int, Any]]:
    raise BadInput(f"{path}: unknown kind of data file; known are {', '.join(_READERS)}")


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _guess(path: Path, row: dict[str, Any]) -> str:
    """The format that the first row's columns speak of."""
    if "prompt" in row or "completion" in row:
        return "prompt_completion"
    if "instruction" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    raise BadInput(
        f"{path}:1: columns {', '.join(row)} fit no format; give prompt and completion, or instruction, input and"
        " output, or text"
    )


def _example(row: dict[str, Any], how: str) -> Example:
    if how == "text":
        return Example("", _text(row, "text"))
    if how == "prompt_completion":
        prompt, completion = _content(row, "prompt"), _content(row, "completion")
        if isinstance(prompt, str) != isinstance(completion, str):
            raise BadRow("prompt and completion are not of one kind; make both text or both lists of messages")
        return Example(prompt, completion)
    if how == "alpaca":
        user, assistant = _alpaca(row)
        return Example([{"role": "user", "content": user}], [{"role": "assistant", "content": assistant}])
    return _official(row)


def _alpaca(row: dict[str, Any]) -> tuple[str, str]:
    """The instruction with its input beneath, and the output."""
    instruction, context = _text(row, "instruction"), row.get("input") or ""
    if not isinstance(context, str):
        raise BadRow(f"column 'input' is {type(context).__name__}, not text")
    return (f"{instruction}\n\n{context}" if context else instruction), _text(row, "output")


def _official(row: dict[str, Any]) -> Example:
    """The text rule of the paper's scripts: prompt less one trailing space, a space, the response."""
    if "instruction" in row:
        prompt, response = _alpaca(row)
    else:
        prompt, response = _text(row, "prompt"), _text(row, "response" if "response" in row else "completion")
    return Example(prompt.removesuffix(" "), " " + response.removesuffix(EOS_MARKER))


def _pair(row: dict[str, Any]) -> Pair:
    pair = Pair(_content(row, "prompt"), _content(row, "chosen"), _content(row, "rejected"))
    if len({isinstance(text, str) for text in pair.columns().values()}) > 1:
        raise BadRow("prompt, chosen and rejected are not of one kind; make all text or all lists of messages")
    if pair.chosen == pair.rejected:
        raise BadRow("chosen and rejected are the same, so the pair prefers nothing; remove it")
    return pair


def _text(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        raise BadRow(f"column {column!r} is missing{_has(row)}")
    if not isinstance(value, str):
        raise BadRow(f"column {column!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"column {column!r} is empty; fill it or remove the row")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRow(f"column {column!r} holds half a surrogate pair, which is no text; mend its \\u escapes")
    return value


def _content(row: dict[str, Any], column: str) -> Text:
    """Text, or a non-empty list of messages."""
    value = row.get(column)
    if not isinstance(value, list):
        return _text(row, column)
    if not value:
        raise BadRow(f"column {column!r} holds no message; fill it or remove the row")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(f"column {column!r}: a message is an object with 'role' and 'content', found {message!r}")
        if not isinstance(message["role"], str):
            raise BadRow(f"column {column!r}: a message's role is text, found {message['role']!r}")
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise BadRow(f"column {column!r}: the {message['role']} message is empty; fill it or remove the row")
    return value


def _has(row: dict[str, Any]) -> str:
    return f"; the row has {', '.join(map(str, row))}" if row else "; the row is empty"
