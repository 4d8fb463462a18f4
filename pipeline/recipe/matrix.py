"""The `matrix` of a recipe -> its cells: the value that every axis has in each.

    matrix:
      prompt: [0, 0.2, 0.4]                                # an axis, to which stages refer by ${matrix.prompt}
      data: {lima: ./lima.jsonl, alpaca: ./alpaca.jsonl}   # one whose values have names of their own
      exclude: [{prompt: 0, data: lima}]                   # no cells that agree with one of these
      include: [{prompt: 0.1, data: lima}]                 # further cells

What a cell's stages are is said in pipeline.recipe.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.recipe.did_you_mean import did_you_mean, listed
from pipeline.recipe.nodes import BROKEN, Key, Node, Problem

MATRIX = "matrix"
MAX_CELLS = 100_000
"""Of one recipe, before any is excluded."""
_LISTS = ("exclude", "include")
_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,49}")
_LABEL = re.compile(r"[^\s\[\],=\x00-\x1f]{1,60}")
"""What may stand in a step's name and after `--cells`."""


@dataclass(frozen=True)
class Cell:
    """One combination of values."""

    labels: Mapping[str, str] = field(default_factory=dict)
    """Axis -> its value as a person writes it."""
    values: Mapping[str, Node] = field(default_factory=dict)
    """Axis -> its value; its `axes` name the axis."""


def label(value: Any) -> str:
    """A plain value as names of steps and `--cells` show it: 0.20 and 0.2 are the same."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def described(labels: Mapping[str, str]) -> str:
    """`prompt=0.2,completion=0.8`."""
    return ",".join(f"{axis}={value}" for axis, value in labels.items())


def cells_of(matrix: Node) -> tuple[list[Cell], list[Problem]]:
    """The cells of the section `matrix`, in the order of its axes and their values, and what is wrong with it."""
    reader = _Reader()
    return reader.cells(matrix), reader.problems


def chosen(cells: Sequence[Cell], asked: Sequence[str]) -> list[Cell]:
    """The cells that `--cells` asks for: those that agree with all parts of one of `asked`, AXIS=VALUE[,AXIS=VALUE].

    Raises:
        ValueError: there is none; the message says what there is.
    """
    found: dict[int, Cell] = {}
    for text in asked:
        wanted = dict(_part(part, cells, text) for part in text.split(","))
        agree = [i for i, cell in enumerate(cells) if wanted.items() <= cell.labels.items()]
        if not agree:
            raise ValueError(f"--cells {text}: the matrix has no such cell")
        found |= {i: cells[i] for i in agree}
    return [found[i] for i in sorted(found)]


def _part(part: str, cells: Sequence[Cell], text: str) -> tuple[str, str]:
    axis, equals, value = (word.strip() for word in part.partition("="))
    axes = list(cells[0].labels)
    if not equals or axis not in axes:
        hint = did_you_mean(axis, axes) if equals else "; write AXIS=VALUE"
        raise ValueError(f"--cells {text}: {axis!r} is no axis of the matrix{hint}; it has {', '.join(axes) or 'none'}")
    known = list(dict.fromkeys(cell.labels[axis] for cell in cells))
    if value not in known:
        with contextlib.suppress(ValueError):
            value = label(float(value))
    if value not in known:
        raise ValueError(
            f"--cells {text}: {axis} is never {value!r}{did_you_mean(value, known)}{listed('it is', known)}"
        )
    return axis, value


@dataclass
class _Reader:
    problems: list[Problem] = field(default_factory=list)

    def wrong(self, node: Node, key: Key, text: str) -> None:
        self.problems.append(Problem(node.error_location, (MATRIX, *key), text))

    def cells(self, matrix: Node) -> list[Cell]:
        if not isinstance(matrix.content, dict):
            if matrix.content is not BROKEN:
                self.wrong(matrix, (), "is a mapping of axes to their values: prompt: [0, 0.2, 0.4]")
            return []
        axes = {name: self.axis(name, node) for name, node in matrix.content.items() if name not in _LISTS}
        if not axes:
            self.wrong(matrix, (), "names no axis; write one with its values, such as prompt: [0, 0.2, 0.4]")
            return []
        if self.problems or not all(axes.values()):
            return []
        count = math.prod(len(values) for values in axes.values())
        if count > MAX_CELLS:
            self.wrong(matrix, (), f"makes {count:,} cells, more than {MAX_CELLS:,}; split it into several recipes")
            return []
        excluded = [dict(partial) for partial in self.partials(matrix, "exclude", axes)]
        made = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())]
        kept = [cell for cell in made if not any(partial.items() <= cell.items() for partial in excluded)]
        for partial in self.partials(matrix, "include", axes):
            if {axis: partial[axis] for axis in axes} not in kept:
                kept.append({axis: partial[axis] for axis in axes})
        if not kept and not self.problems:
            self.wrong(matrix.content["exclude"], ("exclude",), "leaves no cell")
        return [Cell(cell, {axis: axes[axis][text] for axis, text in cell.items()}) for cell in kept]

    def axis(self, name: str, node: Node) -> dict[str, Node]:
        """Label -> value."""
        if not _AXIS.fullmatch(name):
            self.problems.append(Problem(node.key, (MATRIX, name), "is no name of an axis; use letters, digits and _"))
        if node.content is BROKEN:
            return {}
        if not isinstance(node.content, dict | list) or not node.content:
            self.wrong(node, (name,), "is a list of values, or a mapping of names to values, with at least one")
            return {}
        found: dict[str, Node] = {}
        items = node.content.items() if isinstance(node.content, dict) else enumerate(node.content)
        for part, value in items:
            if value.content is BROKEN:
                return {}
            text = part if isinstance(part, str) else self.label(name, part, value)
            if not _LABEL.fullmatch(text):
                self.wrong(value, (name, part), f"{text!r} names no value; use 1 to 60 signs, none of [ ] , = or space")
            elif text in found:
                self.wrong(value, (name, part), f"stands twice: {text}; leave one out")
            found[text] = value.depending_on(name)
        return found

    def label(self, axis: str, part: int, value: Node) -> str:
        if isinstance(value.content, dict | list):
            self.wrong(value, (axis, part), "needs a name: make the axis a mapping, {NAME: value, ...}")
            return f"item{part}"
        text = label(value.content)
        if not _LABEL.fullmatch(text):
            self.wrong(value, (axis, part), "needs a short name: make the axis a mapping, {NAME: value, ...}")
            return f"item{part}"
        return text

    def partials(self, matrix: Node, which: str, axes: dict[str, dict[str, Node]]) -> Iterator[dict[str, str]]:
        """The items of `exclude` or `include` as axis -> label; values that only `include` names join their axis."""
        section = matrix.content.get(which)
        if section is None:
            return
        if not isinstance(section.content, list):
            self.wrong(section, (which,), "is a list of mappings, such as [{prompt: 0, completion: 0}]")
            return
        for index, item in enumerate(section.content):
            if not isinstance(item.content, dict) or not item.content:
                self.wrong(item, (which, index), "is a mapping of axes to values, such as {prompt: 0, completion: 0}")
                continue
            partial: dict[str, str] = {}
            for axis, value in item.content.items():
                if axis not in axes:
                    text = f"is no axis{did_you_mean(axis, axes)}; the axes are {', '.join(axes)}"
                    self.problems.append(Problem(value.key, (MATRIX, which, index, axis), text))
                else:
                    partial[axis] = self.given(value, (which, index, axis), axes[axis], matrix.content[axis], which)
            if which == "include" and (lacking := [axis for axis in axes if axis not in item.content]):
                self.wrong(item, (which, index), f"lacks {', '.join(lacking)}; a cell to include names every axis")
            elif len(partial) == len(item.content):
                yield partial

    def given(self, value: Node, key: Key, known: dict[str, Node], axis: Node, which: str) -> str:
        """The label of a value in `exclude` or `include`."""
        if isinstance(value.content, dict | list) or not _LABEL.fullmatch(label(value.content)):
            self.wrong(value, key, "names one value of the axis, as a list of plain values or by its name")
            return ""
        text = label(value.content)
        if text not in known and isinstance(axis.content, dict):
            self.wrong(
                value, key, f"{text!r} is no value of the axis{did_you_mean(text, known)}{listed('it has', known)}"
            )
        elif text not in known and which == "include":
            known[text] = value.depending_on(str(key[-1]))
        return text
