"""How a search does beside the full grid: python -m benchmarks.search [--runs DIR] [--grid RUNS] [--seeds 23,24,25]

Runs recipes/pocket_search.yaml over the seeds, and recipes/pocket_grid.yaml likewise unless a folder of runs that holds
it is named. Prints for each seed what the search chose, how far its average lies below the grid's best cell, and what
both cost: seconds of all steps, and steps of training.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HEADLINE = {"pocket_knowledge": "acc", "pocket_reasoning": "exact_match", "pocket_instructions": "correct"}
"""Task -> the metric whose mean over the tasks is a model's average, as in the report of these recipes."""


@dataclass(frozen=True)
class Done:
    """A run of one of the two recipes."""

    runs: Path
    name: str

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps of run.json, with their manifests."""
        steps = json.loads((self.runs / self.name / "run.json").read_text())["steps"]
        return [step | json.loads((self.runs / step["path"] / "stage.json").read_text()) for step in steps]

    def averages(self) -> dict[str, float]:
        """Model -> its average, in points."""
        found: dict[str, list[float]] = {}
        with (self.runs / self.name / "report/results.csv").open() as file:
            for row in csv.DictReader(file):
                if HEADLINE.get(row["task"]) == row["metric"]:
                    found.setdefault(row["model"], []).append(100 * float(row["value"]))
        return {model: sum(scores) / len(scores) for model, scores in found.items() if len(scores) == len(HEADLINE)}

    def cost(self, seed: str) -> tuple[float, int]:
        """Seconds of all steps that this seed's cells need, and their steps of training."""
        steps = [step for step in self.steps if f"seed={seed}" in step["step"] or "seed=" not in step["step"]]
        seconds = sum(step["seconds"] for step in steps if step["kind"] != "report")
        return seconds, sum(step["metrics"]["steps"] for step in steps if step["kind"] == "sft")


def run(recipe: str, runs: Path, seeds: str) -> None:
    """Run the recipe over the seeds."""
    call = [sys.executable, "-P", "-m", "pipeline.cli", str(ROOT / "recipes" / recipe), "--runs", str(runs)]
    call += ["--set", f"matrix.seed=[{seeds}]"]
    subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--grid", type=Path, help="a folder of runs in which the grid was run over these seeds")
    parser.add_argument("--seeds", default="23,24,25")
    options = parser.parse_args(arguments)
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}", flush=True)
    run("pocket_search.yaml", options.runs, options.seeds)
    if options.grid is None:
        run("pocket_grid.yaml", options.runs, options.seeds)
    search, grid = Done(options.runs, "pocket-search"), Done(options.grid or options.runs, "pocket-grid")
    everywhere, tried = grid.averages(), search.averages()
    with (options.runs / "pocket-search/search.csv").open() as file:
        chosen = {
            row["search"]: row["step"] for row in csv.DictReader(file) if row["length"] == "1" and row["kept"] == "yes"
        }
    for seed in options.seeds.split(","):
        pick = chosen[f"seed={seed}"]
        cells = {model: score for model, score in everywhere.items() if f"seed={seed}" in model}
        best = max(cells, key=lambda model: cells[model])
        rank = 1 + sum(score > tried[pick] for score in cells.values())
        (spent, trained), (whole, all_trained) = search.cost(seed), grid.cost(seed)
        print(f"seed {seed}: chose {pick}, {tried[pick]:.1f} points, number {rank} of {len(cells)}")
        print(f"  the grid's best is {best}, {cells[best]:.1f}: {cells[best] - tried[pick]:.1f} points above")
        print(f"  {spent:.0f} s of {whole:.0f} s: {spent / whole:.1%}; steps of training {trained / all_trained:.1%}")
        if abs(everywhere[pick] - tried[pick]) > 1e-9:
            print(f"  the grid has {everywhere[pick]:.4f} for that cell: DIFFERENT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
