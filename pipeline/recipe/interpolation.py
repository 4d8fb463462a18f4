"""Interpolation: `${stages.wit.seed}` becomes the value of that key, `${matrix.prompt}` the cell's value.

The environment is never read, because recipes are shared and recorded.
"""

import os
import re
from dataclasses import replace

from pipeline.recipe.matrix import MATRIX, Cell
from pipeline.recipe.nodes import (
    BROKEN,
    MAX_DEPTH,
    Key,
    Node,
    NodeError,
    Problem,
    dotted,
    make_node,
    scalar_text,
    split_key,
)
from pipeline.store.references import ENVIRONMENT
from stages.system.did_you_mean import did_you_mean

_PATTERN = re.compile(r"(?P<escape>\\)?\$\{(?P<key>[^{}]*)(?P<end>\})?")
MAX_TEXT = 1_000_000
"""Longest text in characters after interpolation."""
UNSET_VALUE = "???"
"""A value that must be set by `--set` or by a recipe that extends this one."""


class Interpolator:
    """Resolves the interpolations of a recipe, one cell of its matrix after the other.

    Values that depend on some axes only are resolved once for all cells that agree on them, and share one node.
    """

    def __init__(self, tree: Node) -> None:
        self.tree = tree
        self._body = replace(tree, content={name: node for name, node in tree.content.items() if name != MATRIX})
        self.problems: list[Problem] = []
        """Errors so far; the values they concern are BROKEN."""
        self._cell = Cell()
        self._axes: dict[int, tuple[str, ...]] = {}
        """id of a container, or of a text with interpolations -> the axes that it depends on. The tree owns both."""
        self._resolved: dict[tuple[int, tuple[str | None, ...]], Node] = {}
        """That id and the cell's values on those axes -> the resolved node."""
        self._in_progress: dict[int, Key] = {}
        """id -> key of the nodes that are being resolved, outermost first."""

    def resolve_matrix(self) -> Node | None:
        node = self.tree.child(MATRIX)
        return None if node is None else self._resolve(node, (MATRIX,))

    def resolve_cell(self, cell: Cell) -> Node:
        """Resolve the recipe without its matrix for one cell."""
        self._cell = cell
        return self._resolve(self._body, ())

    def _resolve(self, node: Node, key: Key) -> Node:
        if not isinstance(node.content, dict | list | str):
            return node
        if isinstance(node.content, str) and "${" not in node.content and node.content != UNSET_VALUE:
            return node
        if id(node) in self._axes and (resolved := self._resolved.get(self._cache_key(node))):
            return resolved
        self._in_progress[id(node)] = key
        try:
            value = self._resolve_content(node, key)
        except NodeError as error:
            self.problems.append(Problem(node.error_location, key, str(error)))
            value = replace(node, content=BROKEN, size=1, depth=1)
        finally:
            del self._in_progress[id(node)]
        self._axes[id(node)] = tuple(sorted(value.axes))
        self._resolved[self._cache_key(node)] = value
        return value

    def _cache_key(self, node: Node) -> tuple[int, tuple[str | None, ...]]:
        return id(node), tuple(self._cell.labels.get(axis) for axis in self._axes[id(node)])

    def _resolve_content(self, node: Node, key: Key) -> Node:
        if isinstance(node.content, dict | list):
            content = node.convert(lambda part, child: self._resolve(child, (*key, part)))
            return make_node(content, node.location, node.key_location)
        if node.content == UNSET_VALUE:
            raise NodeError(f"is {UNSET_VALUE!r}; set a value here or by --set")
        if (match := _PATTERN.fullmatch(node.content)) and not match["escape"]:
            return replace(self._look_up(match), location=node.location, key_location=node.key_location)
        return self._resolve_text(node)

    def _resolve_text(self, node: Node) -> Node:
        """Replace the interpolations in a text; `\\${` becomes the two characters `${`."""
        text, parts, end = node.content, [], 0
        axes: frozenset[str] = frozenset()
        for match in _PATTERN.finditer(text):
            parts.append(text[end : match.start()])
            end = match.end()
            if match["escape"]:
                parts.append(match[0][1:])
                continue
            value = self._look_up(match)
            if value.content is BROKEN:
                return replace(node, content=BROKEN)
            if isinstance(value.content, dict | list):
                raise NodeError(f"{match[0]!r} is a section or list, which cannot be part of a text")
            parts.append(scalar_text(value.content))
            axes |= value.axes
            if sum(map(len, parts)) > MAX_TEXT:
                raise NodeError(f"is a text of more than {MAX_TEXT:,} characters")
        return replace(node, content="".join(parts) + text[end:], axes=axes)

    def _look_up(self, match: re.Match[str]) -> Node:
        if not match["end"]:
            raise NodeError("'${' is not closed by '}'; write \\${ for the two characters themselves")
        key = split_key(match["key"])
        if dotted(key) != match["key"].strip() or not key:
            raise NodeError(f"{match[0]!r} names no key of the recipe; write one like ${{stages.NAME.seed}}")
        if key[0] != MATRIX or MATRIX not in self.tree.content:
            return self._descend(self.tree, (), key, match)
        if id(self.tree.content[MATRIX]) in self._in_progress:
            raise NodeError(f"{match[0]!r} is inside the matrix; write the value there")
        axes = self._cell.values
        if not axes:  # the matrix itself is wrong
            return replace(self.tree.content[MATRIX], content=BROKEN)
        axis = str(key[1]) if len(key) > 1 else ""
        if axis not in axes:
            text = f"{match[0]!r} names no axis of the matrix{did_you_mean(axis, axes)}; it has {', '.join(axes)}"
            raise NodeError(text)
        return self._descend(axes[axis], key[:2], key[2:], match, resolved=True)

    def _descend(self, node: Node, prefix: Key, key: Key, match: re.Match[str], resolved: bool = False) -> Node:
        """Return the resolved value under `key` within `node`, whose own key is `prefix`."""
        for index, part in enumerate(key):
            if isinstance(node.content, str) and not resolved:
                node, resolved = self._resolve_target(node, key[:index]), True
            if node.content is BROKEN:
                return node
            if (child := node.child(part)) is None:
                names = node.content if isinstance(node.content, dict) else ()
                missing = dotted((*prefix, *key[: index + 1]))
                hint = ENVIRONMENT if missing.isupper() or missing in os.environ else did_you_mean(str(part), names)
                raise NodeError(f"{match[0]!r}: there is no {missing}{hint}")
            node = child
        return node if resolved else self._resolve_target(node, key)

    def _resolve_target(self, node: Node, key: Key) -> Node:
        if id(node) in self._in_progress:
            path = list(self._in_progress)
            names = [dotted(self._in_progress[i]) for i in path[path.index(id(node)) :]]
            raise NodeError(f"refers to itself: {' -> '.join([*names, names[0]])}")
        if len(self._in_progress) > 2 * MAX_DEPTH:
            raise NodeError(f"refers to a value that refers to another one, more than {MAX_DEPTH} deep")
        return self._resolve(node, key)
