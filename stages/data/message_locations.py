"""Find where a chat template writes the text of each message, and what it leaves out.

Words that occur once are found by a search. Else the conversation is rendered again with a mark before every word: a
character of Unicode's private use areas, which a template passes on like any other. Each mark in that rendering shows
where a word went, whatever else the text contains.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

Message = dict[str, Any]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message, beside `content`, that hold text of the model."""

_MARKS = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))
_PRIVATE_USE = re.compile("([\U000f0000-\U000ffffd\U00100000-\U0010fffd\ue000-\uf8ff])")
_WORD = re.compile(r"<[^\s<>]*>?|\[[^\s\[\]]*\]?|[^\s<\[]+")
"""A tag or other word. Text can follow a tag without a space: `<think>a</think>b` has four."""


@dataclass
class Location:
    """Where the text of one message is in a rendering."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each part, in order, without the white space around it."""
    unwritten: str = ""
    """Text that the template leaves out, without the white space around it."""
    unwritten_end: bool = False
    """Whether the end of the content is left out."""
    calls: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of the names, keys and values of tool calls."""
    unwritten_calls: list[str] = field(default_factory=list)
    """Names, keys and values of tool calls that are left out."""

    @property
    def start(self) -> int | None:
        """The start of the first part; None if nothing is written."""
        return self.spans[0][0] if self.spans else None

    @property
    def end(self) -> int:
        """The end of the last part; 0 if nothing is written."""
        return self.spans[-1][1] if self.spans else 0

    def add(self, match: "_Match", words: str, is_end: bool) -> None:
        """Add what was found of `words`; `is_end` says that they end the content."""
        self.spans += match.spans
        if rest := words[match.used :].strip():
            self.unwritten = f"{self.unwritten} {rest}".strip()
            self.unwritten_end |= is_end


class _Match(NamedTuple):
    """Where a chunk of a text is written."""

    spans: list[tuple[int, int]]
    used: int
    """The number of its characters that are written."""


def locate(
    messages: Sequence[Message],
    text: str,
    render: Callable[[Sequence[Message]], str | None],
    constants: str | None,
) -> list[Location]:
    """Locate every message in `text`.

    Args:
        text: the rendering of `messages`.
        render: renders other messages with the same template; None if the template refuses them.
        constants: text that the template can write by itself; None if that is not known.

    Returns:
        One location per message.
    """
    locations = None if constants is None else _unique_words(messages, text, constants)
    for first_words in (True, False):
        locations = locations or _marked_words(messages, text, render, first_words)
    locations = locations or _searched_words(messages, text)
    for index, message in enumerate(messages):
        if message.get("tool_calls"):
            before = max((location.end for location in locations[:index]), default=0)
            starts = [location.start for location in locations[index + 1 :] if location.start is not None]
            turn = text[before : min(starts, default=len(text))]
            for number, call in enumerate(message["tool_calls"]):
                shorter = _without_call(message, number)
                is_written = render([*messages[:index], shorter, *messages[index + 1 :]]) != text
                for value in _values(call.get("function", call)):
                    # the words of a call that is left out can also be those of the answer
                    if (span := _find_value(value, turn) if is_written else None) is None:
                        locations[index].unwritten_calls.append(str(value))
                    else:
                        locations[index].calls.append((before + span[0], before + span[1]))
    return locations


def _unique_words(messages: Sequence[Message], text: str, constants: str) -> list[Location] | None:
    """Locate contents that occur once; None if one is ambiguous, out of order or not the message's only text."""
    locations, position = [], 0
    for message in messages:
        if any(message.get(key) for key in REASONING_KEYS):
            return None
        if not (words := (message.get("content") or "").strip()):
            locations.append(Location())
            continue
        start = text.find(words)
        as_json = json.dumps(words, ensure_ascii=False)[1:-1]
        is_ambiguous = text.rfind(words) != start or words in constants or (as_json != words and as_json in text)
        if start < position or is_ambiguous:
            return None
        position = start + len(words)
        locations.append(Location([(start, position)]))
    return locations


def _marked_words(
    messages: Sequence[Message], text: str, render: Callable[[Sequence[Message]], str | None], first_words: bool
) -> list[Location] | None:
    """Locate words by marks; None if marks change what the template writes.

    Args:
        first_words: mark the first word of each text even if it is no letter or digit; some templates test how a text
            starts.
    """
    used = set(_PRIVATE_USE.findall(text))
    marks = (mark for mark in map(chr, chain(*_MARKS)) if mark not in used)
    marked_messages, chunks_of = [], []
    for index, message in enumerate(messages):
        for key, content in _texts(message):
            chunks = list(_chunks(content, marks, first_words))
            message = message | {key: "".join(mark + words for mark, words in chunks)}
            chunks_of.append((index, key, [chunk for chunk in chunks if chunk[1].strip()]))
        marked_messages.append(message)
    if next(marks, None) is None:
        return None
    all_marks = "".join(mark for *_, chunks in chunks_of for mark, _ in chunks)
    any_mark = re.compile(f"([{all_marks}])") if used else _PRIVATE_USE
    parts = any_mark.split(render(marked_messages) or "") if all_marks else []
    if "".join(parts[::2]) != text:
        return None
    written: dict[str, list[tuple[int, str, str]]] = {}
    """Mark -> the positions where it is written, each with the text since the mark before it and up to the next."""
    position = 0
    for before, mark, after in zip(parts[::2], parts[1::2], parts[2::2], strict=False):
        position += len(before)
        written.setdefault(mark, []).append((position, before, after))
    locations = [Location() for _ in messages]
    for index, key, chunks in chunks_of:
        for number, (mark, words) in enumerate(chunks):
            match = _match(words, written.get(mark, []))
            if not match.spans and number == 0 and len(chunks) > 1:
                match = _match_end(words, written.get(chunks[1][0], []))
            elif not mark:
                match = _search(words, text, max((each.end for each in locations[:index]), default=0)) or _NOTHING
            locations[index].add(match, words, key == "content" and number + 1 == len(chunks))
    for location in locations:
        location.spans = _joined(location.spans, text)
    return locations


def _chunks(content: str, marks: Iterator[str], first_words: bool) -> Iterator[tuple[str, str]]:
    """Split a text before every word; yield each part with a mark, or with none if it should not have one.

    Tags have no mark of their own, since templates search for them and cut off white space before them.
    """
    starts = [match.start() for match in _WORD.finditer(content) if content[match.start()] not in "<["]
    first = len(content) - len(content.lstrip())
    if first_words or content[first].isalnum():
        starts = sorted({first, *starts})
    else:
        starts = [start for start in starts if start != first]
    yield "", content[: starts[0]] if starts else content
    for start, end in zip(starts, [*starts[1:], len(content)], strict=True):
        yield next(marks, ""), content[start:end]


def _match(words: str, places: Sequence[tuple[int, str, str]]) -> _Match:
    """Match a chunk with what follows its mark: as text, or as JSON text."""
    spans, most_used = [], 0
    for position, _, after in places:
        used = count = len(words)
        if not after.startswith(words):
            ends = [match.end() for match in _WORD.finditer(words)]
            used, count = _shared_words(words, after, ends, partial=ends[0])
            encoded = json.dumps(words.rstrip(), ensure_ascii=False)[1:-1]
            if used < ends[-1] and after.startswith(encoded):
                used, count = len(words), len(encoded)
        spans.append((position, position + count))
        most_used = max(most_used, used)
    return _Match([span for span in spans if span[0] < span[1]], most_used)


def _match_end(words: str, places: Sequence[tuple[int, str, str]]) -> _Match:
    """Match a complete chunk with what precedes the mark of the next one."""
    for position, before, _ in places:
        used, count = _shared_words(words[::-1], before[::-1], [len(words.lstrip())])
        if used:
            return _Match([(position - count, position)], len(words))
    return _NOTHING


def _shared_words(text: str, written: str, ends: Sequence[int], partial: int = 0) -> tuple[int, int]:
    """Return how much both have in common at their start, in characters of either.

    White space between characters can differ. What is common ends at one of `ends`, or before `partial`.
    """
    i = j = 0
    shared = (0, 0)
    while i < len(text) and j < len(written):
        if text[i] == written[j]:
            i, j = i + 1, j + 1
            if i <= partial or i in ends:
                shared = i, j
        elif text[i].isspace():
            i += 1
        elif written[j].isspace():
            j += 1
        else:
            break
    return shared


def _joined(spans: list[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Join spans with nothing but white space between them; cut white space off at either end."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and not text[joined[-1][1] : start].strip():
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    stripped = ((end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())) for start, end in joined)
    return [(start, end) for start, end in stripped if start < end]


def _searched_words(messages: Sequence[Message], text: str) -> list[Location]:
    """Search for the texts in order, and for the longest end or start of those that are not complete between their
    neighbours: this template changes its output with marks."""
    locations, position = [Location() for _ in messages], 0
    shortened = []
    for index, message in enumerate(messages):
        for key, content in _texts(message):
            if match := _search(content, text, position):
                locations[index].add(match, content, False)
                position = locations[index].end
            else:
                shortened.append((index, key, content))
    for index, key, content in shortened:
        start = max((location.end for location in locations[:index]), default=0)
        starts = (location.start for location in locations[index + 1 :] if location.start is not None)
        turn = text[: min(starts, default=len(text))]
        words = list(_WORD.finditer(content))
        cuts = [*((word.start(), len(content)) for word in words), *((0, word.end()) for word in reversed(words))]
        written = ((cut, match) for cut in cuts if (match := _search(content[slice(*cut)], turn, start)))
        (first, end), match = next(written, ((0, 0), _NOTHING))
        locations[index].add(match, content[first:end], False)
        locations[index].add(_NOTHING, content[:first], False)
        locations[index].add(_NOTHING, content[end:], key == "content")
    return locations


def _search(words: str, text: str, position: int) -> _Match | None:
    """Search for words, or the JSON of them, from a position on."""
    for form in (words.strip(), json.dumps(words.strip(), ensure_ascii=False)[1:-1]):
        if form and (start := text.find(form, position)) >= 0:
            return _Match([(start, start + len(form))], len(words))
    return None


_NOTHING = _Match([], 0)


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield key and text of the texts of a message that are not blank."""
    for key in (*REASONING_KEYS, "content"):
        if isinstance(text := message.get(key), str) and text.strip():
            yield key, text


def _without_call(message: Message, number: int) -> Message:
    """The message without one of its tool calls."""
    calls = [call for index, call in enumerate(message["tool_calls"]) if index != number]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"tool_calls": calls} if calls else {"content": ""} | rest


def _values(value: Any) -> Iterator[Any]:
    """Yield the keys and values of nested JSON, also of JSON text in `arguments`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("name", "arguments"):  # the keys of the call itself
                yield key
            yield from _values(_decoded(inner) if key == "arguments" else inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)
    elif value is not None:
        yield value


def _decoded(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _find_value(value: Any, text: str) -> tuple[int, int] | None:
    """Find where `text` has a value, as text, as JSON or as Python would write it."""
    literals = (json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value))
    forms = [str(value).strip(), *(form[1:-1] if isinstance(value, str) else form for form in literals)]
    return next(((text.index(form), text.index(form) + len(form)) for form in forms if form in text), None)
