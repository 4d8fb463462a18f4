"""A recipe's values with their source locations, for error messages and relative paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]

MAX_VALUES = 500_000
"""Limit for one recipe with all aliases and `${...}` expanded: more than any grid has, less than fills the memory."""
MAX_DEPTH = 40

_PLACE = re.compile(r"([^\s:]+):(\d+)[: ]")
"""File and line at the start of an error about a data row."""


def split_key(key: str) -> Key:
    """Split a dotted key, `a.b[0]` or `a.b.0`, into its parts."""
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key[:10_000]))


def split_key_within(value: Any, key: str) -> Key:
    """Split a dotted key of the plain value `value`, whose own keys may contain dots and brackets."""
    names = [name for name in value if f"{key}.".startswith(f"{name}.")] if isinstance(value, dict) else []
    name = max(names, key=len) if names else key.partition(".")[0]
    part = int(name) if isinstance(value, list) and name.isdecimal() else name
    rest = key[len(name) + 1 :]
    return (part, *(split_key_within(item_of(value, name), rest) if rest else ()))


def item_of(value: Any, part: str | int) -> Any:
    """Return the item of a section or list, or None."""
    if isinstance(value, dict):
        return value.get(str(part))
    is_item = isinstance(value, list) and str(part).isdecimal() and int(part) < len(value)
    return value[int(part)] if is_item else None


def dotted(key: Key) -> str:
    return ".".join(map(str, key))


def scalar_text(value: Any) -> str:
    """Return a plain value as a recipe writes it: true, false, null, a number or the text itself."""
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


@dataclass(frozen=True, slots=True)
class Location:
    """A line and column of a recipe file, counted from 1, or a `--set` override, which has neither."""

    file: str
    line: int | None
    column: int | None
    folder: Path
    """The folder that relative paths written here start from."""

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Sort key: files before overrides, then from top to bottom."""
        return (self.line is None, self.file, self.line or 0, self.column or 0)

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    location: Location
    key: Key
    text: str

    def __str__(self) -> str:
        name = f"{dotted(self.key)}: " if self.key else ""
        return f"{self.location}: {name}{self.text}"


class RecipeError(Exception):
    """One or more errors in a recipe or the command line; `str` gives one line per error."""

    def __init__(self, errors: Sequence[str], problems: Sequence[Problem] = ()) -> None:
        groups: dict[tuple[Key, str], list[Problem]] = {}
        for problem in sorted(problems, key=lambda problem: problem.location.order):
            groups.setdefault((problem.key[-1:], problem.text), []).append(problem)
        lines = [f"{same[0]}{_others(same)}" for same in groups.values()]
        counts = Counter(errors)
        lines += [text if count == 1 else f"{text} (in {count} steps)" for text, count in counts.items()]
        super().__init__("\n".join(lines))
        self.problems = list(problems)
        unique = dict.fromkeys((problem.text, problem.location, dotted(problem.key)) for problem in problems)
        places = (_PLACE.match(text) for text in counts)
        self.records: list[dict[str, Any]] = [
            {"message": text, "file": at.file, "line": at.line, "key": key or None} for text, at, key in unique
        ] + [
            {"message": text, "file": place and place[1], "line": place and int(place[2]), "key": None}
            for text, place in zip(counts, places, strict=True)
        ]
        """The errors for programs: message, and where they are."""


def _others(same: Sequence[Problem]) -> str:
    """Say where else, or how often, an error occurs that is reported for `same[0]`."""
    others = dict.fromkeys((p.key, p.location.line) for p in same if p.key != same[0].key)
    names = [dotted(key) + (f" (line {line})" if line != same[0].location.line else "") for key, line in others]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    times = f" ({len(same)} times)" if len(same) > 1 else ""
    return f" (also {', '.join(names[:3])}{more})" if names else times


class Broken:
    """Replaces an unreadable value after its error is recorded, so that no later check reports it again."""

    def __repr__(self) -> str:
        return "an unreadable value"


BROKEN = Broken()


class NodeError(Exception):
    """A value cannot be read, merged or resolved; the message says why."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a recipe and its source location."""

    content: Any
    """dict[str, Node], list[Node], a plain text, number, bool or None, or BROKEN."""
    location: Location
    key_location: Location
    """The location of the key in front of the value, or the value's own where it has no key."""
    size: int = 1
    """Number of values in it, itself included; repeated aliases count each time."""
    depth: int = 1
    axes: frozenset[str] = frozenset()
    """Axes of the matrix that the value depends on once `${...}` is resolved."""

    @property
    def error_location(self) -> Location:
        """The location to report for a wrong value: its own if that is on the line of its key, else the key's."""
        return self.location if self.location.line == self.key_location.line else self.key_location

    def convert(self, function: Callable[[str | int, Node], Any]) -> Any:
        """Return the content with `function(key or index, node)` in place of each node in it."""
        if isinstance(self.content, dict):
            return {name: function(name, node) for name, node in self.content.items()}
        if isinstance(self.content, list):
            return [function(index, node) for index, node in enumerate(self.content)]
        return self.content

    def to_plain(self) -> Any:
        return self.convert(lambda _, node: node.to_plain())

    def child(self, part: str | int) -> Node | None:
        return item_of(self.content, part)

    def nearest(self, key: Key) -> Node:
        """Return the value under `key`, or its nearest parent in the recipe."""
        node = self
        for part in key:
            if (child := node.child(part)) is None:
                break
            node = child
        return node

    def locate_value(self, key: Key) -> Location:
        """Return the location to report for a wrong value under `key`."""
        return self.nearest(key).error_location

    def with_axis(self, axis: str) -> Node:
        """Mark this value and everything in it as depending on `axis`."""
        content = self.convert(lambda _, node: node.with_axis(axis))
        return replace(self, content=content, axes=self.axes | {axis})

    def merged_over(self, base: Node, key: Key = ()) -> Node:
        """Merge this value, which `key` of the recipe has, over `base`: sections are merged, everything else replaces
        the value in `base`. So does an axis of the matrix, be its values a list or named."""
        is_axis = key[:1] == ("matrix",) and len(key) == 2
        if is_axis or not isinstance(self.content, dict) or not isinstance(base.content, dict):
            return self
        merged = dict(base.content)
        for name, node in self.content.items():
            merged[name] = node.merged_over(merged[name], (*key, name)) if name in merged else node
        return make_node(merged, self.location, self.key_location)

    def with_value(self, key: Key, value: Node, parents: Key = ()) -> Node:
        """Merge `value` over the value under `key`; missing sections are created. Raises NodeError."""
        if not key:
            return value.merged_over(self, parents)
        part, *rest = key
        if isinstance(self.content, list):
            if not isinstance(part, int) or part >= len(self.content):
                raise NodeError(f"{part!r} is not an item of a list of {len(self.content)}; the first is 0")
            items = list(self.content)
            items[part] = items[part].with_value(tuple(rest), value, (*parents, part))
            return make_node(items, self.location, self.key_location)
        section = dict(self.content) if isinstance(self.content, dict) else {}
        inner = section.get(str(part), replace(value, content={}, size=1, depth=1) if rest else value)
        section[str(part)] = inner.with_value(tuple(rest), value, (*parents, part))
        return make_node(section, self.location, self.key_location)


def make_node(content: dict[str, Node] | list[Node], location: Location, key_location: Location) -> Node:
    """Build the node of a section or list. Raises NodeError."""
    children = content.values() if isinstance(content, dict) else content
    size, depth = 1 + sum(node.size for node in children), 1 + max((node.depth for node in children), default=0)
    if depth > MAX_DEPTH:
        raise NodeError(f"nested deeper than {MAX_DEPTH} levels; make it flatter")
    if size > MAX_VALUES:
        raise NodeError(f"has more than {MAX_VALUES:,} values with its aliases expanded; repeat less")
    return Node(content, location, key_location, size, depth, frozenset().union(*(node.axes for node in children)))
