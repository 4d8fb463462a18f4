"""Where each key of a recipe was written: which file and line, so that errors and relative paths can refer to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

Key = tuple[str | int, ...]


def split_key(key: str) -> Key:
    """A dotted key, `a.b[0]` or `a.b.0`, in its parts."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


@dataclass(frozen=True)
class Place:
    """A line of a recipe file, or an override on the command line."""

    file: str
    line: int | None
    folder: Path
    """What paths written here are relative to."""

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


class Places:
    """Key -> Place, for all keys of a recipe and of those it extends."""

    def __init__(self) -> None:
        self._known: dict[Key, Place] = {}

    def note(self, path: Path, node: yaml.Node) -> None:
        """Note every key of a file's YAML tree; what was noted for the same key before gives way."""
        self._walk(path, node, (), node.start_mark.line + 1)

    def note_override(self, text: str, key: Key) -> None:
        """Note that `--set text` wrote `key`."""
        self._forget_below(key)
        place = Place(f"--set {text}", None, Path.cwd())
        for end in range(1, len(key)):
            self._known.setdefault(key[:end], place)  # sections that only the override speaks of
        self._known[key] = place

    def at(self, key: Key) -> Place:
        """The place of `key`, or of its nearest parent that was written down."""
        for end in range(len(key), -1, -1):
            if place := self._known.get(tuple(key[:end])):
                return place
        raise KeyError(key)

    def _walk(self, path: Path, node: yaml.Node, key: Key, line: int) -> None:
        if not isinstance(node, yaml.MappingNode):
            self._forget_below(key)
        self._known[key] = Place(str(path), line, path.parent)
        if isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                if name.value == "<<":
                    self._merge(path, value, key)
            for name, value in node.value:
                if name.value != "<<":
                    self._walk(path, value, (*key, name.value), name.start_mark.line + 1)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._walk(path, value, (*key, index), value.start_mark.line + 1)

    def _merge(self, path: Path, node: yaml.Node, key: Key) -> None:
        """`<<: *anchor` and `<<: [*a, *b]`: the keys stand where the anchor stands."""
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for merged in nodes:
            line = self._known[key].line or 1
            self._walk(path, merged, key, line)

    def _forget_below(self, key: Key) -> None:
        for known in [k for k in self._known if len(k) > len(key) and k[: len(key)] == key]:
            del self._known[known]
