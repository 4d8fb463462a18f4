"""Compare a search with the full grid, in quality and cost.

    python -m benchmarks.search [--runs DIR] [--seeds 23,24,25]

Runs recipes/pocket_search.yaml over the seeds. docs/pocket_grid/cells.csv holds the full grid's scores for these seeds.
Prints for each seed the cell that the search chose, how far its average is below the grid's best cell, and the cost
relative to the grid, in seconds and in training steps. The grid's cost is that of 35 trainings and 36 evaluations, each
as long as the mean of this run's full-length ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.data import ROOT, machine, run_recipe

GRID = ROOT / "docs" / "pocket_grid" / "cells.csv"
HEADLINE = {"pocket_knowledge": "acc", "pocket_reasoning": "exact_match", "pocket_instructions": "correct"}
"""Task -> its metric in a model's average, as in the report of these recipes."""


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the steps of a run with their manifests."""
    steps = json.loads((run / "run.json").read_text())["steps"]
    return [step | json.loads((run.parent / step["path"] / "stage.json").read_text()) for step in steps]


def averages(run: Path) -> dict[str, float]:
    """Map each model of a run to its average."""
    scores: dict[str, list[float]] = {}
    with (run / "report" / "results.csv").open() as file:
        for row in csv.DictReader(file):
            if HEADLINE.get(row["task"]) == row["metric"]:
                scores.setdefault(row["model"], []).append(float(row["value"]))
    return {model: sum(values) / len(values) for model, values in scores.items()}


def grid(seed: str) -> dict[str, float]:
    """Map each cell to its average in the full grid."""
    with GRID.open() as file:
        return {
            f"wit[prompt={row['prompt']},completion={row['completion']},seed={seed}]": float(row["average"])
            for row in csv.DictReader(file)
            if row["seed"] == seed
        }


def cost(steps: list[dict[str, Any]], seed: str) -> tuple[float, float]:
    """Return seconds and training steps of one seed's search, as fractions of the full grid's."""
    search = [step for step in steps if f"seed={seed}" in step["step"]]
    full_length = [step for step in search if step["kind"] == "sft" and "search=" not in step["step"]]
    evaluations = [step for step in steps if step["kind"] == "lm_eval"]
    seconds = sum(step["seconds"] for step in search)
    seconds += sum(step["seconds"] for step in evaluations if step["step"] == "bench[base]")
    cells = len(grid(seed))
    grid_seconds = cells * statistics.fmean(step["seconds"] for step in full_length)
    grid_seconds += (cells + 1) * statistics.fmean(step["seconds"] for step in evaluations)
    trained = sum(step["metrics"]["steps"] for step in search if step["kind"] == "sft")
    return seconds / grid_seconds, trained / (cells * full_length[0]["metrics"]["steps"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print. Returns 1 if a score differs from the grid's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", default="23,24,25")
    options = parser.parse_args(arguments)
    print(machine(), flush=True)
    recipe = str(ROOT / "recipes" / "pocket_search.yaml")
    call = run_recipe(recipe, "--runs", str(options.runs), "--set", f"matrix.seed=[{options.seeds}]")
    subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    run = options.runs / "pocket-search"
    steps, scores, exit_code = steps_of(run), averages(run), 0
    with (run / "search.csv").open() as file:
        promoted = [row for row in csv.DictReader(file) if (row["length"], row["kept"]) == ("1", "yes")]
    for seed in options.seeds.split(","):
        (chosen,) = [row["step"] for row in promoted if row["search"] == f"seed={seed}"]
        cells = grid(seed)
        best = max(cells, key=lambda model: cells[model])
        rank = 1 + sum(score > cells[chosen] for score in cells.values())
        seconds, trained = cost(steps, seed)
        print(f"seed {seed}: chose {chosen}, {100 * scores[chosen]:.1f} points, number {rank} of {len(cells)}")
        print(f"  the grid's best is {best}: {100 * (cells[best] - cells[chosen]):.1f} points above")
        print(f"  cost: {seconds:.1%} of the seconds of all steps, {trained:.1%} of the training steps")
        if abs(cells[chosen] - scores[chosen]) > 1e-9:
            print(f"  the grid had {100 * cells[chosen]:.4f} points for it: DIFFERENT")
            exit_code = 1
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
