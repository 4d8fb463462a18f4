"""Row -> the text that is tokenised, with every character marked by what it is.

The chat template is asked for the whole conversation once; what belongs to which message is found by character
positions in that one text, so a tokenizer that merges over a boundary can do no harm that is not seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.sft.segments import Segment

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
    tools: list[Any] | None = None,
    to_the_end: bool = False,
) -> Rendered:
    """A conversation by the tokenizer's chat template.

    `learnt` are the indices of the messages that are completion: each from where the text stops being what the model
    would be prompted with, to where the next message begins. With `to_the_end` the first of them reaches to the end.
    Raises BadRender where the template refuses the conversation, or writes a turn otherwise once others follow.
    """
    weights = [1.0 if m.get("weight") is None else float(m["weight"]) for m in messages]
    clean = [{key: value for key, value in m.items() if key != "weight" and value is not None} for m in messages]

    def template(upto: int, prompted: bool = False) -> str:
        return _apply(tokenizer, clean[:upto], tools, prompted)

    rendered = Rendered(template(len(clean)))
    spans = _content_spans(tokenizer, clean, tools, rendered.text)
    for index, start, end in spans:
        system = clean[index]["role"] in ("system", "developer")
        rendered.paint(start, end, Segment.SYSTEM if system else Segment.PROMPT, weights[index])
    learnt_to = 0
    for index in learnt[:1] if to_the_end else learnt:
        if index:
            start = _common(template(index, prompted=True), rendered.text)
        else:
            start = next((start for message, start, _ in spans if message == 0), 0)
        end = len(rendered.text)
        if index + 1 < len(clean) and not to_the_end:
            end = _turn_end(rendered.text, start, template(index + 1))
        own = max((span_end for message, _, span_end in spans if message == index), default=start)
        if start < learnt_to or end <= start or end < own:
            raise BadRender(
                f"the chat template writes message {index + 1} otherwise when others follow it, so where it stands"
                " in the whole text is not known; use turns: last"
            )
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


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None, prompted: bool) -> str:
    tools = json.loads(tools) if isinstance(tools, str) else tools
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompted)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise BadRender(f"the chat template refuses the conversation: {error}") from None
    return str(text)


def _turn_end(whole: str, start: int, upto: str) -> int:
    """Where the turn that starts at `start` ends, given the rendering `upto` and with it.

    Where later turns change how this one is written (reasoning that is taken out of earlier answers), `upto` does
    not begin `whole`; then the turn's longest tail that stands at `start` is what is left of it.
    """
    if whole.startswith(upto):
        return len(upto)
    turn = upto[start:] if upto.startswith(whole[:start]) else ""
    return next((start + len(turn) - cut for cut in range(len(turn)) if whole.startswith(turn[cut:], start)), start)


def _common(a: str, b: str) -> int:
    """The length of the longest common beginning."""
    if b.startswith(a):
        return len(a)
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _content_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None, whole: str
) -> list[tuple[int, int, int]]:
    """(message, start, end) of every message's own words in `whole`, outer white space left to the template."""
    taken = set(whole)
    marks = list(islice((chr(code) for code in _PRIVATE if chr(code) not in taken), 2 * len(messages)))
    try:
        marked = _apply(
            tokenizer, [_marked(m, *marks[2 * i : 2 * i + 2]) for i, m in enumerate(messages)], tools, prompted=False
        )
    except BadRender:
        marked = ""
    any_mark = re.compile(f"[{''.join(marks)}]")
    if any_mark.sub("", marked) != whole:
        return _searched_spans(messages, whole)
    spans, open_at = [], {}
    for seen, mark in enumerate(any_mark.finditer(marked)):
        index, closes = divmod(marks.index(mark.group()), 2)
        if not closes:
            open_at[index] = mark.start() - seen
        elif index in open_at:
            spans.append((index, open_at.pop(index), mark.start() - seen))
    return spans


def _searched_spans(messages: list[Message], whole: str) -> list[tuple[int, int, int]]:
    """Likewise for a template that looks into the contents, so that marks would change what it writes: the words are
    searched for, one message after the other."""
    spans, cursor = [], 0
    for index, message in enumerate(messages):
        words = message["content"].strip() if isinstance(message.get("content"), str) else ""
        found = whole.find(words, cursor) if words else -1
        if found >= 0:
            cursor = found + len(words)
            spans.append((index, found, cursor))
    return spans


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
