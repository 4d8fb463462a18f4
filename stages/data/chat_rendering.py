"""Render a row to text, with the segment and the weight multiplier of every character.

The chat template renders the complete conversation once, and messages are located by character positions in that text.
So a token that spans a message boundary is seen and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.data.segments import Segment

_PRIVATE_USE = range(0xF0000, 0x110000)  # characters that mark each message's content in a second rendering

Message = dict[str, Any]


class RenderError(ValueError):
    """A row that cannot be rendered."""


class Span(NamedTuple):
    """The characters of one message's content."""

    message: int
    start: int
    end: int


@dataclass
class Rendered:
    """A text with the Segment (int8) and the weight multiplier (float32) of each character.

    A row that cannot be rendered has an empty text and a `problem`.
    """

    text: str
    problem: str = ""
    segments: numpy.ndarray = field(init=False)
    weight_multipliers: numpy.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.segments = numpy.full(len(self.text), Segment.TEMPLATE, dtype=numpy.int8)
        self.weight_multipliers = numpy.ones(len(self.text), dtype=numpy.float32)

    def mark(self, start: int, end: int, segment: Segment, weight_multiplier: float = 1.0) -> None:
        """Set the segment and multiplier of the characters from `start` up to `end`."""
        self.segments[start:end] = segment
        self.weight_multipliers[start:end] = weight_multiplier


def render_text(prompt: str, completion: str, eos: str, segment: Segment = Segment.COMPLETION) -> Rendered:
    """Concatenate plain text of prompt and completion, and add the EOS token if it is not there yet."""
    rendered = Rendered(prompt + completion + ("" if eos and completion.endswith(eos) else eos))
    rendered.mark(0, len(prompt), Segment.PROMPT)
    rendered.mark(len(prompt), len(rendered.text), segment)
    return rendered


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    targets: Sequence[int],
    options: dict[str, Any] | None = None,
    to_the_end: bool = False,
    headers: dict[str, int] | None = None,
) -> Rendered:
    """Render a conversation with the chat template and mark the target messages as completion.

    A target starts where the text stops matching the prompt that the model would get, and ends where the next message
    starts.

    Args:
        targets: indices of the messages to learn.
        options: arguments of the template, such as `tools`.
        to_the_end: extend the first target to the end of the text.
        headers: a cache that saves a rendering per row: text between two messages -> the part of it, in characters,
            that belongs to the prompt.

    Raises:
        RenderError: the template refuses the conversation, or writes a turn differently once others follow.
    """
    weights = [1.0 if m.get("weight") is None else float(m["weight"]) for m in messages]
    if not all(0 <= weight < float("inf") for weight in weights):
        raise RenderError("has a message whose weight is not a finite number >= 0")
    clean = [{key: value for key, value in m.items() if key != "weight" and value is not None} for m in messages]
    chat = Chat(tokenizer, clean, options or {})
    text = chat.render(len(clean))
    chat.refuse_unwritten(text)
    rendered = Rendered(text)
    regions = targets[:1] if to_the_end else targets
    spans = chat.content_spans([index for index in range(len(clean)) if index not in regions or index == 0], text)
    for index, start, end in spans:
        is_system = clean[index]["role"] in ("system", "developer")
        rendered.mark(start, end, Segment.SYSTEM if is_system else Segment.PROMPT, weights[index])
    last_end = 0
    for index in regions:
        start = chat.turn_start(index, text, spans, headers if not options else None)
        end = len(text) if to_the_end or index + 1 == len(clean) else chat.turn_end(index, text, start)
        earliest = max((span.end for span in spans if span.message < index), default=0)
        if start < max(last_end, earliest) or end <= start:
            raise RenderError(
                f"the chat template writes message {index + 1}, or earlier ones, differently once others follow, so"
                " its position is unknown; remove the row, or try turns: last"
            )
        if re.split(r"[\s>]", _words(clean[index]))[-1] not in text[start:end]:  # templates may remove reasoning
            raise RenderError(f"the chat template leaves out the words of message {index + 1}")
        rendered.mark(start, end, Segment.COMPLETION, weights[index])
        last_end = end
    for index, start, end in spans if to_the_end else ():
        if index in targets[1:]:
            rendered.mark(start, end, Segment.COMPLETION, weights[index])
    return rendered


def target_turns(messages: Sequence[Message], turns: str) -> list[int]:
    """Return the indices of all assistant messages, or of the `last` one."""
    indices = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return indices[-1:] if turns == "last" else indices


@dataclass(frozen=True)
class Chat:
    """Messages and the chat template that renders them. `text` is the rendering of the complete conversation."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    options: dict[str, Any]

    def render(self, count: int, prompted: bool = False) -> str:
        """Render the first `count` messages, with the generation prompt if `prompted`. Raises RenderError."""
        try:
            options = self.options
            if isinstance(options.get("tools"), str):
                options = options | {"tools": json.loads(options["tools"])}
            return str(
                self.tokenizer.apply_chat_template(
                    self.messages[:count], tokenize=False, add_generation_prompt=prompted, **options
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RenderError(f"the chat template refuses the conversation: {error}") from None

    def refuse_unwritten(self, text: str) -> None:
        """Raise RenderError if the template ignores the tools or the tool calls."""
        without: dict[str, Chat] = {}
        if any(message.get("tool_calls") for message in self.messages):
            silent = [{"content": ""} | {k: v for k, v in m.items() if k != "tool_calls"} for m in self.messages]
            without["tool_calls"] = replace(self, messages=silent)
        if self.options.get("tools"):
            without["tools"] = replace(self, options={k: v for k, v in self.options.items() if k != "tools"})
        for key, chat in without.items():
            if chat.render_or_none() == text:
                raise RenderError(
                    f"has {key}, which the model's chat template ignores; remove them, or use a model whose template"
                    " writes them"
                )

    def render_or_none(self) -> str | None:
        """Render all messages; None if the template refuses them."""
        try:
            return self.render(len(self.messages))
        except RenderError:
            return None

    def turn_start(self, index: int, text: str, spans: list[Span], headers: dict[str, int] | None) -> int:
        """Find where the answer starts: where `text` stops matching the model's prompt; -1 if unknown."""
        header = _header(self.messages, index, text)
        if header and headers is not None and header[0] in headers:
            return header[1] + headers[header[0]]
        if index == 0:
            return next((span.start for span in spans if span.message == 0), -1)
        prompt = self.render(index, prompted=True)
        if text.startswith(prompt):
            start = len(prompt)
        else:  # the template writes earlier messages differently; compare only what follows their last words
            words = _words(self.messages[index - 1])
            words_end = next((span.end for span in spans if span.message == index - 1), None)
            if not words or words not in prompt or words_end is None:
                return _shared_length(prompt, text)
            start = words_end + _shared_length(prompt[prompt.rindex(words) + len(words) :], text[words_end:])
        if header and headers is not None and start >= header[1]:
            headers[header[0]] = start - header[1]
        return start

    def turn_end(self, index: int, text: str, start: int) -> int:
        """Find where the turn that starts at `start` ends; `start` if that is unknown.

        Later turns can change how a template writes this one: some remove the reasoning of earlier answers. Then the
        rendering that ends with this turn is no prefix of `text`. If both agree up to the end of the turn's words, the
        turn ends where they differ; else it is the longest tail of the turn that `text` has at `start`, with at least
        the last character of the words.
        """
        upto = self.render(index + 1)
        if text.startswith(upto):
            return len(upto)
        words, shared = _words(self.messages[index]), _shared_length(upto, text)
        if words and words in text[start:shared]:
            return shared
        turn = upto[start:] if upto.startswith(text[:start]) else ""
        tail = next((words[i:] for i in range(len(words)) if words[i:] in turn), "")
        reach = turn.rfind(tail) + len(tail) if tail else 0
        return next((start + len(turn) - i for i in range(reach) if text.startswith(turn[i:], start)), start)

    def content_spans(self, indices: Collection[int], text: str) -> list[Span]:
        """Locate the content of the messages `indices`, without the white space around it."""
        words = [_words(self.messages[index]) for index in indices]
        if all(content and text.count(content) == 1 for content in words):
            starts = map(text.index, words)
            return [Span(i, start, start + len(w)) for i, start, w in zip(indices, starts, words, strict=True)]
        return [span for span in self._marked_spans(text) if span.message in indices]

    def _marked_spans(self, text: str) -> list[Span]:
        """Locate the content of all messages by a second rendering with marks around each."""
        used = set(text)
        marks = list(islice((chr(code) for code in _PRIVATE_USE if chr(code) not in used), 2 * len(self.messages)))
        marked_messages = [_marked(m, *marks[2 * i : 2 * i + 2]) for i, m in enumerate(self.messages)]
        marked_text = replace(self, messages=marked_messages).render_or_none() or ""
        any_mark = re.compile(f"[{''.join(marks)}]")
        if any_mark.sub("", marked_text) != text:
            return self._searched_spans(text)
        spans, starts = [], {}
        for marks_before, mark in enumerate(any_mark.finditer(marked_text)):
            index, closes = divmod(marks.index(mark.group()), 2)
            if not closes:
                starts[index] = mark.start() - marks_before
            elif index in starts:
                spans.append(Span(index, starts.pop(index), mark.start() - marks_before))
        return spans

    def _searched_spans(self, text: str) -> list[Span]:
        """Search for the contents one after the other: this template inspects them, so marks change its output."""
        spans, position = [], 0
        for index, message in enumerate(self.messages):
            words = _words(message)
            start = text.find(words, position) if words else -1
            if start >= 0:
                position = start + len(words)
                spans.append(Span(index, start, position))
        return spans


def _words(message: Message) -> str:
    """Return the content without the white space around it; empty if it is not text."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _header(messages: list[Message], index: int, text: str) -> tuple[str, int] | None:
    """Return the text between the contents of messages `index - 1` and `index`, and its start; None if ambiguous."""
    words = [_words(message) for message in messages[max(index - 1, 0) : index + 1]]
    if len(words) < 2 or not all(content and text.count(content) == 1 for content in words):
        return None
    start, end = text.index(words[0]) + len(words[0]), text.index(words[1])
    return (text[start:end], start) if start <= end else None


def _shared_length(a: str, b: str) -> int:
    differences = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differences, min(len(a), len(b)))


def _marked(message: Message, opening: str, closing: str) -> Message:
    """Put a mark on either side of the message's words, inside the white space around them."""

    def mark(text: str) -> str:
        words = text.strip()
        return text.replace(words, f"{opening}{words}{closing}", 1) if words else text

    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": mark(content)}
    if isinstance(content, list):
        return message | {"content": [p | {"text": mark(p["text"])} if "text" in p else p for p in content]}
    return message
