"""Tables of what comes after instruction tuning: preference tuning from each start, and sensitivity to wording."""

from __future__ import annotations

from collections.abc import Sequence

from stages.report.averages import average, compare
from stages.report.results import Column, Difference, Model, Results
from stages.report.runs import Part
from stages.report.tables import MISSING, Cell, Table, column_labels, number


def preference_table(parts: Sequence[Part]) -> Table:
    """Every model tuned on preferences beside the one that it started from, by the average over benchmarks; and how far
    it is from the one that started from conventional instruction tuning."""
    rows = []
    for part in parts:
        tuned = [(model, start) for model in part.results.models if (start := _start(part.results, model))]
        reference = next((model for model, start in tuned if start is part.baseline), None)
        for model, start in tuned:
            own = average(part.results, model)
            row = [Cell(part.name)] if len(parts) > 1 else []
            row += [Cell(model.label), _average(part.results, start)]
            row.append(Cell(number(own.value, own.stderr, points=True) if own else MISSING))
            row.append(_change(compare(part.results, model, start)))
            against = compare(part.results, model, reference) if reference and reference is not model else None
            row.append(_change(against) if reference is not model else Cell(""))
            rows.append(row)
    first = ["run"] if len(parts) > 1 else []
    return Table([*first, "model", "its start", "after", "change", "against the one from IT"], rows)


def _start(results: Results, model: Model) -> Model | None:
    """The measured model that a preference-tuned one started from."""
    if model.stage != "dpo" or len(model.lineage) < 2:
        return None
    before = model.lineage[1]
    made = (before.step, before.fingerprint)
    return next(
        (m for m in results.models if m.lineage and (m.lineage[0].step, m.lineage[0].fingerprint) == made), None
    )


def _average(results: Results, model: Model) -> Cell:
    own = average(results, model)
    return Cell(f"{model.label}: {number(own.value, own.stderr, points=True)}" if own else MISSING)


def _change(found: Difference | None) -> Cell:
    return Cell(MISSING if found is None else number(found.value, found.stderr, points=True, sign=True))


def robustness_table(parts: Sequence[Part]) -> Table:
    """How much each model's answers depend on the wording (POSIX; less is better), and the relative difference from
    conventional instruction tuning."""
    heads: dict[str, None] = {}
    rows: list[tuple[str, str, dict[str, Cell]]] = []
    for part in parts:
        results = part.results
        columns = [column for column in results.columns(headline=True) if _is_sensitivity(results, column)]
        for model in results.models:
            cells: dict[str, Cell] = {}
            for column, label in zip(columns, column_labels(results, columns, with_metric=False), strict=True):
                score = results.score(model, column)
                if score is None or score.value is None:
                    continue
                cells[label] = Cell(number(score.value, score.stderr, points=False), link=results.link(score.step))
                its = results.score(part.baseline, column) if part.baseline else None
                if its and its.value and model is not part.baseline:
                    cells[f"{label} against IT"] = Cell(f"{100 * (score.value / its.value - 1):+.1f} %")
                heads |= dict.fromkeys([label, f"{label} against IT"])
            if cells:
                rows.append((part.name, model.label, cells))
    first = ["run"] if len(parts) > 1 else []
    made = [
        [*([Cell(run)] if first else []), Cell(model), *(cells.get(head, Cell("")) for head in heads)]
        for run, model, cells in rows
    ]
    return Table([*first, "model", *heads], made)


def _is_sensitivity(results: Results, column: Column) -> bool:
    return any(
        results.evaluations[score.step].kind == "sensitivity" for score in results.scores if score.column == column
    )
