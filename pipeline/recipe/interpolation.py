"""`${stages.wit.seed}` in a recipe -> the value that stands under that key; `${matrix.prompt}` -> the cell's value.

Nothing else is looked up, least of all the environment: a recipe is shared and recorded.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pipeline.recipe.did_you_mean import did_you_mean
from pipeline.recipe.matrix import MATRIX, Cell
from pipeline.recipe.nodes import BROKEN, MAX_DEPTH, Key, Node, Problem, TooLargeError, dotted, made, split_key

_REFERENCE = re.compile(r"(?P<escape>\\)?\$\{(?P<key>[^{}]*)(?P<end>\})?")
MAX_TEXT = 1_000_000
"""Characters of one text, its references written out."""
STILL_TO_GIVE = "???"
"""A value that a recipe leaves to those that extend it or to `--set`."""


class _BadReferenceError(Exception):
    """The message says which reference is wrong, and why."""


class Resolver:
    """Looks up the references of a recipe, for one cell of its matrix after the other.

    What depends on some axes only is looked up once for all cells that agree in them, and is one and the same node.
    """

    def __init__(self, tree: Node) -> None:
        self.tree = tree
        self.problems: list[Problem] = []
        """What is wrong with references so far; values that have one are BROKEN."""
        self._cell = Cell()
        self._axes: dict[int, tuple[str, ...]] = {}
        """id of a container, or of a text with references -> the axes that it depends on. The tree keeps them alive."""
        self._done: dict[tuple[int, tuple[str | None, ...]], Node] = {}
        """That id and the cell's values on those axes -> what it becomes."""
        self._under_way: dict[int, Key] = {}
        """Those whose references are being looked up, outermost first."""

    def matrix(self) -> Node | None:
        """The section `matrix`, to be divided into cells; None where the recipe has none."""
        node = self.tree.child(MATRIX)
        return None if node is None else self._value(node, (MATRIX,))

    def cell(self, cell: Cell) -> Node:
        """The recipe of one cell, without its matrix."""
        self._cell = cell
        sections = {name: node for name, node in self.tree.content.items() if name != MATRIX}
        resolved = {name: self._value(node, (name,)) for name, node in sections.items()}
        try:
            return made(resolved, self.tree.place, self.tree.key)
        except TooLargeError as error:
            self.problems.append(Problem(self.tree.place, (), str(error)))
            return replace(self.tree, content=BROKEN)

    def _value(self, node: Node, key: Key) -> Node:
        if not isinstance(node.content, dict | list | str):
            return node
        if isinstance(node.content, str) and "${" not in node.content and node.content != STILL_TO_GIVE:
            return node
        if id(node) in self._axes and (known := self._done.get(self._known_by(node))):
            return known
        self._under_way[id(node)] = key
        try:
            value = self._content(node, key)
        except (_BadReferenceError, TooLargeError) as error:
            self.problems.append(Problem(node.error_location, key, str(error)))
            value = replace(node, content=BROKEN, size=1, depth=1)
        finally:
            del self._under_way[id(node)]
        self._axes[id(node)] = tuple(sorted(value.axes))
        self._done[self._known_by(node)] = value
        return value

    def _known_by(self, node: Node) -> tuple[int, tuple[str | None, ...]]:
        return id(node), tuple(self._cell.labels.get(axis) for axis in self._axes[id(node)])

    def _content(self, node: Node, key: Key) -> Node:
        if isinstance(node.content, dict):
            section = {name: self._value(inner, (*key, name)) for name, inner in node.content.items()}
            return made(section, node.place, node.key)
        if isinstance(node.content, list):
            items = [self._value(inner, (*key, index)) for index, inner in enumerate(node.content)]
            return made(items, node.place, node.key)
        if node.content == STILL_TO_GIVE:
            raise _BadReferenceError(f"is {STILL_TO_GIVE!r}, a value still to be given")
        if (whole := _REFERENCE.fullmatch(node.content)) and not whole["escape"]:
            return replace(self._target(whole), place=node.place, key=node.key)
        return self._text(node)

    def _text(self, node: Node) -> Node:
        """A text with references in it; `\\${` stands for the two characters."""
        text, parts, end = node.content, [], 0
        axes: frozenset[str] = frozenset()
        for found in _REFERENCE.finditer(text):
            parts.append(text[end : found.start()])
            end = found.end()
            if found["escape"]:
                parts.append(found[0][1:])
                continue
            value = self._target(found)
            if value.content is BROKEN:
                return replace(node, content=BROKEN)
            parts.append(_as_text(found, value.content))
            axes |= value.axes
            if sum(map(len, parts)) > MAX_TEXT:
                raise _BadReferenceError(f"is a text of more than {MAX_TEXT:,} characters")
        return replace(node, content="".join(parts) + text[end:], axes=axes)

    def _target(self, reference: re.Match[str]) -> Node:
        """The resolved value that a reference names."""
        if not reference["end"]:
            raise _BadReferenceError("'${' is not closed by '}'; write \\${ for the two characters themselves")
        key = split_key(reference["key"])
        if dotted(key) != reference["key"].strip() or not key:
            raise _BadReferenceError(
                f"{reference[0]!r} names no key of the recipe; write one like ${{stages.NAME.seed}}"
            )
        if key[0] == MATRIX and MATRIX in self.tree.content:
            return self._of_cell(reference, key)
        return self._below(self.tree, (), key, reference)

    def _of_cell(self, reference: re.Match[str], key: Key) -> Node:
        """What `${matrix.AXIS}`, or a key within its value, stands for."""
        if id(self.tree.content[MATRIX]) in self._under_way:
            raise _BadReferenceError(f"{reference[0]!r} stands in the matrix itself; write the value there")
        if not self._cell.values:  # nothing is known of the matrix but what is wrong with it
            return replace(self.tree.content[MATRIX], content=BROKEN)
        value = self._cell.values.get(str(key[1])) if len(key) > 1 else None
        if value is None:
            axes = self._cell.values
            hint = did_you_mean(str(key[1]), axes) if len(key) > 1 else ""
            raise _BadReferenceError(f"{reference[0]!r} names no axis of the matrix{hint}; it has {', '.join(axes)}")
        return self._below(value, key[:2], key[2:], reference, resolved=True)

    def _below(self, node: Node, above: Key, key: Key, reference: re.Match[str], resolved: bool = False) -> Node:
        """The resolved value under `key` within `node`, which stands under `above`."""
        for index, part in enumerate(key):
            if isinstance(node.content, str) and not resolved:
                node, resolved = self._looked_up(node, key[:index]), True
            if node.content is BROKEN:
                return node
            if (inner := node.child(part)) is None:
                known = node.content if isinstance(node.content, dict) else ()
                missing = dotted((*above, *key[: index + 1]))
                raise _BadReferenceError(f"{reference[0]!r}: there is no {missing}{did_you_mean(str(part), known)}")
            node = inner
        return node if resolved else self._looked_up(node, key)

    def _looked_up(self, node: Node, key: Key) -> Node:
        if id(node) in self._under_way:
            way = list(self._under_way)
            names = [dotted(self._under_way[i]) for i in way[way.index(id(node)) :]]
            raise _BadReferenceError(f"refers to itself: {' -> '.join([*names, names[0]])}")
        if len(self._under_way) > 2 * MAX_DEPTH:
            raise _BadReferenceError(f"refers to a reference to a reference, more than {MAX_DEPTH} deep")
        return self._value(node, key)


def _as_text(reference: re.Match[str], value: Any) -> str:
    if isinstance(value, dict | list):
        raise _BadReferenceError(f"{reference[0]!r} is a section or list, which no text can hold")
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
