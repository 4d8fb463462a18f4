"""Grids of weights as heatmaps, laid out as the paper's Figure 1. The same results give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from stages.report.figure import saved
from stages.report.grid import CONVENTIONAL, Cell, Panel
from stages.system.terminal_text import safe

COLOURS = "RdBu"
"""Red below conventional instruction tuning, blue above it, white level with it; told apart by the colour-blind."""
MISSING = "#bbbbbb"
ACROSS = 3
"""Panels in a row."""


def heatmaps(panels: Sequence[Panel]) -> dict[str, bytes]:
    """The panels side by side, as `svg` and `png`: each cell's mean in points, coloured by its gain over conventional
    instruction tuning; the best circled, the base model's at (0, 0).

    Args:
        panels: at least one.
    """
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    with mpl.rc_context({"svg.hashsalt": "report", "text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(4.3 * across, 4.0 * down), facecolor="white", layout="constrained")
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for place, panel in zip(axes, panels, strict=False):
            _panel(figure, place, panel)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        return saved(figure)


def _panel(figure: Figure, axes: mpl.axes.Axes, panel: Panel) -> None:
    prompts, completions = panel.prompts, panel.completions
    shown: dict[tuple[float, float], Cell] = dict(panel.cells)
    if panel.base and prompts[0] == 0 and completions[0] == 0:
        shown.setdefault((0.0, 0.0), panel.base)
    gains = np.full((len(prompts), len(completions)), np.nan)
    for (prompt, completion), cell in shown.items():
        gain = panel.gain(cell)
        if gain is not None:
            gains[prompts.index(prompt), completions.index(completion)] = 100 * gain
    known = np.abs(gains[~np.isnan(gains)])
    # the base model, and cells that learnt no answers, lie far below; they must not wash out the rest
    most = max(1.0, float(np.quantile(known, 0.75))) if known.size else 1.0
    colours = mpl.colormaps[COLOURS].with_extremes(bad=MISSING)
    image = axes.imshow(gains, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for (prompt, completion), cell in shown.items():
        row, column = prompts.index(prompt), completions.index(completion)
        _label(axes, panel, (prompt, completion), cell, row, column, abs(gains[row, column]) > 0.7 * most)
    row, column = prompts.index(panel.best[0]), completions.index(panel.best[1])
    for width, colour in ((3.6, "white"), (1.8, "black")):  # seen on light cells and on dark ones
        axes.add_patch(Circle((column, row), 0.44, fill=False, linewidth=width, edgecolor=colour))
    axes.set_xticks(range(len(completions)), [f"{value:g}" for value in completions])
    axes.set_yticks(range(len(prompts)), [f"{value:g}" for value in prompts])
    axes.set_xlabel("completion weight")
    axes.set_ylabel("prompt weight")
    axes.set_title(safe(panel.title), fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.85, extend="both")
    bar.set_label("gain over IT (0, 1), %")


def _label(axes: Any, panel: Panel, pair: tuple[float, float], cell: Cell, row: int, column: int, dark: bool) -> None:
    """A cell's number, its spread over seeds, and what it is."""
    what = {CONVENTIONAL: "IT", (0.0, 0.0): "Base"}.get(pair) if cell in (panel.conventional, panel.base) else None
    spread = f"±{100 * cell.spread:.1f}" if cell.spread is not None else None
    text = "\n".join(filter(None, [what, f"{100 * cell.mean:.1f}", spread]))
    axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color="white" if dark else "black")
