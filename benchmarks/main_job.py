"""Measure time and memory of a recipe from an empty folder.

    python benchmarks/main_job.py [RECIPE]

Runs the recipe (by default recipes/wit_dpo.yaml) as a user does. Prints the machine, the wall time, the seconds of each
step and the peak memory of the largest process.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main(recipe: str) -> int:
    """Run and measure. Returns the exit code of the command."""
    with tempfile.TemporaryDirectory() as folder:
        start_time = time.monotonic()
        process = subprocess.run([sys.executable, "-m", "pipeline.cli", recipe, "--runs", folder], check=False)
        seconds = time.monotonic() - start_time
        records = [json.loads(path.read_text()) for path in Path(folder).glob("*/run.json")]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    print(f"\nmachine: {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    print(f"wall time: {seconds:.0f} s; largest process: {peak_bytes / 2**30:.2f} GiB")
    for step in (step for record in records for step in record["steps"]):
        print(f"  {step['step']:<16} {step['state']:<8} {step['seconds'] or 0:7.1f} s")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["recipes/wit_dpo.yaml"]))
