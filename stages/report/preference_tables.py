"""Tables of preference tuning from each start, and of the sensitivity of answers to the wording of prompts."""

from collections.abc import Sequence

from stages.report.results import Model, Results
from stages.report.runs import Run
from stages.report.tables import NO_VALUE, Cell, Table, column_labels, number


def preference_table(runs: Sequence[Run]) -> Table:
    """One row per preference-tuned model: its start and itself, and differences from the start and from IT's."""
    rows = []
    for run in runs:
        results = run.results
        pairs = [(model, start) for model in results.models if (start := _start(results, model))]
        reference = next((model for model, start in pairs if start is run.baseline), None)
        for model, start in pairs:
            before, after = results.estimate(start), results.estimate(model)
            row = [Cell(run.name)] if len(runs) > 1 else []
            row += [Cell(model.label), Cell(f"{start.label}: {number(before)}" if before else NO_VALUE)]
            row += [Cell(number(after)), Cell(number(results.difference(model, start), sign=True))]
            from_reference = results.difference(model, reference) if reference else None
            row.append(Cell("" if reference is model else number(from_reference, sign=True)))
            rows.append(row)
    first = ["run"] if len(runs) > 1 else []
    return Table([*first, "model", "its start", "after", "change", "against the one from IT"], rows)


def _start(results: Results, model: Model) -> Model | None:
    if model.stage != "dpo" or len(model.lineage) < 2:
        return None
    start = model.lineage[1]
    for other in results.models:
        if other.lineage and (other.lineage[0].step, other.lineage[0].fingerprint) == (start.step, start.fingerprint):
            return other
    return None


def robustness_table(runs: Sequence[Run]) -> Table:
    """Each model's sensitivity to wording (POSIX; less is better), and its relative difference from the baseline."""
    heads: dict[str, None] = {}
    rows: list[tuple[str, str, dict[str, Cell]]] = []
    for run in runs:
        results = run.results
        measured = {s.column for s in results.scores if results.evaluations[s.step].kind == "sensitivity"}
        columns = [column for column in results.columns(headline=True) if column in measured]
        for model in results.models:
            cells: dict[str, Cell] = {}
            for column, label in zip(columns, column_labels(results, columns), strict=True):
                score, estimate = results.score(model, column), results.estimate(model, column)
                if score is None or estimate is None:
                    continue
                cells[label] = Cell(number(estimate, points=False), link=results.link(score.step))
                baseline = results.estimate(run.baseline, column) if run.baseline else None
                if baseline and baseline.value and model is not run.baseline:
                    cells[f"{label} against IT"] = Cell(f"{100 * (estimate.value / baseline.value - 1):+.1f} %")
                heads |= dict.fromkeys([label, f"{label} against IT"])
            if cells:
                rows.append((run.name, model.label, cells))
    table = [[Cell(run), Cell(model), *(cells.get(head, Cell("")) for head in heads)] for run, model, cells in rows]
    if len(runs) > 1:
        return Table(["run", "model", *heads], table)
    return Table(["model", *heads], [row[1:] for row in table])
