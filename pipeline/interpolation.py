"""`${stages.wit.seed}` in a recipe -> the value that stands under that key. Nothing else is looked up, least of all the
environment: a recipe is shared and recorded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.near import near
from pipeline.places import BROKEN, MAX_DEPTH, Broken, Key, Node, Problem, TooLargeError, dotted, made, split_key

_REFERENCE = re.compile(r"(?P<escape>\\)?\$\{(?P<key>[^{}]*)(?P<end>\})?")
MAX_TEXT = 1_000_000
"""Characters of one text, its references written out."""
STILL_TO_GIVE = "???"
"""A value that a recipe leaves to those that extend it or to `--set`."""


class _BadReferenceError(Exception):
    """The message says which reference is wrong, and why."""


def resolve(tree: Node) -> tuple[Node, list[Problem]]:
    """`tree` with every reference replaced by what it names, and the problems; values that have one are BROKEN."""
    resolver = _Resolver(tree)
    return resolver.value(tree, ()), resolver.problems


@dataclass
class _Resolver:
    tree: Node
    problems: list[Problem] = field(default_factory=list)
    done: dict[int, Node] = field(default_factory=dict)
    """id of a container or text with references -> what it becomes; the tree keeps them alive."""
    under_way: dict[int, Key] = field(default_factory=dict)
    """Those whose references are being looked up, outermost first."""

    def value(self, node: Node, key: Key) -> Node:
        if not isinstance(node.content, dict | list | str):
            return node
        if isinstance(node.content, str) and "${" not in node.content and node.content != STILL_TO_GIVE:
            return node
        if id(node) not in self.done:
            self.under_way[id(node)] = key
            try:
                self.done[id(node)] = self.content(node, key)
            except (_BadReferenceError, TooLargeError) as error:
                self.problems.append(Problem(node.told_at, key, str(error)))
                self.done[id(node)] = replace(node, content=BROKEN, size=1, depth=1)
            finally:
                del self.under_way[id(node)]
        return self.done[id(node)]

    def content(self, node: Node, key: Key) -> Node:
        if isinstance(node.content, dict):
            section = {name: self.value(inner, (*key, name)) for name, inner in node.content.items()}
            return made(section, node.place, node.key)
        if isinstance(node.content, list):
            items = [self.value(inner, (*key, index)) for index, inner in enumerate(node.content)]
            return made(items, node.place, node.key)
        if node.content == STILL_TO_GIVE:
            raise _BadReferenceError(f"is {STILL_TO_GIVE!r}, a value still to be given")
        if (whole := _REFERENCE.fullmatch(node.content)) and not whole["escape"]:
            return replace(self.target(whole), place=node.place, key=node.key)
        return replace(node, content=self.text(node.content))

    def text(self, text: str) -> str | Broken:
        """A text with references in it; `\\${` stands for the two characters."""
        parts, end = [], 0
        for found in _REFERENCE.finditer(text):
            parts.append(text[end : found.start()])
            end = found.end()
            if found["escape"]:
                parts.append(found[0][1:])
            elif (value := self.target(found).content) is BROKEN:
                return BROKEN
            else:
                parts.append(_as_text(found, value))
            if sum(map(len, parts)) > MAX_TEXT:
                raise _BadReferenceError(f"is a text of more than {MAX_TEXT:,} characters")
        return "".join(parts) + text[end:]

    def target(self, reference: re.Match[str]) -> Node:
        """The resolved value that a reference names."""
        if not reference["end"]:
            raise _BadReferenceError("'${' is not closed by '}'; write \\${ for the two characters themselves")
        key = split_key(reference["key"])
        if dotted(key) != reference["key"].strip() or not key:
            raise _BadReferenceError(
                f"{reference[0]!r} names no key of the recipe; write one like ${{stages.NAME.seed}}"
            )
        node, resolved = self.tree, False
        for index, part in enumerate(key):
            if isinstance(node.content, str) and not resolved:
                node, resolved = self.looked_up(node, key[:index]), True
            if node.content is BROKEN:
                return node
            if (inner := node.child(part)) is None:
                known = node.content if isinstance(node.content, dict) else ()
                raise _BadReferenceError(
                    f"{reference[0]!r}: there is no {dotted(key[: index + 1])}{near(str(part), known)}"
                )
            node = inner
        return node if resolved else self.looked_up(node, key)

    def looked_up(self, node: Node, key: Key) -> Node:
        if id(node) in self.under_way:
            way = list(self.under_way)
            names = [dotted(self.under_way[i]) for i in way[way.index(id(node)) :]]
            raise _BadReferenceError(f"refers to itself: {' -> '.join([*names, names[0]])}")
        if len(self.under_way) > 2 * MAX_DEPTH:
            raise _BadReferenceError(f"refers to a reference to a reference, more than {MAX_DEPTH} deep")
        return self.value(node, key)


def _as_text(reference: re.Match[str], value: Any) -> str:
    if isinstance(value, dict | list):
        raise _BadReferenceError(f"{reference[0]!r} is a section or list, which no text can hold")
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
