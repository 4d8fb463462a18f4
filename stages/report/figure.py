"""Scores as grouped bars with error bars. The same results give the same bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from stages.report.averages import averaged
from stages.report.results import Results
from stages.report.tables import column_labels
from stages.system.terminal_text import safe

INK = "#808080"
"""Readable on a light page and on a dark one, since an embedded picture cannot follow the page."""
COLOURS = ["#9aa5b1", "#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#bb5566"]


def saved(figure: Figure, **options: Any) -> dict[str, bytes]:
    """The figure as `svg` and as `png`, without what would differ from one time to the next."""
    found = {}
    for form in ("svg", "png"):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None} if form == "svg" else {"Software": None}
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=nothing, dpi=160, **options)
        found[form] = buffer.getvalue()
    return found


def bars(results: Results) -> dict[str, bytes] | None:
    """The averaged columns as `svg` and `png`, one group per task; None where there is no such column."""
    columns = averaged(results)
    if not columns:
        return None
    # parse_math: a `$` in a task's name is a dollar, not a formula.
    with mpl.rc_context({"svg.hashsalt": "report", "text.parse_math": False, "font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(max(5.0, 1.5 + 0.32 * len(columns) * (len(results.models) + 1)), 3.4))
        axes = figure.subplots()
        _bars(axes, results)
        axes.set_xticks(range(len(columns)), [safe(label) for label in column_labels(results, columns, False)])
        axes.set_ylabel("points", color=INK)
        axes.tick_params(colors=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        if len(columns) > 4:
            axes.tick_params(axis="x", rotation=30)
        legend_columns = min(4, len(results.models))
        axes.legend(frameon=False, ncols=legend_columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return saved(figure, transparent=True, bbox_inches="tight")


def _bars(axes: mpl.axes.Axes, results: Results) -> None:
    """One colour per model; an absent score leaves its place empty."""
    columns = averaged(results)
    width = 0.84 / len(results.models)
    for i, model in enumerate(results.models):
        places, heights, errors = [], [], []
        for j, column in enumerate(columns):
            score = results.score(model, column)
            if score is None or score.value is None:
                continue
            places.append(j + (i - (len(results.models) - 1) / 2) * width)
            heights.append(100 * score.value)
            errors.append(100 * (score.stderr or 0.0))
        axes.bar(
            places,
            heights,
            0.92 * width,
            yerr=errors,
            color=COLOURS[i % len(COLOURS)],
            ecolor=INK,
            error_kw={"elinewidth": 1, "capsize": 2},
            label=safe(model.label),  # XML cannot hold control characters
        )
