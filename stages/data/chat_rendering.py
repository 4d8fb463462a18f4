"""Row -> the text that is tokenised, with every character marked by what it is.

The chat template is asked for the whole conversation once; what belongs to which message is found by character
positions in that one text, so a tokenizer that merges over a boundary can do no harm that is not seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.data.segments import Segment

_PRIVATE = range(0xF0000, 0x110000)
"""Private-use characters. Two for each message, which the text has none of, are set around its content to find it again
in the rendering."""

Message = dict[str, Any]


class BadRender(ValueError):
    """Why a row cannot be rendered."""


@dataclass
class Rendered:
    """A text and, for each of its characters, a Segment (int8) and the factor of its message's own weight (float32)."""

    text: str
    problem: str = ""
    """Why the row has no text, where it has none."""
    segments: numpy.ndarray = field(init=False)
    factors: numpy.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.segments = numpy.full(len(self.text), Segment.TEMPLATE, dtype=numpy.int8)
        self.factors = numpy.ones(len(self.text), dtype=numpy.float32)

    def paint(self, start: int, end: int, segment: Segment, factor: float = 1.0) -> None:
        """Mark the characters from `start` up to `end`."""
        self.segments[start:end] = segment
        self.factors[start:end] = factor


def render_text(prompt: str, completion: str, eos: str, segment: Segment = Segment.COMPLETION) -> Rendered:
    """Plain text: prompt and completion as they stand, and the EOS token where the text has none."""
    rendered = Rendered(prompt + completion + ("" if eos and completion.endswith(eos) else eos))
    rendered.paint(0, len(prompt), Segment.PROMPT)
    rendered.paint(len(prompt), len(rendered.text), segment)
    return rendered


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    learnt: Sequence[int],
    options: dict[str, Any] | None = None,
    to_the_end: bool = False,
    headers: dict[str, int] | None = None,
) -> Rendered:
    """A conversation by the tokenizer's chat template, which gets `options`: `tools`, and what else it knows.

    `learnt` are the indices of the messages that are completion: each from where the text stops being what the model
    would be prompted with, to where the next message begins. With `to_the_end` the first of them reaches to the end.
    `headers` remembers, for the text that the template writes between two messages, how much of it prompts the model,
    so that this is asked once for each such text and not for each row.
    Raises BadRender where the template refuses the conversation, or writes a turn otherwise once others follow.
    """
    weights = [1.0 if m.get("weight") is None else float(m["weight"]) for m in messages]
    if not all(0 <= weight < float("inf") for weight in weights):
        raise BadRender("has a message whose weight is no finite number >= 0")
    clean = [{key: value for key, value in m.items() if key != "weight" and value is not None} for m in messages]
    chat = Chat(tokenizer, clean, options or {})
    whole = chat.rendering(len(clean))
    chat.refuse_unwritten(whole)
    rendered = Rendered(whole)
    regions = learnt[:1] if to_the_end else learnt
    apart = [index for index in range(len(clean)) if index not in regions or index == 0]
    spans = chat.content_spans(apart, whole)
    for index, start, end in spans:
        system = clean[index]["role"] in ("system", "developer")
        rendered.paint(start, end, Segment.SYSTEM if system else Segment.PROMPT, weights[index])
    learnt_to = 0
    for index in regions:
        start = chat.turn_start(index, whole, spans, headers if not options else None)
        end = len(whole) if to_the_end or index + 1 == len(clean) else chat.turn_end(index, whole, start)
        before = max((end for message, _, end in spans if message < index), default=0)
        if start < max(learnt_to, before) or end <= start:
            raise BadRender(
                f"the chat template writes message {index + 1}, or those before it, otherwise when others follow, so"
                " where it stands in the whole text is not known; remove the row, or try turns: last"
            )
        if re.split(r"[\s>]", _words(clean[index]))[-1] not in whole[start:end]:  # after what may be taken out
            raise BadRender(f"the chat template leaves out the words of message {index + 1}")
        rendered.paint(start, end, Segment.COMPLETION, weights[index])
        learnt_to = end
    for index, start, end in spans if to_the_end else ():
        if index in learnt[1:]:
            rendered.paint(start, end, Segment.COMPLETION, weights[index])
    return rendered


def learnt_turns(messages: Sequence[Message], turns: str) -> list[int]:
    """The indices of the assistant messages: all of them, or just the `last`."""
    found = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return found[-1:] if turns == "last" else found


@dataclass(frozen=True)
class Chat:
    """Messages and the chat template that writes them."""

    tokenizer: PreTrainedTokenizerBase
    messages: list[Message]
    options: dict[str, Any]

    def rendering(self, upto: int, prompted: bool = False, messages: list[Message] | None = None) -> str:
        """The first `upto` messages; `prompted`: with what makes the model answer. Raises BadRender."""
        chosen = (messages or self.messages)[:upto]
        try:
            options = self.options
            if isinstance(options.get("tools"), str):
                options = options | {"tools": json.loads(options["tools"])}
            return str(
                self.tokenizer.apply_chat_template(chosen, tokenize=False, add_generation_prompt=prompted, **options)
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadRender(f"the chat template refuses the conversation: {error}") from None

    def refuse_unwritten(self, whole: str) -> None:
        """Raise BadRender where the template writes nothing of the tools or of the calls of them."""
        without: dict[str, Chat] = {}
        if any(message.get("tool_calls") for message in self.messages):
            silent = [{"content": ""} | {k: v for k, v in m.items() if k != "tool_calls"} for m in self.messages]
            without["tool_calls"] = replace(self, messages=silent)
        if self.options.get("tools"):
            without["tools"] = replace(self, options={k: v for k, v in self.options.items() if k != "tools"})
        for what, chat in without.items():
            if _or_none(chat) == whole:
                raise BadRender(
                    f"has {what}, of which the model's chat template writes nothing; use a model whose template does,"
                    " or remove them"
                )

    def turn_start(
        self, index: int, whole: str, spans: list[tuple[int, int, int]], headers: dict[str, int] | None
    ) -> int:
        """Where the answer begins: where `whole` stops being what the model would be prompted with; -1 if unknown."""
        header = _header(self.messages, index, whole)
        if header and headers is not None and header[0] in headers:
            return header[1] + headers[header[0]]
        if index == 0:
            return next((start for message, start, _ in spans if message == 0), -1)
        prompt = self.rendering(index, prompted=True)
        if whole.startswith(prompt):
            start = len(prompt)
        else:  # the template writes what came before in another way; what comes after the last words before counts
            words, told = _words(self.messages[index - 1]), [end for message, _, end in spans if message == index - 1]
            if not words or words not in prompt or not told:
                return _common(prompt, whole)
            start = told[0] + _common(prompt[prompt.rindex(words) + len(words) :], whole[told[0] :])
        if header and headers is not None and start >= header[1]:
            headers[header[0]] = start - header[1]
        return start

    def turn_end(self, index: int, whole: str, start: int) -> int:
        """Where the turn that starts at `start` ends; `start` if that is unknown.

        Where later turns change how this one is written (reasoning that is taken out of earlier answers), its own
        rendering does not begin `whole`; then the longest tail of it that stands at `start` is what is left of it, at
        least the last letter of its words. Where the whole text goes on after the words as its own rendering does,
        and that one has more at its end, the turn ends where both part.
        """
        upto = self.rendering(index + 1)
        if whole.startswith(upto):
            return len(upto)
        words, parted = _words(self.messages[index]), _common(upto, whole)
        if words and words in whole[start:parted]:
            return parted
        turn = upto[start:] if upto.startswith(whole[:start]) else ""
        tail = next((words[cut:] for cut in range(len(words)) if words[cut:] in turn), "")
        reach = turn.rfind(tail) + len(tail) if tail else 0
        return next((start + len(turn) - cut for cut in range(reach) if whole.startswith(turn[cut:], start)), start)

    def content_spans(self, asked: list[int], whole: str) -> list[tuple[int, int, int]]:
        """(message, start, end) of the words of the messages `asked` for, outer white space left to the template."""
        words = [_words(self.messages[index]) for index in asked]
        if all(text and whole.count(text) == 1 for text in words):  # each can stand in one place only
            places = map(whole.index, words)
            return [(index, place, place + len(text)) for index, place, text in zip(asked, places, words, strict=True)]
        return [span for span in self._marked_spans(whole) if span[0] in asked]

    def _marked_spans(self, whole: str) -> list[tuple[int, int, int]]:
        """(message, start, end) of all messages' words, found by marks around them in a second rendering."""
        taken = set(whole)
        marks = list(islice((chr(code) for code in _PRIVATE if chr(code) not in taken), 2 * len(self.messages)))
        marked_messages = [_marked(m, *marks[2 * i : 2 * i + 2]) for i, m in enumerate(self.messages)]
        try:
            marked = self.rendering(len(marked_messages), messages=marked_messages)
        except BadRender:
            marked = ""
        any_mark = re.compile(f"[{''.join(marks)}]")
        if any_mark.sub("", marked) != whole:
            return self._searched_spans(whole)
        spans, open_at = [], {}
        for seen, mark in enumerate(any_mark.finditer(marked)):
            index, closes = divmod(marks.index(mark.group()), 2)
            if not closes:
                open_at[index] = mark.start() - seen
            elif index in open_at:
                spans.append((index, open_at.pop(index), mark.start() - seen))
        return spans

    def _searched_spans(self, whole: str) -> list[tuple[int, int, int]]:
        """Likewise for a template that looks into the contents, so that marks would change what it writes: the words
        are searched for, one message after the other."""
        spans, cursor = [], 0
        for index, message in enumerate(self.messages):
            words = _words(message)
            found = whole.find(words, cursor) if words else -1
            if found >= 0:
                cursor = found + len(words)
                spans.append((index, found, cursor))
        return spans


def _or_none(chat: Chat) -> str | None:
    """Its rendering, or None where the template refuses it."""
    try:
        return chat.rendering(len(chat.messages))
    except BadRender:
        return None


def _words(message: Message) -> str:
    """A message's content without outer white space; empty where it is no text."""
    content = message.get("content")
    return content.strip() if isinstance(content, str) else ""


def _header(messages: list[Message], index: int, whole: str) -> tuple[str, int] | None:
    """What stands between the words of the message before and those of message `index`, and where that begins; None
    where either's words do not stand in exactly one place."""
    words = [_words(message) for message in messages[max(index - 1, 0) : index + 1]]
    if len(words) < 2 or not all(text and whole.count(text) == 1 for text in words):
        return None
    start, end = whole.index(words[0]) + len(words[0]), whole.index(words[1])
    return (whole[start:end], start) if start <= end else None


def _common(a: str, b: str) -> int:
    """The length of the longest common beginning."""
    if b.startswith(a):
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _marked(message: Message, opens: str, closes: str) -> Message:
    """The message with two characters around its words, inside of outer white space."""

    def around(text: str) -> str:
        words = text.strip()
        if not words:
            return text
        lead, trail = text.split(words, 1)
        return f"{lead}{opens}{words}{closes}{trail}"

    content = message.get("content")
    if isinstance(content, str):
        return message | {"content": around(content)}
    if isinstance(content, list):
        return message | {"content": [p | {"text": around(p["text"])} if "text" in p else p for p in content]}
    return message
