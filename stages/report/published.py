"""Grids that were measured elsewhere, out of a CSV file, as the same panels that our own results make."""

from __future__ import annotations

import csv
from pathlib import Path

from stages.base import UserError
from stages.report.grid import Called, Cell, Pair, Panel

COLUMNS = ("model", "dataset", "prompt_weight", "response_weight", "average_score")
NOTHING: Pair = (0.0, 0.0)
"""The pair that trains nothing: the base model."""


def read_grids(file: Path) -> list[Panel]:
    """The panels of the file, in its order, their scores as shares.

    Raises UserError, with the place, for what is not such a table.
    """
    cells: dict[Called, dict[Pair, Cell]] = {}
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines)
            if lack := [name for name in COLUMNS if name not in (rows.fieldnames or ())]:
                raise UserError(f"{file}:1: has no column {', '.join(lack)}; it needs {', '.join(COLUMNS)}")
            for row in rows:
                called, pair, score = _row(row, f"{file}:{rows.line_num}")
                if pair in cells.setdefault(called, {}):
                    raise UserError(f"{file}:{rows.line_num}: {', '.join(map(str, called))} has {pair} twice")
                cells[called][pair] = Cell((score,))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read as CSV ({error})") from None
    made = []
    for called, found in cells.items():
        base = found.pop(NOTHING, None)
        if not found:
            raise UserError(f"{file}: {', '.join(map(str, called))} has no pair of weights but (0, 0)")
        made.append(Panel(", ".join(map(str, called)), found, base, called=called))
    if not made:
        raise UserError(f"{file}: has no rows")
    return made


def _row(row: dict[str, str], place: str) -> tuple[Called, Pair, float]:
    """Model and data, weights, and the score as a share."""
    numbers = []
    for name in COLUMNS[2:]:
        try:
            numbers.append(float(row[name]))
        except (TypeError, ValueError):
            raise UserError(f"{place}: {name} is {row[name]!r}, which is no number") from None
    prompt, completion, score = numbers
    for name, weight in zip(COLUMNS[2:], (prompt, completion), strict=False):
        if not 0 <= weight <= 1:
            raise UserError(f"{place}: {name} is {weight:g}; weights are between 0 and 1")
    if not 0 <= score <= 100:
        raise UserError(f"{place}: average_score is {score:g}; it is in points, between 0 and 100")
    return (row["model"], row["dataset"]), (prompt, completion), score / 100
