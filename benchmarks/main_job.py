"""Measure time and memory of a recipe from an empty folder, as a user runs it.

    python -m benchmarks.main_job [RECIPE] [--started] [option of run-recipe ...]

Runs the recipe (by default recipes/wit_dpo.yaml). Prints the machine, the wall time, the seconds of each step, the peak
memory of the largest process, and what the steps take beside training and evaluating: start-up, loading and publishing.
With --started the recipe runs a second time, with a new process for each step in place of forks of prepared processes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.data import machine

FORKED = "import sys; from pipeline.cli import main; sys.exit(main())"
STARTED = (
    "from pipeline.run.local_executor import LocalExecutor\n"
    "LocalExecutor._prepared_in = lambda *arguments: None\n" + FORKED
)


def measure(program: str, recipe: str, options: list[str]) -> tuple[float, float]:
    """Run and print; return the wall time, and the seconds of steps beside training and evaluating. Ends on failure."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        call = [sys.executable, "-P", "-c", program, recipe, "--runs", folder, *options]
        status = subprocess.run(call, check=False).returncode
        seconds = time.monotonic() - start
        records = [json.loads(path.read_text()) for path in Path(folder).glob("*/run.json")]
        steps = [step for record in records for step in record["steps"]]
        manifests = [Path(folder, step["path"], "stage.json") for step in steps if step["path"]]
        metrics = [json.loads(manifest.read_text())["metrics"] for manifest in manifests]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    beside = sum(step["seconds"] or 0 for step in steps) - sum(each.get("seconds") or 0 for each in metrics)
    print(f"\nwall time: {seconds:.0f} s; largest process: {peak_bytes / 2**30:.2f} GiB")
    for step in steps:
        print(f"  {step['step']:<16} {step['state']:<8} {step['seconds'] or 0:7.1f} s")
    print(f"  beside training and evaluating {beside:9.1f} s in all steps", flush=True)
    if status:
        sys.exit(status)
    return seconds, beside


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="recipes/wit_dpo.yaml")
    parser.add_argument("--started", action="store_true", help="measure started processes as well")
    arguments, options = parser.parse_known_args()
    print(machine(), flush=True)
    forked = measure(FORKED, arguments.recipe, options)
    if arguments.started:
        started = measure(STARTED, arguments.recipe, options)
        print(f"wall time: {forked[0] / started[0]:.2f} x that with started processes")
        print(f"beside training and evaluating: {forked[1] / started[1]:.2f} x")


if __name__ == "__main__":
    main()
