"""YAML text -> Node tree with source locations; YAML features that recipes do not allow are errors.

Tags, anchors and merge keys are resolved here: a recipe has only text, numbers, true, false, null, lists and sections.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.nodes import BROKEN, MAX_DEPTH, Key, Location, Node, NodeError, Problem, make_node

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "value")}

_PLAIN_SCALARS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda _: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", lambda text: int(text, 0)),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}
"""Type -> what a scalar without quotes looks like, and how to read it: YAML 1.2.2, section 10.3.2. Other text is text,
such as yes, on, 1:30 and 1_000. So is 042, which YAML 1.1 read as 34, and YAML 1.2 as 42."""


class NotYAMLError(Exception):
    """The text is not valid YAML, or exceeds the limits of a recipe; the message says where and why."""


def parse(text: str, name: str, folder: Path, lines: bool = True) -> tuple[Node, list[Problem]]:
    """Parse the one document in `text`. Errors in single keys and values, which are omitted or BROKEN, are returned.

    Relative paths in the text start from `folder`. Locations have the file `name`, and a line and column if `lines`.
    """
    if match := yaml.reader.Reader.NON_PRINTABLE.search(text):
        before = text[: match.start()]
        location = Location(name, before.count("\n") + 1, match.start() - before.rfind("\n"), folder)
        raise NotYAMLError(f"{location if lines else name}: not valid YAML: the character {match[0]!r} is not allowed")
    reader = _Reader(yaml.CSafeLoader(text), name, folder, lines)
    try:
        return reader.read_document(), reader.problems
    except yaml.MarkedYAMLError as error:
        raise NotYAMLError(reader.explain(error, text)) from None
    except yaml.YAMLError as error:
        raise NotYAMLError(f"{name}: not valid YAML: {error}") from None


@dataclass
class _Reader:
    """Builds the tree from the parser's events, because yaml.compose overflows the stack on deep nesting."""

    loader: Any  # PyYAML's stubs say that its events may be None
    name: str
    folder: Path
    lines: bool
    problems: list[Problem] = field(default_factory=list)
    anchors: dict[str, Node | None] = field(default_factory=dict)
    """None while the anchor's own value is being read."""

    def read_document(self) -> Node:
        self.loader.get_event()  # start of the stream
        if isinstance(event := self.loader.get_event(), yaml.StreamEndEvent):
            location = self.locate(event.start_mark)
            return Node(None, location, location)
        tree = self.read_value(self.loader.get_event(), (), None)
        self.loader.get_event()  # end of the document
        if not isinstance(event := self.loader.get_event(), yaml.StreamEndEvent):
            raise NotYAMLError(f"{self.locate(event.start_mark)}: not valid YAML: a recipe is one document, not two")
        return tree

    def locate(self, mark: Any) -> Location:
        if not self.lines:
            return Location(self.name, None, None, self.folder)
        return Location(self.name, mark.line + 1, mark.column + 1, self.folder)

    def explain(self, error: yaml.MarkedYAMLError, text: str) -> str:
        mark, start = error.problem_mark or error.context_mark, error.context_mark
        reason = f"{error.problem or error.context}"
        if error.context and start and mark and start.line != mark.line:
            reason += f", {error.context} that begins in line {start.line + 1}"
        if mark and "\t" in "".join(text.split("\n")[mark.line : mark.line + 1])[: mark.column + 1]:
            reason += "; indent with spaces, not tabs"
        return f"{self.locate(mark) if mark else self.name}: not valid YAML: {reason}"

    def read_value(self, event: Any, key: Key, key_location: Location | None) -> Node:
        location = self.locate(event.start_mark)
        anchor = event.anchor
        if isinstance(event, yaml.AliasEvent):
            if anchor not in self.anchors:
                raise NotYAMLError(f"{location}: not valid YAML: *{anchor} has no &{anchor} before it")
            if (node := self.anchors[anchor]) is None:
                raise NotYAMLError(f"{location}: not valid YAML: *{anchor} is inside &{anchor} itself")
            return replace(node, location=location, key_location=key_location or location)
        if len(key) >= MAX_DEPTH:
            raise NotYAMLError(f"{location}: nested deeper than {MAX_DEPTH} levels; make it flatter")
        if anchor is not None:
            self.anchors[anchor] = None
        try:
            node = self.read_content(event, key, location, key_location or location)
        except NodeError as error:
            raise NotYAMLError(f"{key_location or location}: {error}") from None
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def read_content(self, event: Any, key: Key, location: Location, key_location: Location) -> Node:
        if event.tag is not None and event.tag not in _PLAIN_TAGS and event.tag != "!":
            allowed = "text, numbers, true, false, null, lists and sections"
            self.problems.append(Problem(location, key, f"has the YAML tag {event.tag!r}; a recipe has only {allowed}"))
            if isinstance(event, yaml.ScalarEvent):
                return Node(BROKEN, location, key_location)
        if isinstance(event, yaml.MappingStartEvent):
            return make_node(self.read_section(key), location, key_location)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Node] = []
            while not isinstance(event := self.loader.get_event(), yaml.SequenceEndEvent):
                items.append(self.read_value(event, (*key, len(items)), None))
            return make_node(items, location, key_location)
        return Node(self.read_scalar(event, key, location), location, key_location)

    def read_section(self, key: Key) -> dict[str, Node]:
        section: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := self.loader.get_event(), yaml.MappingEndEvent):
            location = self.locate(event.start_mark)
            if isinstance(event, yaml.ScalarEvent) and event.value == "<<" and event.implicit[0]:
                merged = self.merge(self.read_value(self.loader.get_event(), key, location), key) | merged
                continue
            name = self.read_key(event, key, location)
            node = self.read_value(self.loader.get_event(), (*key, name or "?"), location)
            if name in section:
                text = f"is a duplicate key; the first is in line {section[name].key_location.line}, remove one"
                self.problems.append(Problem(location, (*key, name), text))
            elif name is not None:
                section[name] = node
        return merged | section

    def read_key(self, event: Any, section: Key, location: Location) -> str | None:
        if isinstance(event, yaml.ScalarEvent):
            kind = _scalar_kind(event)
            if kind is None:
                return event.value
            text = f"the key {event.value!r} is read as {kind}, not as text; put it in quotes"
        else:
            self.read_value(event, (*section, "?"), None)
            text = "a key must be text, not a list, section or alias"
        self.problems.append(Problem(location, section, text))
        return None

    def merge(self, node: Node, key: Key) -> dict[str, Node]:
        """Merge the sections of `<<: *anchor` or `<<: [*a, *b]`; the first of several wins."""
        sections = node.content if isinstance(node.content, list) else [node]
        merged: dict[str, Node] = {}
        for section in sections:
            if isinstance(section.content, dict):
                merged = section.content | merged
            else:
                text = "must be an alias of a section, or a list of them"
                self.problems.append(Problem(node.key_location, (*key, "<<"), text))
        return merged

    def read_scalar(self, event: Any, key: Key, location: Location) -> Any:
        kind = _scalar_kind(event)
        if kind is None:
            return event.value
        try:
            value = _PLAIN_SCALARS[kind][1](event.value)
        except (ValueError, OverflowError):
            value = math.inf
        if isinstance(value, int | float) and not (math.isfinite(value) if kind == "float" else abs(value) < 2**63):
            text = event.value if len(event.value) <= 30 else f"{event.value[:30]}..."
            expected = "a finite number" if kind == "float" else f"of type {kind}, at most 64 bits"
            self.problems.append(Problem(location, key, f"should be {expected}, found {text}"))
            return BROKEN
        return value


def _scalar_kind(event: Any) -> str | None:
    """The key of _PLAIN_SCALARS for a scalar, by its tag or its form; None for text."""
    if event.tag is not None:
        kind = event.tag.removeprefix(_TAG)
        return kind if kind in _PLAIN_SCALARS else None
    if not event.implicit[0]:  # in quotes, or a block
        return None
    return next((kind for kind, (form, _) in _PLAIN_SCALARS.items() if re.fullmatch(form, event.value)), None)
