"""The value of one column -> text, messages, token ids or weights; or why it is none."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from stages.base import UserError
from stages.data.files import Record, read_rows

Made = TypeVar("Made")

Messages = list[dict[str, Any]]
"""Messages {"role": ..., "content": ...}, with whatever else theirs carry: tool_calls, name, weight."""
Text = str | Messages

MISSING = "is missing"


class BadRow(ValueError):
    """Why one row cannot be used."""

    def __init__(self, column: str | None, reason: str) -> None:
        super().__init__(reason)
        self.column = column
        """Our name of the column at fault; None where it is the whole row."""
        self.reason = reason

    def told(self, record: Any, columns: dict[str, str]) -> str:
        """The reason for people, who know the column by the file's name, `columns[ours]`."""
        if self.column is None:
            return self.reason
        has = f"; the row has {', '.join(record) or 'no columns'}" if self.reason == MISSING else ""
        return f"column {columns.get(self.column, self.column)!r} {self.reason}{has}"


def read_as(path: Path, make: Callable[[Record, int], Made]) -> list[Made]:
    """What `make` makes of every row of a file and its number. Raises UserError, with file and line for a BadRow."""
    made = []
    for number, row in read_rows(path):
        try:
            made.append(make(row, number))
        except BadRow as error:
            raise UserError(f"{path}:{number}: {error.told(row, {})}") from None
    return made


def text(row: Record, column: str) -> str:
    """Text that is not blank."""
    value = _present(row, column)
    if not isinstance(value, str):
        raise BadRow(column, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(column, "is empty; fill it or remove the row")
    return _no_surrogates(column, value)


def text_or_messages(row: Record, column: str) -> Text:
    """Text that is not blank, or messages."""
    return messages(row, column) if isinstance(row.get(column), list) else text(row, column)


def messages(row: Record, column: str) -> Messages:
    """At least one message."""
    return [_message(column, value) for value in filled_list(row, column)]


def _message(column: str, value: Any) -> dict[str, Any]:
    """A message with its content as one text; what it carries besides is kept, but for the None of Parquet's gaps."""
    if not isinstance(value, dict) or "role" not in value or not {"content", "tool_calls"} & value.keys():
        raise BadRow(column, f"holds {reprlib.repr(value)}; a message is an object with 'role' and 'content'")
    role, content = value["role"], value.get("content")
    if not isinstance(role, str) or not role:
        raise BadRow(column, f"holds a message with the role {reprlib.repr(role)}; a role is text")
    kept = {key: part for key, part in value.items() if part is not None}
    if "weight" in kept and not is_weight(kept["weight"]):
        raise BadRow(column, f"holds the weight {reprlib.repr(kept['weight'])}; a message's weight is a number >= 0")
    calls = _objects(column, kept.get("tool_calls"), "tool_calls")
    if isinstance(content, list):
        content = "".join(_part(column, part) for part in content)
    if not isinstance(content, str | None):
        raise BadRow(column, f"holds a message of the {role} whose content is {type(content).__name__}, not text")
    if not (content or "").strip() and not (calls and role == "assistant"):
        raise BadRow(column, f"holds a message of the {role} that is empty; fill it or remove the row")
    return kept | {"role": role, "content": content and _no_surrogates(column, content)}


def _part(column: str, part: Any) -> str:
    """The text of one part of a message's content."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadRow(column, f"holds a message with a part of type {reprlib.repr(kind)}; content is only text")


def tools(row: Record) -> list[Any] | None:
    """The schemas in the column `tools`, as a list or as JSON; None where there are none."""
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow("tools", "is text, but no JSON; give a list of objects, or its JSON") from None
    return _objects("tools", value, "tools")


def _objects(column: str, value: Any, name: str) -> list[Any] | None:
    """A list of objects that JSON can hold; None where it is absent or empty."""
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise BadRow(column, f"holds {reprlib.repr(value)} as {name}; give a list of objects")
    try:
        written = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadRow(column, f"holds {name} that JSON cannot write: {error}") from None
    _no_surrogates(column, written)
    return value


def filled_list(row: Record, column: str) -> list[Any]:
    """A list of at least one thing."""
    value = _present(row, column)
    if not isinstance(value, list):
        raise BadRow(column, f"is {type(value).__name__}, not a list")
    if not value:
        raise BadRow(column, "is an empty list; fill it or remove the row")
    return value


def is_weight(value: Any) -> bool:
    """Whether it is a finite number, not negative."""
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _present(row: Record, column: str) -> Any:
    if column not in row:
        raise BadRow(column, MISSING)
    if row[column] is None:
        raise BadRow(column, "is empty; fill it or remove the row")
    return row[column]


def _no_surrogates(column: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(column, "holds half a surrogate pair, which is no text; mend its \\u escapes") from None
    return value
