"""Records -> training rows: what the columns of every format mean.

The value of one column is left to stages.columns, whole files to stages.reading. Light by intent: a recipe's data is
checked before anything runs, so torch is not imported here.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stages.data.columns import BadRow, Messages, Text, filled_list, is_weight, messages, text, text_or_messages, tools
from stages.data.files import Record

EOS_MARKER = "###eos_token###"
"""What the paper's data sets write where the tokenizer's EOS token belongs."""

SPEAKERS = {
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


@dataclass(frozen=True)
class Example:
    """One instruction row: what the model is given, and what it shall answer."""

    prompt: Text
    completion: Text
    tools: list[Any] | None = None
    """Schemas of the tools that messages may call."""

    def columns(self) -> dict[str, Any]:
        """The row under the names that TRL's trainers read."""
        return {"prompt": self.prompt, "completion": self.completion} | _tools(self.tools)


@dataclass(frozen=True)
class Conversation:
    """A conversation of any number of turns, at least one of them the assistant's."""

    messages: Messages
    tools: list[Any] | None = None
    """Schemas of the tools that messages may call."""

    def columns(self) -> dict[str, Any]:
        """The row under the names that TRL's trainers read."""
        return {"messages": self.messages} | _tools(self.tools)


@dataclass(frozen=True)
class PlainText:
    """Text without a prompt, to be learnt as a whole."""

    text: str

    def columns(self) -> dict[str, Any]:
        """The row under the names that TRL's trainers read."""
        return {"text": self.text}


@dataclass(frozen=True)
class Tokens:
    """A row that was tokenised before, with its own weight on every token."""

    input_ids: list[int]
    loss_weights: list[float]
    """As long as `input_ids`, finite and not negative."""

    def columns(self) -> dict[str, Any]:
        """The row under the names that the trainer reads."""
        return {"input_ids": self.input_ids, "loss_weights": self.loss_weights}


@dataclass(frozen=True)
class Pair:
    """One preference row."""

    prompt: Text
    chosen: Text
    rejected: Text
    tools: list[Any] | None = None

    def columns(self) -> dict[str, Any]:
        """The row under the names that TRL's trainers read."""
        return {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected} | _tools(self.tools)


Row = Example | Conversation | PlainText | Tokens


def _tools(tools: list[Any] | None) -> dict[str, Any]:
    return {} if tools is None else {"tools": tools}


# --------------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True)
class Format:
    """One meaning of columns."""

    columns: tuple[str, ...]
    """All that it reads."""
    convert: Callable[[Record], Row]
    """Raises BadRow."""


class NoFormat(BadRow):
    """Columns that fit no format, so that those of the other rows will not either."""


def guess(row: Record) -> Callable[[Record], Row]:
    """The format that the row's columns speak of."""
    for columns, name in SIGNS:
        if row.keys() >= set(columns):
            return FORMATS[name].convert
    raise NoFormat(
        None,
        f"columns {', '.join(row)} fit no format; give prompt and completion, or messages, or conversations, or"
        " instruction, input and output, or text, or input_ids and loss_weights, or map the file's with columns",
    )


def _prompt_completion(row: Record) -> Example:
    prompt, completion = text_or_messages(row, "prompt"), text_or_messages(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise BadRow(None, "prompt and completion are not of one kind; make both text or both lists of messages")
    return Example(prompt, completion, None if isinstance(prompt, str) else tools(row))


def _messages(row: Record) -> Conversation:
    return _conversation("messages", messages(row, "messages"), row)


def _sharegpt(row: Record) -> Conversation:
    turns = _turns(row)
    if row.get("system"):
        if turns[0]["role"] == "system":
            raise BadRow("system", "is a second system message beside the conversation's own; keep one of them")
        turns = [{"role": "system", "content": row["system"]}, *turns]
    return _conversation("conversations", messages({"conversations": turns}, "conversations"), row)


def _turns(row: Record) -> list[dict[str, Any]]:
    """The turns as messages; of mere texts, as LIMA's, the user's and the assistant's alternate."""
    turns = filled_list(row, "conversations")
    if not all(isinstance(turn, str) for turn in turns):
        return [_turn(turn) for turn in turns]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _turn(turn: Any) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
        raise BadRow(
            "conversations",
            f"holds {reprlib.repr(turn)}; a turn is an object with 'from' and 'value'"
            " (for 'role' and 'content' write columns: {messages: ...})",
        )
    if turn["from"] not in list(SPEAKERS):
        raise BadRow(
            "conversations", f"holds a turn from {reprlib.repr(turn['from'])}; known are {', '.join(SPEAKERS)}"
        )
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"]} | rest


def _conversation(column: str, turns: Messages, row: Record) -> Conversation:
    if not any(message["role"] == "assistant" for message in turns):
        raise BadRow(column, "holds no assistant message, so there is nothing to learn; remove the row")
    return Conversation(turns, tools(row))


def _alpaca(row: Record) -> Example:
    user, assistant = _alpaca_texts(row)
    system = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    prompt = [*system, {"role": "user", "content": user}]
    return Example(prompt, [{"role": "assistant", "content": assistant}], tools(row))


def _alpaca_texts(row: Record) -> tuple[str, str]:
    """The instruction with its input beneath, and the output."""
    instruction, context = text(row, "instruction"), row.get("input") or ""
    if not isinstance(context, str):
        raise BadRow("input", f"is {type(context).__name__}, not text")
    return (f"{instruction}\n\n{context}" if context else instruction), text(row, "output")


def _official(row: Record) -> Example:
    """The text rule of the paper's scripts: prompt less one trailing space, a space, the response."""
    if "instruction" in row:
        prompt, response = _alpaca_texts(row)
    elif "conversations" in row:
        turns = messages({"conversations": _turns(row)}, "conversations")
        prompt, response = _one_turn("conversations", turns), turns[-1]["content"]
    else:
        prompt, response = text(row, "prompt"), text(row, "response" if "response" in row else "completion")
    return Example(prompt.removesuffix(" "), " " + response.removesuffix(EOS_MARKER))


def _one_turn(column: str, turns: Messages) -> str:
    """What the user asks in a conversation of one question and one answer."""
    if [turn["role"] for turn in turns] != ["user", "assistant"]:
        raise BadRow(
            column, f"holds {len(turns)} turns; the official rule knows one of the user and then one of the assistant"
        )
    return turns[0]["content"]


def _plain(row: Record) -> PlainText:
    return PlainText(text(row, "text"))


def _tokens(row: Record) -> Tokens:
    ids, weights = filled_list(row, "input_ids"), filled_list(row, "loss_weights")
    if len(ids) != len(weights):
        raise BadRow(None, f"input_ids has {len(ids)} items and loss_weights {len(weights)}; give every token a weight")
    for name, values, fits, kind in (
        ("input_ids", ids, lambda value: type(value) is int and value >= 0, "token id, a whole number"),
        ("loss_weights", weights, is_weight, "weight, a number"),
    ):
        if wrong := [value for value in values if not fits(value)]:
            raise BadRow(name, f"holds {reprlib.repr(wrong[0])}, which is no {kind} >= 0")
    return Tokens(ids, weights)


def pair(row: Record) -> Pair:
    """A preference row. Whole conversations that begin alike hold their prompt themselves, whatever `prompt` says."""
    if _holds_its_prompt(row):
        parts = _split_prompt(messages(row, "chosen"), messages(row, "rejected"))
    else:
        parts = {name: text_or_messages(row, name) for name in ("prompt", "chosen", "rejected")}
    if len({isinstance(part, str) for part in parts.values()}) > 1:
        raise BadRow(None, "prompt, chosen and rejected are not of one kind; make all text or all lists of messages")
    if parts["chosen"] == parts["rejected"]:
        raise BadRow(None, "chosen and rejected are the same, so the pair prefers nothing; remove it")
    given = tools(row) if isinstance(parts["prompt"], list) else None
    return Pair(parts["prompt"], parts["chosen"], parts["rejected"], given)


def _holds_its_prompt(row: Record) -> bool:
    """Whether chosen and rejected are conversations of several messages, and there are no messages as prompt."""
    answers = [row.get(name) for name in ("chosen", "rejected")]
    several = all(isinstance(answer, list) and len(answer) > 1 for answer in answers)
    return several and isinstance(row.get("prompt"), str | None)


def _split_prompt(chosen: Messages, rejected: Messages) -> dict[str, Text]:
    """The messages that both conversations begin with, and what follows in each, which is the assistant's last turn at
    least."""
    alike = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        alike += 1
    if not alike:
        raise BadRow(None, "chosen and rejected begin with different messages; they answer the same prompt")
    return {"prompt": chosen[:alike], "chosen": chosen[alike:], "rejected": rejected[alike:]}


def official_pair(row: Record) -> Pair:
    """A preference row by the text rule of the paper's scripts."""
    found = pair(row)
    texts: list[Text] = [found.prompt, found.chosen, found.rejected]
    if isinstance(found.prompt, list):
        whole = {name: [*found.prompt, *getattr(found, name)] for name in ("chosen", "rejected")}
        prompts = [_one_turn(name, turns) for name, turns in whole.items()]
        texts = [prompts[0], *(turns[-1]["content"] for turns in whole.values())]
    prompt, chosen, rejected = map(str, texts)
    prompt = prompt.removesuffix(" ")
    return Pair(prompt, " " + chosen.removesuffix(EOS_MARKER), " " + rejected.removesuffix(EOS_MARKER))


FORMATS = {
    "prompt_completion": Format(("prompt", "completion", "tools"), _prompt_completion),
    "messages": Format(("messages", "tools"), _messages),
    "text": Format(("text",), _plain),
    "alpaca": Format(("instruction", "input", "output", "system", "tools"), _alpaca),
    "sharegpt": Format(("conversations", "system", "tools"), _sharegpt),
    "tokens": Format(("input_ids", "loss_weights"), _tokens),
    "official": Format(
        ("prompt", "response", "completion", "instruction", "input", "output", "conversations"), _official
    ),
}
"""The values of `data.format` besides `auto`."""


def columns_of(formats: Iterable[str]) -> set[str]:
    """All columns that the formats read."""
    return {column for name in formats for column in FORMATS[name].columns}


PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools")
"""All that preference rows are read from."""

SIGNS = (
    (("prompt", "completion"), "prompt_completion"),
    (("messages",), "messages"),
    (("conversations",), "sharegpt"),
    (("instruction",), "alpaca"),
    (("prompt",), "prompt_completion"),
    (("completion",), "prompt_completion"),
    (("input_ids", "loss_weights"), "tokens"),
    (("text",), "text"),
)
"""The columns by which `auto` knows a format; the first that a row has all of decides."""
