"""Training curves by cell: the loss of prompt tokens and that of completion tokens, whatever they weighed."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from stages.report.figure import saved
from stages.report.grid import Panel
from stages.system.terminal_text import safe

LOG = "training_log.jsonl"
SIDES = {"prompt_loss": ("prompt tokens", 0), "completion_loss": ("completion tokens", 1)}
"""What the trainer logs -> what it is of, and which weight of the pair is its own. Tokens of weight 0 have no loss."""


def curves(panel: Panel) -> dict[str, bytes] | None:
    """The two losses over the optimiser steps, a line for each pair (of several seeds the first), coloured by the
    weight of the other side; by form, `svg` and `png`. None where no training was logged."""
    logs = {pair: rows for pair, models in panel.models.items() if (rows := _log(models[0].lineage[0].path))}
    if not logs:
        return None
    with mpl.rc_context({"svg.hashsalt": "report", "text.parse_math": False, "font.size": 8}):
        figure = Figure(figsize=(8.6, 3.2), facecolor="white", layout="constrained")
        places = figure.subplots(1, 2)
        for axes, (key, (called, side)) in zip(places, SIDES.items(), strict=True):
            colours = mpl.colormaps["viridis"]
            for pair, rows in sorted(logs.items()):
                points = [(row["step"], row[key]) for row in rows if key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), color=colours(0.95 * pair[1 - side]), linewidth=0.9)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel(f"loss of {called}")
            other = "completion" if side == 0 else "prompt"
            scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1 / 0.95), colours)
            figure.colorbar(scale, ax=axes).set_label(f"{other} weight")
        figure.suptitle(safe(panel.title), fontsize=9)
        return saved(figure)


def _log(folder: Path) -> list[dict[str, float]]:
    file = folder / LOG
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if any(key in row for key in SIDES)]
