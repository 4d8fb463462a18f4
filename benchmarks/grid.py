"""What a grid saves over separate runs: python -m benchmarks.grid [RECIPE] [--cells AXIS=VALUE[,...]]

Runs the grid (recipes/pocket_grid.yaml unless another is named, or the cells that are asked for) in one run, and then
each of its cells by itself, in a folder of runs of its own: the same chain of training, its evaluation, that of the
base model, and a report. Prints both wall times and their ratio, likewise the seconds of all cores, and whether the
scores are the same.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.recipe import loader as recipes
from pipeline.recipe.matrix import join_labels

ROOT = Path(__file__).resolve().parent.parent


def run(recipe: str, runs: Path, cells: Sequence[str]) -> tuple[float, float]:
    """Seconds of one run, and those of all cores that its processes worked."""
    chosen = [part for cell in cells for part in ("--cells", cell)]
    call = [sys.executable, "-P", "-m", "pipeline.cli", recipe, "--runs", str(runs), *chosen]
    began, worked = time.perf_counter(), work()
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return time.perf_counter() - began, work() - worked


def work() -> float:
    """Seconds of cores that all processes have worked which ended so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def scores(runs: Path) -> set[tuple[str, ...]]:
    """Model, task, metric and value of every score."""
    (file,) = runs.glob("*/report/results.csv")
    with file.open() as rows:
        return {(row["model"], row["task"], row["metric"], row["value"]) for row in csv.DictReader(rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 1 where the scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "pocket_grid.yaml"))
    parser.add_argument("--cells", action="append", default=[])
    options = parser.parse_args(arguments)
    cells = [join_labels(recipe.labels) for recipe in recipes.load(Path(options.recipe), cells=options.cells)]
    print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole, worked = run(options.recipe, folder / "grid", options.cells)
        print(f"{len(cells)} cells in one run: {whole:.0f} s, {worked:.0f} s of cores", flush=True)
        apart = [run(options.recipe, folder / f"run-{i}", [cell]) for i, cell in enumerate(cells)]
        every, work_apart = (sum(each) for each in zip(*apart, strict=True))
        print(f"{len(cells)} runs of one cell each: {every:.0f} s, {work_apart:.0f} s of cores")
        print(f"the grid takes {whole / every:.2f} of the time, {worked / work_apart:.2f} of the work")
        same = scores(folder / "grid") == set().union(*(scores(folder / f"run-{i}") for i in range(len(cells))))
        print(f"scores: {'the same' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
