"""The `matrix` of a recipe -> its cells, each with one value per axis.

matrix:
  prompt: [0, 0.2, 0.4]                                # an axis; stages use its value as ${matrix.prompt}
  data: {lima: ./lima.jsonl, alpaca: ./alpaca.jsonl}   # an axis with named values
  exclude: [{prompt: 0, data: lima}]                   # leaves out the cells that match one of these
  include: [{prompt: 0.1, data: lima}]                 # further cells
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.recipe.nodes import BROKEN, Key, Node, Problem, RecipeError, scalar_text
from stages.system.did_you_mean import did_you_mean, list_choices

MATRIX = "matrix"
MAX_CELLS = 100_000
"""Limit for one recipe, before `exclude`."""
_CELL_LISTS = ("exclude", "include")
_AXIS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,49}")
_LABEL = re.compile(r"[^\s\[\],=\x00-\x1f]{1,60}")
"""Labels are part of step names and of `--cells`."""


@dataclass(frozen=True)
class Cell:
    """One combination of values: axis -> its label, as a person writes it, and axis -> its value."""

    labels: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Node] = field(default_factory=dict)


def label_value(value: Any) -> str:
    """Return the label of a value in step names and `--cells`; 0.20 and 0.2 have the same, sections and lists none."""
    if isinstance(value, dict | list):
        return ""
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return scalar_text(value)


def join_labels(labels: Mapping[str, str]) -> str:
    """Return `prompt=0.2,completion=0.8`."""
    return ",".join(f"{axis}={label}" for axis, label in labels.items())


def select_cells(cells: Sequence[Cell], filters: Sequence[str]) -> list[Cell]:
    """Return the cells that match one of the `--cells` filters, AXIS=VALUE[,AXIS=VALUE]. Raises RecipeError."""
    if not cells:
        raise RecipeError([f"--cells {filters[0]}: the recipe has no matrix"])
    conditions = [dict(_parse_condition(part, cells, text) for part in text.split(",")) for text in filters]
    for text, labels in zip(filters, conditions, strict=True):
        if not any(labels.items() <= cell.labels.items() for cell in cells):
            raise RecipeError([f"--cells {text}: the matrix has no such cell"])
    return [cell for cell in cells if any(labels.items() <= cell.labels.items() for labels in conditions)]


def _parse_condition(part: str, cells: Sequence[Cell], text: str) -> tuple[str, str]:
    axis, equals, value = (word.strip() for word in part.partition("="))
    axes = list(cells[0].labels)
    if not equals or axis not in axes:
        hint = did_you_mean(axis, axes) if equals else "; write AXIS=VALUE"
        raise RecipeError([f"--cells {text}: {axis!r} is no axis of the matrix{hint}; it has {', '.join(axes)}"])
    labels = list(dict.fromkeys(cell.labels[axis] for cell in cells))
    if value not in labels:
        with contextlib.suppress(ValueError):
            value = label_value(float(value))
    if value not in labels:
        hint = did_you_mean(value, labels) + list_choices("it is", labels)
        raise RecipeError([f"--cells {text}: {axis} is never {value!r}{hint}"])
    return axis, value


@dataclass
class MatrixReader:
    """Reads the section `matrix`, and collects its errors."""

    problems: list[Problem] = field(default_factory=list)

    def report(self, node: Node, key: Key, text: str) -> None:
        self.problems.append(Problem(node.error_location, (MATRIX, *key), text))

    def read(self, matrix: Node) -> list[Cell]:
        """Return the cells, in the order of the axes and their values."""
        if not isinstance(matrix.content, dict):
            if matrix.content is not BROKEN:
                self.report(matrix, (), "must be a mapping of axes to their values: prompt: [0, 0.2, 0.4]")
            return []
        axes = {name: self.read_axis(name, node) for name, node in matrix.content.items() if name not in _CELL_LISTS}
        count = math.prod(len(values) for values in axes.values())
        if not axes:
            self.report(matrix, (), "has no axis; add one with its values, such as prompt: [0, 0.2, 0.4]")
        elif count > MAX_CELLS:
            self.report(matrix, (), f"has {count:,} cells, more than {MAX_CELLS:,}; split it into several recipes")
        if self.problems or count == 0:
            return []
        excluded = list(self.read_cell_list(matrix, "exclude", axes))
        product = [dict(zip(axes, labels, strict=True)) for labels in itertools.product(*axes.values())]
        cells = [cell for cell in product if not any(partial.items() <= cell.items() for partial in excluded)]
        for included in self.read_cell_list(matrix, "include", axes):
            if included not in cells:
                cells.append({axis: included[axis] for axis in axes})
        if not cells and not self.problems:
            self.report(matrix.content["exclude"], ("exclude",), "leaves no cell")
        return [Cell(labels, {axis: axes[axis][label] for axis, label in labels.items()}) for labels in cells]

    def read_axis(self, name: str, node: Node) -> dict[str, Node]:
        if not _AXIS.fullmatch(name):
            text = "is not a valid name of an axis; use letters, digits and _"
            self.problems.append(Problem(node.key_location, (MATRIX, name), text))
        if node.content is BROKEN:
            return {}
        if not isinstance(node.content, dict | list) or not node.content:
            self.report(node, (name,), "must be a list of values, or a mapping of names to values, with at least one")
            return {}
        values: dict[str, Node] = {}
        items = node.content.items() if isinstance(node.content, dict) else enumerate(node.content)
        for part, value in items:
            if value.content is BROKEN:
                return {}
            label = part if isinstance(part, str) else label_value(value.content)
            if not _LABEL.fullmatch(label):
                text = f"{label!r} is not a valid name; use 1 to 60 characters, none of [ ] , = or space"
                unnamed = "needs a short name: make the axis a mapping, {NAME: value, ...}"
                self.report(value, (name, part), text if isinstance(part, str) else unnamed)
            elif label in values:
                self.report(value, (name, part), f"is listed twice: {label}; remove one")
            values[label] = value.with_axis(name)
        return values

    def read_cell_list(self, matrix: Node, name: str, axes: dict[str, dict[str, Node]]) -> Iterator[dict[str, str]]:
        """Yield the items of `exclude` or `include` as axis -> label. Values new to `include` are added to `axes`."""
        section = matrix.content.get(name)
        if section is None:
            return
        if not isinstance(section.content, list):
            self.report(section, (name,), "must be a list of mappings, such as [{prompt: 0, completion: 0}]")
            return
        for index, item in enumerate(section.content):
            key: Key = (name, index)
            if not isinstance(item.content, dict) or not item.content:
                self.report(item, key, "must be a mapping of axes to values, such as {prompt: 0, completion: 0}")
                continue
            labels: dict[str, str] = {}
            for axis, value in item.content.items():
                if axis not in axes:
                    text = f"is no axis{did_you_mean(axis, axes)}; the axes are {', '.join(axes)}"
                    self.problems.append(Problem(value.key_location, (MATRIX, *key, axis), text))
                else:
                    labels[axis] = self.find_label(value, (*key, axis), axes[axis], matrix.content[axis])
            if name == "include" and (missing := [axis for axis in axes if axis not in item.content]):
                self.report(item, key, f"does not set {', '.join(missing)}; a cell to include sets every axis")
            elif len(labels) == len(item.content):
                yield labels

    def find_label(self, value: Node, key: Key, values: dict[str, Node], axis: Node) -> str:
        label = label_value(value.content)
        if not _LABEL.fullmatch(label):
            self.report(value, key, "must be one value of the axis: a plain value or its name")
        elif label not in values and isinstance(axis.content, dict):
            hint = did_you_mean(label, values) + list_choices("it has", values)
            self.report(value, key, f"{label!r} is no value of the axis{hint}")
        elif label not in values and key[0] == "include":
            values[label] = value.with_axis(str(key[-1]))
        return label
