"""Validate the value of one column: text, messages, tools, token ids or weights."""

import inspect
import json
import reprlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from stages.base import UserError
from stages.data.files import MISSING, BadRow, Record, read_rows, without_nulls

Item = TypeVar("Item")

Messages = list[dict[str, Any]]
"""Messages {"role": ..., "content": ...} with any further keys: tool_calls, name, weight."""
Text = str | Messages


def read_as(path: Path, convert: Callable[[Record, int], Item]) -> list[Item]:
    """Return `convert(row, number)` for every row of a file. Raises UserError, with file and line, for a bad row."""
    items = []
    for number, row in read_rows(path):
        try:
            items.append(convert(row, number))
        except BadRow as error:
            raise UserError(f"{path}:{number}: {error.describe(row, {})}") from None
    return items


def text(row: Record, column: str) -> str:
    """Return the column's text, which must not be blank."""
    value = _present(row, column)
    if not isinstance(value, str):
        raise BadRow(column, f"is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(column, "is empty; fill it or remove the row")
    return _without_surrogates(column, value)


def text_or_messages(row: Record, column: str) -> Text:
    return messages(row, column) if isinstance(row.get(column), list) else text(row, column)


def messages(row: Record, column: str) -> Messages:
    """Return the column's messages, at least one."""
    return [_message(column, value) for value in filled_list(row, column)]


def _message(column: str, value: Any) -> dict[str, Any]:
    """Check one message and join its content parts."""
    if not isinstance(value, dict) or "role" not in value or not {"content", "tool_calls"} & value.keys():
        raise BadRow(column, f"has {reprlib.repr(value)}; a message is an object with 'role' and 'content'")
    role, content = value["role"], value.get("content")
    if not isinstance(role, str) or not role:
        raise BadRow(column, f"has a message with the role {reprlib.repr(role)}; a role is text")
    if "weight" in value and not is_weight(value["weight"]):
        raise BadRow(column, f"has the weight {reprlib.repr(value['weight'])}; a message's weight is a number >= 0")
    calls = _objects(column, value.get("tool_calls"), "tool_calls")
    if isinstance(content, list):
        content = "".join(_part_text(column, part) for part in content)
    if not isinstance(content, str | None):
        raise BadRow(column, f"has a message of the {role} whose content is {type(content).__name__}, not text")
    if not (content or "").strip() and not (calls and role == "assistant"):
        raise BadRow(column, f"has a message of the {role} that is empty; fill it or remove the row")
    if others := {key: part for key, part in value.items() if key not in ("role", "content", "tool_calls")}:
        _objects(column, [others], "a message")
    return value | {"content": content and _without_surrogates(column, content)}


def _part_text(column: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise BadRow(column, f"has a message with a part of type {reprlib.repr(kind)}; only text is supported")


def template_arguments(row: Record) -> dict[str, Any]:
    """Return what the row passes to the chat template: `tools`, `documents` and `chat_template_kwargs`, where it has
    any. Each is a list of objects or an object, or the JSON of it."""
    lists = {name: _objects(name, _from_json(name, row.get(name)), name) for name in ("tools", "documents")}
    options = _from_json("chat_template_kwargs", row.get("chat_template_kwargs")) or None
    if not isinstance(options, dict | None):
        raise BadRow("chat_template_kwargs", f"is {type(options).__name__}, not an object of template variables")
    if options and (wrong := _render_arguments() & options.keys()):
        raise BadRow("chat_template_kwargs", f"sets {', '.join(sorted(wrong))}, which this project sets itself")
    return lists | {"chat_template_kwargs": options}


@cache
def _render_arguments() -> set[str]:
    """Return the arguments of transformers' apply_chat_template, which are no free variables of a template."""
    from transformers import PreTrainedTokenizerBase

    return {"messages", *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters}


def _from_json(column: str, value: Any) -> Any:
    """Decode a value that is JSON text; CSV has no other way to write lists and objects."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return without_nulls(json.loads(value))
    except (ValueError, RecursionError):
        raise BadRow(column, "is text, but not JSON; write a list or object, or its JSON") from None


def decode_messages(row: Record) -> Record:
    """Decode prompt and completion, or chosen and rejected, where both are the JSON of messages."""
    names = {"prompt", "completion", "chosen", "rejected"} & row.keys()
    decoded = {name: messages for name in names if (messages := _messages_from_json(row[name]))}
    required = names - {"prompt"} if "chosen" in names else names
    return row | decoded if decoded and required <= decoded.keys() else row


def _messages_from_json(value: Any) -> Messages | None:
    try:
        decoded = json.loads(value) if isinstance(value, str) and value.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    are_messages = decoded and all(isinstance(item, dict) and "role" in item for item in decoded)
    return without_nulls(decoded) if are_messages else None


def _objects(column: str, value: Any, name: str) -> list[Any] | None:
    """Check a list of JSON objects; None if it is absent or empty."""
    if value is None or value in ("", []):
        return None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRow(column, f"has {reprlib.repr(value)} as {name}; write a list of objects")
    try:
        serialized = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise BadRow(column, f"has {name} that JSON cannot write: {error}") from None
    _without_surrogates(column, serialized)
    return value


def weighted_tokens(row: Record) -> tuple[list[int], list[float]]:
    """Return `input_ids` and `loss_weights` of a pre-tokenised row: equally long, not empty, numbers >= 0."""
    ids, weights = filled_list(row, "input_ids"), filled_list(row, "loss_weights")
    if len(ids) != len(weights):
        raise BadRow(None, f"has {len(ids)} input_ids but {len(weights)} loss_weights; write one weight for each token")
    if invalid := [value for value in ids if type(value) is not int or not 0 <= value < 2**31]:
        raise BadRow("input_ids", f"has {reprlib.repr(invalid[0])}; a token id is an integer from 0 to 2147483647")
    if invalid := [value for value in weights if not is_weight(value)]:
        raise BadRow("loss_weights", f"has {reprlib.repr(invalid[0])}; a weight is a finite number >= 0")
    return ids, weights


def filled_list(row: Record, column: str) -> list[Any]:
    """Return the column's list, which must not be empty."""
    value = _from_json(column, _present(row, column))
    if not isinstance(value, list):
        raise BadRow(column, f"is {type(value).__name__}, not a list")
    if not value:
        raise BadRow(column, "is an empty list; fill it or remove the row")
    return value


MAX_WEIGHT = 3.4e38
"""The largest number of float32."""


def is_weight(value: Any) -> bool:
    """Whether `value` is a finite number >= 0."""
    return type(value) in (int, float) and 0 <= value <= MAX_WEIGHT


def _present(row: Record, column: str) -> Any:
    if column not in row:
        raise BadRow(column, MISSING)
    if row[column] is None:
        raise BadRow(column, "is empty; fill it or remove the row")
    return row[column]


def _without_surrogates(column: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(column, "has half a surrogate pair, which is not text; correct its \\u escapes") from None
    return value
