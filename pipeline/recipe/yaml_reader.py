"""YAML text -> values with their places; what YAML allows and a recipe does not is an error that says where.

Tags, anchors and merge keys end here: a recipe is text, numbers, true, false, null, lists and sections.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.nodes import BROKEN, MAX_DEPTH, Key, Location, Node, Problem, TooLargeError, made

_TAG = "tag:yaml.org,2002:"
_PLAIN = {_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")}
_UNPRINTABLE = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What the YAML standard (1.1, section 5.1) admits in no document."""


class _Loader(yaml.CSafeLoader):
    """YAML 1.1 but for two things: 1e-3 is a number, as in YAML 1.2, and a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TAG + "timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _TAG + "float", re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class NotYAMLError(Exception):
    """The text cannot be read at all: the message says where and why."""


def parse(text: str, name: str, folder: Path, lines: bool = True) -> tuple[Node, list[Problem]]:
    """The one document in `text`, and what is wrong with single keys and values of it, which are left out or BROKEN.

    Args:
        text: what stands in the file, or after `--set KEY=`.
        name: the file's, for messages.
        folder: what paths written in the text are relative to.
        lines: whether places say line and column.

    Raises:
        NotYAMLError: it is no YAML, or more of it than a recipe may hold.
    """
    if found := _UNPRINTABLE.search(text):
        before = text[: found.start()]
        place = Location(name, before.count("\n") + 1, found.start() - before.rfind("\n"), folder)
        raise NotYAMLError(f"{place if lines else name}: not valid YAML: the character {found[0]!r} is not allowed")
    reader = _Reader(_Loader(text), name, folder, lines)
    try:
        return reader.document(), reader.problems
    except yaml.MarkedYAMLError as error:
        raise NotYAMLError(reader.explain(error, text)) from None
    except yaml.YAMLError as error:
        raise NotYAMLError(f"{name}: not valid YAML: {error}") from None
    finally:
        reader.loader.dispose()


@dataclass
class _Reader:
    """Builds the tree from the parser's events one by one: yaml.compose would overflow the stack on deep nesting."""

    loader: _Loader
    name: str
    folder: Path
    lines: bool
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, Node | None] = field(default_factory=dict)
    """None for those that are not read to their end."""

    def document(self) -> Node:
        self.event()  # the stream's start
        if isinstance(event := self.event(), yaml.StreamEndEvent):
            place = self.place(event.start_mark)
            return Node(None, place, place)
        tree = self.value(self.event(), (), None)
        self.event()  # the document's end
        if not isinstance(event := self.event(), yaml.StreamEndEvent):
            raise NotYAMLError(f"{self.place(event.start_mark)}: not valid YAML: a recipe is one document, not two")
        return tree

    def event(self) -> Any:
        """The parser's next."""
        return self.loader.get_event()

    def place(self, mark: Any) -> Location:
        if not self.lines:
            return Location(self.name, None, None, self.folder)
        return Location(self.name, mark.line + 1, mark.column + 1, self.folder)

    def explain(self, error: yaml.MarkedYAMLError, text: str) -> str:
        """The parser's complaint in one line."""
        mark, begun = error.problem_mark or error.context_mark, error.context_mark
        said = f"{error.problem or error.context}"
        if error.context and begun and mark and begun.line != mark.line:
            said += f", {error.context} that begins in line {begun.line + 1}"
        if mark and "\t" in "".join(text.split("\n")[mark.line : mark.line + 1])[: mark.column + 1]:
            said += "; indent by spaces, not by tabs"
        return f"{self.place(mark) if mark else self.name}: not valid YAML: {said}"

    def value(self, event: Any, key: Key, before: Location | None) -> Node:
        """The value that begins with `event`; `before` is where its key stands."""
        place = self.place(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event.anchor, place, before or place)
        if len(key) >= MAX_DEPTH:
            raise NotYAMLError(f"{place}: nested deeper than {MAX_DEPTH} levels; make it flatter")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        try:
            node = self.content(event, key, place, before or place)
        except TooLargeError as error:
            raise NotYAMLError(f"{before or place}: {error}") from None
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def content(self, event: Any, key: Key, place: Location, before: Location) -> Node:
        if event.tag is not None and event.tag not in _PLAIN and event.tag != "!":
            text = (
                f"has the YAML tag {event.tag!r}; a recipe holds text, numbers, true, false, null, lists and sections"
            )
            self.problems.append(Problem(place, key, text))
            if isinstance(event, yaml.ScalarEvent):
                return Node(BROKEN, place, before)
        if isinstance(event, yaml.MappingStartEvent):
            return made(self.section(key), place, before)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(event := self.event(), yaml.SequenceEndEvent):
                items.append(self.value(event, (*key, len(items)), None))
            return made(items, place, before)
        return Node(self.scalar(event, key, place), place, before)

    def section(self, key: Key) -> dict[str, Node]:
        written: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := self.event(), yaml.MappingEndEvent):
            place = self.place(event.start_mark)
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                merged = self.merge(self.value(self.event(), key, place), key) | merged
                continue
            name = self.key(event, key, place)
            node = self.value(self.event(), (*key, name or "?"), place)
            if name in written:
                first = written[name].key
                text = f"stands here a second time; the first is in line {first.line}, leave one out"
                self.problems.append(Problem(place, (*key, name), text))
            elif name is not None:
                written[name] = node
        return merged | written

    def key(self, event: Any, section: Key, place: Location) -> str | None:
        """The name that a key gives; None, and a problem, for one that is not text."""
        if isinstance(event, yaml.ScalarEvent):
            tag = event.tag or self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
            if tag in (_TAG + "str", _TAG + "value", "!"):
                return event.value
            text = f"the key {event.value!r} is read as {tag.rpartition(':')[2]}, not as text; put it in quotes"
        else:
            self.value(event, (*section, "?"), None)
            text = "a key is text, not a list, section or alias"
        self.problems.append(Problem(place, section, text))
        return None

    def alias(self, anchor: str | None, place: Location, before: Location) -> Node:
        if anchor not in self.anchors:
            raise NotYAMLError(f"{place}: not valid YAML: *{anchor} stands for nothing: no &{anchor} comes before it")
        if (node := self.anchors[anchor]) is None:
            raise NotYAMLError(f"{place}: not valid YAML: *{anchor} stands within &{anchor} itself")
        return replace(node, place=place, key=before)

    def merge(self, node: Node, key: Key) -> dict[str, Node]:
        """What `<<: *anchor` and `<<: [*a, *b]` add to a section; the first of several wins."""
        sections = node.content if isinstance(node.content, list) else [node]
        merged: dict[str, Node] = {}
        for section in sections:
            if isinstance(section.content, dict):
                merged = section.content | merged
            else:
                self.problems.append(Problem(node.key, (*key, "<<"), "takes a section or a list of sections by alias"))
        return merged

    def scalar(self, event: Any, key: Key, place: Location) -> Any:
        tag = event.tag or self.loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag not in (_TAG + "int", _TAG + "float", _TAG + "bool", _TAG + "null"):
            return event.value
        try:
            value = self.loader.construct_object(yaml.ScalarNode(tag, event.value))
        except (ValueError, KeyError, OverflowError):
            value = math.inf
        if isinstance(value, int | float) and not (
            math.isfinite(value) if tag.endswith("float") else abs(value) < 2**63
        ):
            shown = event.value if len(event.value) <= 30 else f"{event.value[:30]}..."
            kind = "a finite number" if tag.endswith("float") else f"of type {tag.rpartition(':')[2]}, at most 64 bits"
            self.problems.append(Problem(place, key, f"should be {kind}, found {shown}"))
            return BROKEN
        return value
