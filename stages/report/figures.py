"""The report's figures as SVG and PNG: bars of scores, heatmaps of grids, training curves. Same data, same bytes."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from stages.report.grid import CONVENTIONAL, UNTRAINED, Grid, GridCell, Pair
from stages.report.results import Results
from stages.report.tables import column_labels
from stages.system.terminal_text import safe

# parse_math: a `$` in a task's name is a dollar, not a formula
STYLE: Any = {"svg.hashsalt": "report", "text.parse_math": False, "font.size": 8}
INK = "#808080"
"""Readable on a light page and on a dark one, since an embedded picture cannot follow the page."""
BAR_COLOURS = ["#9aa5b1", "#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#bb5566"]
HEATMAP_COLOURS = "RdBu"
"""Red below conventional instruction tuning, blue above it, white level with it; safe for colour-blind readers."""
NOT_MEASURED = "#bbbbbb"
HEATMAPS_PER_ROW = 3
TRAINING_LOG = "training_log.jsonl"
LOSSES = {"prompt_loss": ("prompt tokens", 0), "completion_loss": ("completion tokens", 1)}
"""Key in the training log -> its label, and its side's place in a pair. A side of weight 0 has no loss."""


def _encode(figure: Figure, **options: Any) -> dict[str, bytes]:
    """The figure as `svg` and `png`, without dates and versions."""
    forms = {}
    for form in ("svg", "png"):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type") if form == "svg" else ("Software",))
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, metadata=no_metadata, dpi=160, **options)
        forms[form] = buffer.getvalue()
    return forms


def bars(results: Results) -> dict[str, bytes] | None:
    """Draw the averaged columns as bars with standard errors, a group per task; None if there is no such column."""
    columns = results.averaged
    if not columns:
        return None
    with mpl.rc_context(STYLE | {"font.size": 9, "text.color": INK}):
        figure = Figure(figsize=(max(5.0, 1.5 + 0.32 * len(columns) * (len(results.models) + 1)), 3.4))
        axes = figure.subplots()
        _draw_bars(axes, results)
        axes.set_xticks(range(len(columns)), [safe(label) for label in column_labels(results, columns)])
        axes.set_ylabel("points", color=INK)
        axes.tick_params(colors=INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        if len(columns) > 4:
            axes.tick_params(axis="x", rotation=30)
        legend_columns = min(4, len(results.models))
        axes.legend(frameon=False, ncols=legend_columns, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        return _encode(figure, transparent=True, bbox_inches="tight")


def _draw_bars(axes: mpl.axes.Axes, results: Results) -> None:
    width = 0.84 / len(results.models)
    for i, model in enumerate(results.models):
        places, heights, errors = [], [], []
        for j, column in enumerate(results.averaged):
            if estimate := results.estimate(model, column):
                places.append(j + (i - (len(results.models) - 1) / 2) * width)
                heights.append(100 * estimate.value)
                errors.append(100 * (estimate.stderr or 0.0))
        axes.bar(
            places,
            heights,
            0.92 * width,
            yerr=errors,
            color=BAR_COLOURS[i % len(BAR_COLOURS)],
            ecolor=INK,
            error_kw={"elinewidth": 1, "capsize": 2},
            label=safe(model.label),  # XML cannot hold control characters
        )


def heatmaps(grids: Sequence[Grid]) -> dict[str, bytes]:
    """Draw at least one grid as in the paper's Figure 1: means in points, coloured by improvement, the best circled."""
    across = min(HEATMAPS_PER_ROW, len(grids))
    down = -(-len(grids) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.3 * across, 4.0 * down), facecolor="white", layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for place, grid in zip(axes, grids, strict=False):
            _draw_heatmap(figure, place, grid)
        for place in axes[len(grids) :]:
            place.set_axis_off()
        return _encode(figure)


def _draw_heatmap(figure: Figure, axes: mpl.axes.Axes, grid: Grid) -> None:
    prompts, completions = grid.prompts, grid.completions
    cells = dict(grid.cells)
    if grid.base and prompts[0] == 0 and completions[0] == 0:
        cells.setdefault(UNTRAINED, grid.base)
    improvements = np.full((len(prompts), len(completions)), np.nan)
    for (prompt, completion), cell in cells.items():
        improvement = grid.improvement(cell)
        if improvement is not None:
            improvements[prompts.index(prompt), completions.index(completion)] = 100 * improvement
    known = np.abs(improvements[~np.isnan(improvements)])
    # the base model, and cells that learnt no answers, lie far below; they must not wash out the rest
    most = max(1.0, float(np.quantile(known, 0.75))) if known.size else 1.0
    colours = mpl.colormaps[HEATMAP_COLOURS].with_extremes(bad=NOT_MEASURED)
    image = axes.imshow(improvements, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for (prompt, completion), cell in cells.items():
        row, column = prompts.index(prompt), completions.index(completion)
        colour = "white" if abs(improvements[row, column]) > 0.7 * most else "black"
        text = _heatmap_text(grid, (prompt, completion), cell)
        axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
    row, column = prompts.index(grid.best[0]), completions.index(grid.best[1])
    for width, colour in ((3.6, "white"), (1.8, "black")):  # visible on light cells and on dark ones
        axes.add_patch(Circle((column, row), 0.44, fill=False, linewidth=width, edgecolor=colour))
    axes.set_xticks(range(len(completions)), [f"{value:g}" for value in completions])
    axes.set_yticks(range(len(prompts)), [f"{value:g}" for value in prompts])
    axes.set_xlabel("completion weight")
    axes.set_ylabel("prompt weight")
    axes.set_title(safe(grid.title), fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, extend="both")
    bar.set_label("gain over IT (0, 1), %")


def _heatmap_text(grid: Grid, pair: Pair, cell: GridCell) -> str:
    label = {CONVENTIONAL: "IT", UNTRAINED: "Base"}.get(pair) if cell in (grid.baseline, grid.base) else None
    spread = f"±{100 * cell.spread:.1f}" if cell.spread is not None else None
    return "\n".join(filter(None, [label, f"{100 * cell.mean:.1f}", spread]))


def training_curves(grid: Grid) -> dict[str, bytes] | None:
    """Draw both losses over the optimiser steps, a line per pair (its first seed); None if no training was logged."""
    logs = {pair: rows for pair, models in grid.models.items() if (rows := _read_log(models[0].lineage[0].path))}
    if not logs:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 3.2), facecolor="white", layout="constrained")
        colours = mpl.colormaps["viridis"]
        for axes, (key, (label, side)) in zip(figure.subplots(1, 2), LOSSES.items(), strict=True):
            for pair, rows in sorted(logs.items()):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colours(0.95 * pair[1 - side]), linewidth=0.9)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel(f"loss of {label}")
            other = "completion" if side == 0 else "prompt"
            scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1 / 0.95), colours)
            figure.colorbar(scale, ax=axes).set_label(f"{other} weight")
        figure.suptitle(safe(grid.title), fontsize=9)
        return _encode(figure)


def _read_log(folder: Path) -> list[dict[str, float]]:
    file = folder / TRAINING_LOG
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if any(key in row for key in LOSSES)]
