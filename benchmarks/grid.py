"""Compare the cost of a grid in one run with that of a run per cell.

    python -m benchmarks.grid [RECIPE] [--cells AXIS=VALUE[,...]]

Runs the grid (by default recipes/pocket_grid.yaml, or some of its cells) in one run, and then each cell in its own
folder of runs: the trainings, their evaluation, that of the base model, and a report. Prints the wall times, the CPU
seconds, their ratios, and whether the scores are the same.
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.data import ROOT, machine, run_recipe
from pipeline.recipe.loader import load
from pipeline.recipe.matrix import join_labels


def run(recipe: str, runs: Path, cells: Sequence[str]) -> tuple[float, float]:
    """Run, and return the wall time and the CPU time of all processes, in seconds."""
    options = [part for cell in cells for part in ("--cells", cell)]
    start_time, start_cpu = time.perf_counter(), cpu_seconds()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        run_recipe(recipe, "--runs", str(runs), *options), capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return time.perf_counter() - start_time, cpu_seconds() - start_cpu


def cpu_seconds() -> float:
    """Return the CPU time of all finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def scores(runs: Path) -> set[tuple[str, ...]]:
    """Return model, task, metric and value of every score."""
    (file,) = runs.glob("*/report/results.csv")
    with file.open() as rows:
        return {(row["model"], row["task"], row["metric"], row["value"]) for row in csv.DictReader(rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns 1 if the scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "pocket_grid.yaml"))
    parser.add_argument("--cells", action="append", default=[])
    options = parser.parse_args(arguments)
    cells = [join_labels(recipe.labels) for recipe in load(Path(options.recipe), cells=options.cells)]
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid_time, grid_cpu = run(options.recipe, folder / "grid", options.cells)
        print(f"{len(cells)} cells in one run: {grid_time:.0f} s, {grid_cpu:.0f} s of cores", flush=True)
        times = [run(options.recipe, folder / f"run-{i}", [cell]) for i, cell in enumerate(cells)]
        cells_time, cells_cpu = map(sum, zip(*times, strict=True))
        print(f"{len(cells)} runs of one cell each: {cells_time:.0f} s, {cells_cpu:.0f} s of cores")
        print(f"the grid takes {grid_time / cells_time:.2f} of the time, {grid_cpu / cells_cpu:.2f} of the CPU time")
        same = scores(folder / "grid") == set().union(*(scores(folder / f"run-{i}") for i in range(len(cells))))
        print(f"scores: {'the same' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
