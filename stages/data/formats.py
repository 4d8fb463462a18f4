"""Convert records to training rows: the meaning of the columns of every `data.format`.

Imports no torch: recipes are checked before anything runs.
"""

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import takewhile
from typing import Any

from stages.data.columns import (
    Messages,
    Text,
    filled_list,
    messages,
    template_arguments,
    text,
    text_or_messages,
    weighted_tokens,
)
from stages.data.files import BadRow, Record

EOS_MARKER = "###eos_token###"  # in the paper's data sets, where the tokenizer's EOS token belongs

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` -> the role of a message."""


class TrainingRow:
    """A row whose fields have the column names that the trainers read."""

    def columns(self) -> dict[str, Any]:
        """Return the row as a mapping, without the columns that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TemplateRow(TrainingRow):
    """A row with arguments of the chat template."""

    tools: list[Any] | None = None
    """JSON schemas of callable tools."""
    documents: list[Any] | None = None
    """Documents to answer from."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further variables of the template, such as `enable_thinking`."""


TEMPLATE_COLUMNS = tuple(field.name for field in fields(TemplateRow))


@dataclass(frozen=True)
class Example(TemplateRow):
    """A prompt and the completion that the model should write."""

    prompt: Text
    completion: Text


@dataclass(frozen=True)
class Conversation(TemplateRow):
    """A conversation of any length, with at least one assistant message."""

    messages: Messages


@dataclass(frozen=True)
class PlainText(TrainingRow):
    """Text without a prompt."""

    text: str


@dataclass(frozen=True)
class Tokens(TrainingRow):
    """A pre-tokenised row with a weight, finite and >= 0, for each token."""

    input_ids: list[int]
    loss_weights: list[float]


@dataclass(frozen=True)
class Pair(TemplateRow):
    """A preference row."""

    prompt: Text
    chosen: Text
    rejected: Text


Row = Example | Conversation | PlainText | Tokens


@dataclass(frozen=True)
class Format:
    """A value of `data.format`: the columns it reads and their conversion, which raises BadRow."""

    columns: tuple[str, ...]
    convert: Callable[[Record], TrainingRow]


class UnknownFormat(BadRow):
    """Columns that fit no format; the file's other rows will not fit either."""


def detect_format(row: Record) -> Format:
    """Return the format that the row's columns fit."""
    for columns, name in FORMAT_BY_COLUMNS:
        if row.keys() >= set(columns):
            return FORMATS[name]
    raise UnknownFormat(
        None,
        f"columns {', '.join(row)} fit no format; rows need prompt and completion, or messages, or conversations, or"
        " instruction, input and output, or text, or input_ids and loss_weights; set data.columns to map other names",
    )


def _prompt_completion(row: Record) -> Example:
    prompt, completion = text_or_messages(row, "prompt"), text_or_messages(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise BadRow(None, "prompt and completion mix text and messages; write both in the same way")
    return Example(prompt, completion, **({} if isinstance(prompt, str) else template_arguments(row)))


def _conversation(row: Record, column: str = "messages") -> Conversation:
    turns = messages(row, column)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise BadRow(column, "has no assistant message, so there is nothing to learn; remove the row")
    return Conversation(turns, **template_arguments(row))


def _sharegpt(row: Record) -> Conversation:
    turns = _sharegpt_turns(row)
    if row.get("system"):
        if turns[0]["role"] == "system":
            raise BadRow("system", "is a second system message; the conversation already has one; keep one of them")
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return _conversation(row | {"conversations": turns}, "conversations")


def _sharegpt_turns(row: Record) -> list[dict[str, Any]]:
    """Return the turns as messages; turns that are plain text, as in LIMA, alternate between user and assistant."""
    turns = filled_list(row, "conversations")
    if not all(isinstance(turn, str) for turn in turns):
        return [_sharegpt_message(turn) for turn in turns]
    return [{"role": _TURNS[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _sharegpt_message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise BadRow(
            "conversations",
            f"has {reprlib.repr(turn)}; a turn is an object with 'from' and 'value'"
            " (for 'role' and 'content' write columns: {messages: ...})",
        )
    if turn["from"] not in list(SHAREGPT_ROLES):
        raise BadRow(
            "conversations", f"has a turn from {reprlib.repr(turn['from'])}; use one of {', '.join(SHAREGPT_ROLES)}"
        )
    extra = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} | extra


def _alpaca(row: Record) -> Example:
    user, assistant = _alpaca_texts(row)
    system = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    prompt = [*system, *_alpaca_history(row), {"role": "user", "content": user}]
    return Example(prompt, [{"role": "assistant", "content": assistant}], **template_arguments(row))


def _alpaca_history(row: Record) -> Messages:
    """Return the earlier exchanges in `history`, pairs of instruction and response, as messages of the prompt."""
    exchanges = row.get("history") or []
    if not isinstance(exchanges, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in exchanges):
        raise BadRow("history", "is not a list of pairs [instruction, response]")
    turns = [{"role": role, "content": turn} for pair in exchanges for role, turn in zip(_TURNS, pair, strict=True)]
    return messages({"history": turns}, "history") if turns else []


_TURNS = ("user", "assistant")


def _alpaca_texts(row: Record) -> tuple[str, str]:
    """Return the instruction, with its input below, and the output."""
    instruction, context = text(row, "instruction"), row.get("input") or ""
    if not isinstance(context, str):
        raise BadRow("input", f"is {type(context).__name__}, not text")
    return (f"{instruction}\n\n{context}" if context else instruction), text(row, "output")


def _official(row: Record) -> Example:
    """Apply the text rule of the paper's scripts: move one trailing space of the prompt to the response, or add one."""
    if "instruction" in row:
        prompt, response = _alpaca_texts(row)
    elif "conversations" in row:
        turns = messages({"conversations": _sharegpt_turns(row)}, "conversations")
        prompt, response = _exchange("conversations", turns)
    else:
        prompt, response = text(row, "prompt"), text(row, "response" if "response" in row else "completion")
    return Example(prompt.removesuffix(" "), _official_response(response))


def _official_response(response: str) -> str:
    return " " + response.removesuffix(EOS_MARKER)


def _exchange(column: str, turns: list[Any]) -> tuple[str, str]:
    """Return question and answer of a conversation that has one of each."""
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise BadRow(
            column,
            f"has {len(turns)} turns; format: official needs exactly one of the user and then one of the assistant",
        )
    return turns[0]["content"], turns[1]["content"]


def _pair(row: Record) -> Pair:
    """Convert a preference row. If chosen and rejected are complete conversations, their shared start is the prompt."""
    answers = [row.get("chosen"), row.get("rejected")]
    are_conversations = all(isinstance(answer, list) and len(answer) > 1 for answer in answers)
    if are_conversations and isinstance(row.get("prompt"), str | None):
        parts = _split_prompt(messages(row, "chosen"), messages(row, "rejected"))
    else:
        parts = {name: text_or_messages(row, name) for name in ("prompt", "chosen", "rejected")}
    if len({isinstance(part, str) for part in parts.values()}) > 1:
        raise BadRow(None, "prompt, chosen and rejected mix text and messages; write all in the same way")
    if parts["chosen"] == parts["rejected"]:
        raise BadRow(None, "chosen and rejected are the same; remove the row")
    prompt, chosen, rejected = parts.values()
    return Pair(prompt, chosen, rejected, **(template_arguments(row) if isinstance(prompt, list) else {}))


def _split_prompt(chosen: Messages, rejected: Messages) -> dict[str, Text]:
    """Split off the messages that both conversations start with; at least the last message of each remains."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if not shared:
        raise BadRow(None, "chosen and rejected start with different messages; both must answer the same prompt")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _official_pair(row: Record) -> Pair:
    """Convert a preference row by the text rule of the paper's scripts."""
    pair = _pair(row)
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if isinstance(pair.prompt, list):
        prompt, chosen = _exchange("chosen", [*pair.prompt, *chosen])
        _, rejected = _exchange("rejected", [*pair.prompt, *rejected])
    return Pair(str(prompt).removesuffix(" "), _official_response(str(chosen)), _official_response(str(rejected)))


FORMATS = {
    "prompt_completion": Format(("prompt", "completion", *TEMPLATE_COLUMNS), _prompt_completion),
    "messages": Format(("messages", *TEMPLATE_COLUMNS), _conversation),
    "text": Format(("text",), lambda row: PlainText(text(row, "text"))),
    "alpaca": Format(("instruction", "input", "output", "history", "system", *TEMPLATE_COLUMNS), _alpaca),
    "sharegpt": Format(("conversations", "system", *TEMPLATE_COLUMNS), _sharegpt),
    "tokens": Format(("input_ids", "loss_weights"), lambda row: Tokens(*weighted_tokens(row))),
    "official": Format(
        ("prompt", "response", "completion", "instruction", "input", "output", "conversations"), _official
    ),
}
"""The values of `data.format` except `auto`."""

PAIR = Format(("prompt", "chosen", "rejected", *TEMPLATE_COLUMNS), _pair)
OFFICIAL_PAIR = Format(PAIR.columns, _official_pair)

FORMAT_BY_COLUMNS = (
    (("prompt", "completion"), "prompt_completion"),
    (("messages",), "messages"),
    (("conversations",), "sharegpt"),
    (("instruction",), "alpaca"),
    (("prompt",), "prompt_completion"),
    (("completion",), "prompt_completion"),
    (("input_ids", "loss_weights"), "tokens"),
    (("text",), "text"),
)
"""How `auto` detects a format: the first entry whose columns the row has."""


def columns_of(formats: Iterable[str]) -> set[str]:
    """Return all columns that the formats read."""
    return {column for name in formats for column in FORMATS[name].columns}
