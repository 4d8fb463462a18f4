"""Measure how long `--check` takes, and how long when nothing changed since.

    python -m benchmarks.check [RECIPE]

Prints the wall time of the first check of a recipe (by default recipes/wit_dpo.yaml) in an empty folder, of the best of
five further checks, and of the best of five plans, which import as much.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time

REPEATS = 5


def main(recipe: str) -> None:
    """Run the commands and print their seconds."""
    with tempfile.TemporaryDirectory() as folder:

        def seconds(option: str) -> float:
            call = [sys.executable, "-m", "pipeline.cli", recipe, "--runs", folder, option]
            start_time = time.perf_counter()
            subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start_time

        print(f"machine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
        print(f"first check: {seconds('--check'):.1f} s")
        for option in ("--check", "--plan"):
            print(f"{option} when nothing changed: {min(seconds(option) for _ in range(REPEATS)):.2f} s")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["recipes/wit_dpo.yaml"])
