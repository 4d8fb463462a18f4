"""Prove that a refactor changes no result: python -m benchmarks.compare REV [RECIPE]

Runs a small recipe (benchmarks/compare.yaml, or RECIPE) on this machine with the code of the git revision REV, then
with the code of the working tree, and demands equal bytes of all weights and of results.csv. The report shows how long
steps took, so its page is compared on one set of results: the working tree writes it again for the results of REV,
which also shows that these are still cached. The exit code is 1 if anything differs or a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stages.system.integrity import file_hash

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ("*.safetensors", "results.csv")
"""Published files that two runs have in common; stage.json has times and versions, logs have paths."""
REPORTS = ("report.md", "report.html", "tables.tex")


def run(code: Path, recipe: Path, runs: Path, *options: str) -> None:
    """Run the recipe with the code in the folder `code`."""
    call = [sys.executable, "-P", "-m", "pipeline.cli", str(recipe), "--runs", str(runs), *options]
    environment = {**os.environ, "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(call, cwd=code, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(f"{code}: exit code {process.returncode}\n{process.stdout}{process.stderr}")


def hashes(runs: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Step and name of each published file that matches -> sha256."""
    (record,) = (json.loads(file.read_text(encoding="utf-8")) for file in runs.glob("*/run.json"))
    files = {}
    for step in record["steps"]:
        folder = runs / step["path"]
        for file in sorted(file for pattern in patterns for file in folder.rglob(pattern)):
            files[f"{step['step']}/{file.relative_to(folder)}"] = file_hash(file)
    return files


def main() -> int:
    """Compare, and print one line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV")
    parser.add_argument("recipe", metavar="RECIPE", type=Path, nargs="?", default=ROOT / "benchmarks" / "compare.yaml")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old_code = Path(folder) / "code"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(old_code), arguments.revision], check=True)
        try:
            recipe, (old, new, again) = (
                arguments.recipe.resolve(),
                (Path(folder) / name for name in ("old", "new", "again")),
            )
            run(old_code, recipe, old)
            run(ROOT, recipe, new)
            shutil.copytree(old, again, symlinks=True)
            run(ROOT, recipe, again, "--force", "report")
        finally:
            subprocess.run([*git, "remove", "--force", str(old_code)], check=True)
        before = hashes(old, RESULTS) | hashes(old, REPORTS)
        after = hashes(new, RESULTS) | hashes(again, REPORTS)
    for name in sorted(before | after):
        print(f"{'equal    ' if before.get(name) == after.get(name) else 'DIFFERENT'} {name}")
    differences = sum(before.get(name) != after.get(name) for name in before | after)
    print(f"{len(before | after)} files, {differences} different from {arguments.revision}")
    return 1 if differences or not before else 0


if __name__ == "__main__":
    sys.exit(main())
