"""A recipe's values with the place where each is written, so that errors and relative paths can refer to it.

How the text of a file becomes such a tree is said in pipeline.document; what the values mean, in pipeline.recipe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Key = tuple[str | int, ...]

MAX_VALUES = 500_000
"""Of a recipe, all aliases and `${...}` written out: far more than any grid has, far less than memory holds."""
MAX_DEPTH = 40
"""Sections within sections."""


def split_key(key: str) -> Key:
    """A dotted key, `a.b[0]` or `a.b.0`, in its parts."""
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", key[:10_000]))


def dotted(key: Key) -> str:
    """A key as a person writes it."""
    return ".".join(map(str, key))


@dataclass(frozen=True, slots=True)
class Location:
    """A line and column of a recipe file, counted from 1, or an override on the command line, which has neither."""

    file: str
    line: int | None
    column: int | None
    folder: Path
    """What paths written here are relative to."""

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Files before overrides, and then from top to bottom."""
        return (self.line is None, self.file, self.line or 0, self.column or 0)

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe."""

    place: Location
    key: Key
    text: str

    def __str__(self) -> str:
        name = f"{dotted(self.key)}: " if self.key else ""
        return f"{self.place}: {name}{self.text}"


def told(problems: Sequence[Problem]) -> list[str]:
    """The problems as lines of text, in the order of their places. What stands in a section that several stages share
    by an alias is told once."""
    once: dict[tuple[Location, Key, str], Problem] = {}
    for problem in problems:
        once.setdefault((problem.place, problem.key[-1:], problem.text), problem)
    return [str(problem) for problem in sorted(once.values(), key=lambda problem: problem.place.order)]


class Broken:
    """Stands in the place of a value that could not be read, so that what is wrong with it is told once."""

    def __repr__(self) -> str:
        return "a value that could not be read"


BROKEN = Broken()


class TooLargeError(Exception):
    """A value that, with its aliases written out, exceeds MAX_VALUES or MAX_DEPTH."""


@dataclass(frozen=True, slots=True)
class Node:
    """A value of a recipe and where it is written."""

    content: Any
    """dict[str, Node], list[Node], a plain value of text, number, bool or None, or BROKEN."""
    place: Location
    key: Location
    """Where the key before it stands; its own place where there is none."""
    size: int = 1
    """How many values it holds, itself among them, each as often as aliases repeat it."""
    depth: int = 1
    axes: frozenset[str] = frozenset()
    """Of the matrix, those on whose values it depends, once `${...}` are looked up."""

    @property
    def error_location(self) -> Location:
        """The place to name when the value is wrong: where it begins, if that is on the line of its key."""
        return self.place if self.place.line == self.key.line else self.key

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.content, dict):
            return {name: node.plain() for name, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def find(self, key: Key) -> Node | None:
        """The value under `key`."""
        node: Node | None = self
        for part in key:
            node = node.child(part) if node else None
        return node

    def child(self, part: str | int) -> Node | None:
        """The value under one part of a key."""
        if isinstance(self.content, dict):
            return self.content.get(str(part))
        if isinstance(self.content, list) and isinstance(part, int) and part < len(self.content):
            return self.content[part]
        return None

    def depending_on(self, axis: str) -> Node:
        """This value as one of an axis: all that is in it depends on that."""
        content = self.content
        if isinstance(content, dict):
            content = {name: node.depending_on(axis) for name, node in content.items()}
        elif isinstance(content, list):
            content = [node.depending_on(axis) for node in content]
        return replace(self, content=content, axes=self.axes | {axis})

    def laid_over(self, below: Node) -> Node:
        """This value over `below`: sections are merged, all else gives way."""
        if not isinstance(self.content, dict) or not isinstance(below.content, dict):
            return self
        merged = dict(below.content)
        for name, node in self.content.items():
            merged[name] = node.laid_over(merged[name]) if name in merged else node
        return made(merged, self.place, self.key)

    def with_value(self, key: Key, value: Node) -> Node:
        """This value with `value` laid over what stands under `key`; sections that are not there are made.

        Raises:
            ValueError: a part of the key is no item of a list.
        """
        if not key:
            return value.laid_over(self)
        part, *rest = key
        if isinstance(self.content, list):
            if not isinstance(part, int) or part >= len(self.content):
                raise ValueError(f"{part!r} is no item of a list of {len(self.content)}; the first is 0")
            items = list(self.content)
            items[part] = items[part].with_value(tuple(rest), value)
            return made(items, self.place, self.key)
        section = dict(self.content) if isinstance(self.content, dict) else {}
        inner = section.get(str(part), replace(value, content={}, size=1, depth=1) if rest else value)
        section[str(part)] = inner.with_value(tuple(rest), value)
        return made(section, self.place, self.key)


def made(content: dict[str, Node] | list[Node], place: Location, key: Location) -> Node:
    """A section or list. Raises TooLargeError."""
    below = content.values() if isinstance(content, dict) else content
    size, depth = 1 + sum(node.size for node in below), 1 + max((node.depth for node in below), default=0)
    if depth > MAX_DEPTH:
        raise TooLargeError(f"nested deeper than {MAX_DEPTH} levels; make it flatter")
    if size > MAX_VALUES:
        raise TooLargeError(f"holds more than {MAX_VALUES:,} values once its aliases are written out; repeat less")
    return Node(content, place, key, size, depth, frozenset().union(*(node.axes for node in below)))


@dataclass(frozen=True)
class SourceMap:
    """Key -> Location, for all keys of a recipe and of those it extends."""

    tree: Node

    def at(self, key: Key) -> Location:
        """The place of the value under `key`, or of its nearest parent that was written down."""
        return self._nearest(key).error_location

    def of_key(self, key: Key) -> Location:
        """The place of `key` itself, or of its nearest parent that was written down."""
        return self._nearest(key).key

    def _nearest(self, key: Key) -> Node:
        node = self.tree
        for part in key:
            if (inner := node.child(part)) is None:
                break
            node = inner
        return node
