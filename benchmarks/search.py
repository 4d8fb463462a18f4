"""How a search does beside the full grid: python -m benchmarks.search [--runs DIR] [--seeds 23,24,25]

Runs recipes/pocket_search.yaml over the seeds; docs/pocket_grid/cells.csv holds what the full grid of these seeds
scored. Prints for each seed what the search chose, how far its average lies below the grid's best cell, and what it
cost beside 35 trainings and 36 evaluations of the length that this run's own whole ones took: seconds, and steps of
training.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GRID = ROOT / "docs" / "pocket_grid" / "cells.csv"
HEADLINE = {"pocket_knowledge": "acc", "pocket_reasoning": "exact_match", "pocket_instructions": "correct"}
"""Task -> the metric whose mean over the tasks is a model's average, as in the report of these recipes."""


def steps_of(run: Path) -> list[dict[str, Any]]:
    """The steps of a run, with their manifests."""
    steps = json.loads((run / "run.json").read_text())["steps"]
    return [step | json.loads((run.parent / step["path"] / "stage.json").read_text()) for step in steps]


def averages(run: Path) -> dict[str, float]:
    """Model -> its average."""
    found: dict[str, list[float]] = {}
    with (run / "report" / "results.csv").open() as file:
        for row in csv.DictReader(file):
            if HEADLINE.get(row["task"]) == row["metric"]:
                found.setdefault(row["model"], []).append(float(row["value"]))
    return {model: sum(scores) / len(scores) for model, scores in found.items()}


def grid(seed: str) -> dict[str, float]:
    """Cell -> its average, as the full grid had it."""
    with GRID.open() as file:
        return {
            f"wit[prompt={row['prompt']},completion={row['completion']},seed={seed}]": float(row["average"])
            for row in csv.DictReader(file)
            if row["seed"] == seed
        }


def cost(steps: list[dict[str, Any]], seed: str) -> tuple[float, float]:
    """Seconds and steps of training of one seed's search, as parts of the full grid's."""
    own = [step for step in steps if f"seed={seed}" in step["step"]]
    whole = [step for step in own if step["kind"] == "sft" and "search=" not in step["step"]]
    scored = [step for step in steps if step["kind"] == "lm_eval"]
    spent = sum(step["seconds"] for step in own) + sum(s["seconds"] for s in scored if s["step"] == "bench[base]")
    cells = len(grid(seed))
    every = cells * statistics.fmean(step["seconds"] for step in whole)
    every += (cells + 1) * statistics.fmean(step["seconds"] for step in scored)
    trained = sum(step["metrics"]["steps"] for step in own if step["kind"] == "sft")
    return spent / every, trained / (cells * whole[0]["metrics"]["steps"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print; 1 where a score differs from the grid's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", default="23,24,25")
    options = parser.parse_args(arguments)
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}", flush=True)
    call = [sys.executable, "-P", "-m", "pipeline.cli", str(ROOT / "recipes" / "pocket_search.yaml")]
    call += ["--runs", str(options.runs), "--set", f"matrix.seed=[{options.seeds}]"]
    subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    run = options.runs / "pocket-search"
    steps, tried, different = steps_of(run), averages(run), 0
    with (run / "search.csv").open() as file:
        kept = [row for row in csv.DictReader(file) if (row["length"], row["kept"]) == ("1", "yes")]
    for seed in options.seeds.split(","):
        (pick,) = [row["step"] for row in kept if row["search"] == f"seed={seed}"]
        cells = grid(seed)
        best = max(cells, key=lambda model: cells[model])
        rank = 1 + sum(score > cells[pick] for score in cells.values())
        seconds, trained = cost(steps, seed)
        print(f"seed {seed}: chose {pick}, {100 * tried[pick]:.1f} points, number {rank} of {len(cells)}")
        print(f"  the grid's best is {best}: {100 * (cells[best] - cells[pick]):.1f} points above")
        print(f"  cost: {seconds:.1%} of the seconds of all steps, {trained:.1%} of the steps of training")
        if abs(cells[pick] - tried[pick]) > 1e-9:
            print(f"  the grid had {100 * cells[pick]:.4f} points for it: DIFFERENT")
            different = 1
    return different


if __name__ == "__main__":
    sys.exit(main())
