"""Render a row to text, with the segment and the weight multiplier of every character.

The chat template renders the complete conversation once, and messages are located by character positions in that text
(message_locations). So a token that spans a message boundary is seen and counted, and so is text that the template
leaves out.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from stages.data.files import BadRow
from stages.data.message_locations import Location, Message, locate
from stages.data.segments import Segment
from stages.system.limits import LimitExceeded, limited

TEMPLATE_SECONDS = 10.0
"""Longest time that a template may take for one conversation."""


@dataclass
class Rendered:
    """A text with the Segment (int8) and the weight multiplier (float32) of each character.

    A row that cannot be rendered has an empty text and a `problem`.
    """

    text: str
    problem: str = ""
    unwritten: dict[int, str] = field(default_factory=dict)
    """Message index -> text of an earlier answer, such as its reasoning, that the template leaves out by design."""
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
        BadRow: the template refuses the conversation, leaves out text that it should write, or writes a turn
            differently once others follow.
    """
    weights = [1.0 if m.get("weight") is None else float(m["weight"]) for m in messages]
    if not all(0 <= weight < float("inf") for weight in weights):
        raise BadRow(None, "has a message whose weight is not a finite number >= 0")
    clean = [_with_text(m) for m in messages]
    chat = Chat(tokenizer, clean, options or {})
    text = chat.render(clean)
    chat.refuse_unwritten_options(text)
    locations = locate(clean, text, chat.render_or_none, None if options else chat.constants)
    rendered = Rendered(text)
    for index, location in enumerate(locations):
        if location.unwritten or location.unwritten_calls:
            _check_unwritten(clean, index, location, index in targets and weights[index] > 0)
            rendered.unwritten[index] = location.unwritten + "".join(location.unwritten_calls)
        if index not in targets:
            is_system = clean[index]["role"] in ("system", "developer")
            for start, end in [*location.spans, *chat.tool_call_spans(index, text, locations)]:
                rendered.mark(start, end, Segment.SYSTEM if is_system else Segment.PROMPT, weights[index])
    last_end = 0
    for index in targets[:1] if to_the_end else targets:
        start = chat.turn_start(index, text, locations, headers if not options else None)
        end = len(text) if to_the_end or index + 1 == len(clean) else chat.turn_end(index, text, start, locations)
        earliest = max((location.end for location in locations[:index]), default=0)
        if start < max(last_end, earliest) or end <= start:
            raise BadRow(
                None,
                f"the chat template writes message {index + 1}, or earlier ones, differently once others follow, so"
                " its position is unknown; remove the row, or try turns: last",
            )
        rendered.mark(start, end, Segment.COMPLETION, weights[index])
        last_end = end
    for index in targets[1:] if to_the_end else ():
        for start, end in locations[index].spans:
            rendered.mark(start, end, Segment.COMPLETION, weights[index])
    return rendered


def _with_text(message: Message) -> Message:
    """The message without its weight and its None values, with the parts of its content joined. Raises BadRow."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part.get("text"), str):
                raise BadRow(None, f"has a message with a part of type {part.get('type')!r}; only text is supported")
        content = "".join(part["text"] for part in content)
    others = {key: value for key, value in message.items() if key not in ("weight", "content") and value is not None}
    return others if content is None else others | {"content": content}


def _check_unwritten(messages: Sequence[Message], index: int, location: Location, is_learnt: bool) -> None:
    """Raise BadRow for text that the template leaves out, unless it is the template's design: many leave out the
    reasoning of answers that another answer follows."""
    message = messages[index]
    if message["role"] == "assistant":
        is_earlier = any(later["role"] == "assistant" for later in messages[index + 1 :])
        keeps_the_end = not location.unwritten_end or bool(message.get("tool_calls"))
        if not is_learnt or (is_earlier and keeps_the_end and not location.unwritten_calls):
            return
    part, unwritten = ("text", location.unwritten) if location.unwritten else ("tool calls", location.unwritten_calls)
    raise BadRow(
        None,
        f"the chat template leaves out {part} of message {index + 1} ({message['role']}): {reprlib.repr(unwritten)};"
        " remove it from the row, or use a model whose template writes it",
    )


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

    @property
    def constants(self) -> str:
        """Text that the template can write by itself: a message's words that occur in it are ambiguous."""
        template = str(self.tokenizer.chat_template).replace("\\n", "\n")
        return "\n".join([template, *(str(message["role"]) for message in self.messages)])

    def render(self, messages: Sequence[Message], prompted: bool = False) -> str:
        """Render messages, with the generation prompt if `prompted`. Raises BadRow."""
        try:
            with limited(TEMPLATE_SECONDS):
                text = str(
                    self.tokenizer.apply_chat_template(
                        list(messages), tokenize=False, add_generation_prompt=prompted, **self.options
                    )
                )
        except (LimitExceeded, MemoryError) as error:
            reason = str(error) or "needs too much memory"
            raise BadRow(None, f"the chat template {reason}; use another model, or correct its template") from None
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise BadRow(None, f"the chat template refuses the conversation: {error}") from None
        return text

    def render_or_none(self, messages: Sequence[Message]) -> str | None:
        """Render messages; None if the template refuses them."""
        try:
            return self.render(messages)
        except BadRow:
            return None

    def refuse_unwritten_options(self, text: str) -> None:
        """Raise BadRow if the template ignores the tools or the documents."""
        for key in ("tools", "documents"):
            if self.options.get(key):
                without = replace(self, options={k: v for k, v in self.options.items() if k != key})
                if without.render_or_none(self.messages) == text:
                    raise BadRow(
                        None,
                        f"has {key}, which the model's chat template ignores; remove them, or use a model whose"
                        " template writes them",
                    )

    def tool_call_spans(self, index: int, text: str, locations: Sequence[Location]) -> list[tuple[int, int]]:
        """Locate what the template writes for the tool calls of a message: where the text differs without them."""
        message = self.messages[index]
        if not (calls := locations[index].calls):
            return []
        silent = {"content": ""} | {key: value for key, value in message.items() if key != "tool_calls"}
        without = self.render_or_none([*self.messages[:index], silent, *self.messages[index + 1 :]])
        values = min(calls)[0], max(end for _, end in calls)
        if without is None:
            return [values]
        start = _shared_length(without, text)
        end = len(text) - min(_shared_length(without[::-1], text[::-1]), len(text) - start, len(without) - start)
        if text[start - 1 : start] in ("<", "[") and text[start - 1] == text[end - 1]:  # of the next tag, too
            start, end = start - 1, end - 1
        later = [location.start for location in locations[index + 1 :] if location.start is not None]
        return [(start, end)] if end <= min(later, default=end) else [values]  # the tools' answers go with the calls

    def turn_start(self, index: int, text: str, locations: Sequence[Location], headers: dict[str, int] | None) -> int:
        """Find where the answer starts: where `text` stops matching the model's prompt; -1 if unknown."""
        words_start = locations[index].start
        if index == 0:
            return -1 if words_start is None else words_start
        previous = locations[index - 1]
        header = ""
        if headers is not None and previous.spans and words_start is not None:
            header = text[previous.end : words_start]
            if header in headers:
                return previous.end + headers[header]
        prompt = self.render(self.messages[:index], prompted=True)
        if text.startswith(prompt):
            start = len(prompt)
        else:  # the template writes earlier messages differently; compare only what follows their last words
            words = text[slice(*previous.spans[-1])] if previous.spans else ""
            if not words or words not in prompt:
                return _shared_length(prompt, text)
            start = previous.end + _shared_length(prompt[prompt.rindex(words) + len(words) :], text[previous.end :])
        if header and headers is not None and start >= previous.end:
            headers[header] = start - previous.end
        return start

    def turn_end(self, index: int, text: str, start: int, locations: Sequence[Location]) -> int:
        """Find where the turn that starts at `start` ends; `start` if that is unknown.

        Later turns can change how a template writes this one: some remove the reasoning of earlier answers. Then the
        rendering that ends with this turn is no prefix of `text`, and what both write after its last words is compared.
        """
        upto = self.render(self.messages[: index + 1])
        if text.startswith(upto):
            return len(upto)
        spans = sorted([*locations[index].spans, *self.tool_call_spans(index, text, locations)])
        if not spans:
            return max(start, _shared_length(upto, text))
        words, words_end = text[slice(*spans[-1])], spans[-1][1]
        shared, position = 0, upto.find(words)
        while position >= 0:
            shared = max(shared, _shared_length(upto[position + len(words) :], text[words_end:]))
            position = upto.find(words, position + 1)
        return words_end + shared


def _shared_length(a: str, b: str) -> int:
    differences = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differences, min(len(a), len(b)))
