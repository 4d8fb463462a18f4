"""A prefix tree of token sequences, which holds each shared prefix once, and the forward passes that cover it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tokens = tuple[int, ...]

LEAST_SHARED = 32
"""Tokens of a shared prefix that are worth a pass of their own; shorter ones are computed with each continuation."""


@dataclass
class Node:
    """A part of neighbouring sequences: the tokens from `start` on that sequences `first` up to `stop` share."""

    tokens: Tokens
    start: int
    first: int
    stop: int = 0
    children: "list[Node]" = field(default_factory=list)
    size: int = 0
    """Tokens in it and below it."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def below(self) -> "Iterator[tuple[Node, int]]":
        """Yield the node and all below it, each after its parent, with the parent's index in this order."""
        waiting = [(self, -1)]
        index = 0
        while waiting:
            node, parent = waiting.pop()
            yield node, parent
            waiting += [(child, index) for child in reversed(node.children)]
            index += 1


def prefix_tree(sequences: Sequence[Tokens]) -> Node:
    """Build the tree of sorted, different sequences; its root has no tokens."""
    root = Node((), 0, 0)
    path, before = [root], Tokens()
    for number, sequence in enumerate(sequences):
        shared = shared_length(before, sequence)
        while path[-1].start >= shared and len(path) > 1:
            path.pop()
        last = path[-1]
        if last.end > shared:
            cut = shared - last.start
            last.children = [Node(last.tokens[cut:], shared, last.first, children=last.children)]
            last.tokens = last.tokens[:cut]
        path.append(Node(sequence[shared:], shared, number))
        last.children.append(path[-1])
        before = sequence
    for node, _ in reversed(list(root.below())):
        node.stop = node.children[-1].stop if node.children else node.first + 1
        node.size = len(node.tokens) + sum(child.size for child in node.children)
    return root


def shared_length(one: Tokens, other: Tokens) -> int:
    """Return how many tokens both sequences start with."""
    differences = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differences, min(len(one), len(other)))


@dataclass(frozen=True)
class Pass:
    """One step through a tree, with the keys and values of `known` tokens in the cache.

    `read` reads a pack of nodes with all below them, and forgets them. `keep` reads one node without those below, which
    come next and continue it. `forget` drops the tokens of a node that was kept.
    """

    action: Literal["read", "keep", "forget"]
    nodes: list[Node]
    known: int


def passes(root: Node, sequences: Sequence[Tokens], budget: int) -> Iterator[Pass]:
    """Yield passes that cover each node once, and short prefixes again. Several nodes in a pass fit the `budget`."""
    pack: list[Node] = []
    levels, kept, known = [root.children[::-1]], [root], 0
    while levels:
        node = levels[-1].pop() if levels[-1] else None
        fits = node is not None and sum(each.size for each in pack) + node.size <= budget
        if pack and not fits and (node is None or node.size <= budget or not _is_short(node)):
            yield Pass("read", pack, known)
            pack = []
        if node is None:
            levels.pop()
            if done := kept.pop().tokens:
                known -= len(done)
                yield Pass("forget", [Node(done, known, 0)], known)
        elif node.size <= budget:
            pack.append(node)
        elif _is_short(node):
            levels[-1] += _continuations(node, sequences)[::-1]
        else:
            yield Pass("keep", [node], known)
            known += len(node.tokens)
            levels.append(node.children[::-1])
            kept.append(node)


def _is_short(node: Node) -> bool:
    return len(node.tokens) < LEAST_SHARED and bool(node.children)


def _continuations(node: Node, sequences: Sequence[Tokens]) -> list[Node]:
    """The children of a node, each with the node's own tokens before it, and the sequence that ends with these."""
    ends = [Node(node.tokens, node.start, node.first, node.first + 1, size=len(node.tokens))]
    count = len(node.tokens)
    return (ends if len(sequences[node.first]) == node.end else []) + [
        Node(node.tokens + child.tokens, node.start, child.first, child.stop, child.children, child.size + count)
        for child in node.children
    ]
