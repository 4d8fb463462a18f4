"""Record golden outputs: python -m tests.golden.record [KIND ...]

Writes tests/golden/outputs/KIND.json, of every kind by default. `fingerprints` records tests/golden/fingerprints.json.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # as in the tests

import torch

from stages.kinds import KINDS
from tests.golden import fingerprints
from tests.golden.cases import CASES

OUTPUTS = Path(__file__).with_name("outputs")
FINGERPRINTS = "fingerprints"


def run_case(kind: str, folder: Path) -> dict[str, Any]:
    """Run the case of a kind; return its version and outputs as JSON values."""
    outputs = CASES[kind](folder)
    return json.loads(json.dumps({"version": KINDS[kind].version, "outputs": outputs}))


def golden_file(kind: str) -> Path:
    """The file with the golden outputs of a kind."""
    return OUTPUTS / f"{kind}.json"


def write(file: Path, value: Any) -> None:
    """Write JSON and print the path."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {file}")


def current_fingerprints(folder: Path) -> dict[str, Any]:
    """The fingerprints of the recorded recipes with the present versions."""
    golden = fingerprints.read_golden()
    versions = {kind: stage.version for kind, stage in KINDS.items()}
    packages = {name: version(name) for name in golden["packages"]}
    with fingerprints.fixed_versions(versions, packages):
        recipes = {
            recipe: fingerprints.compact(fingerprints.plan_fingerprints(recipe, folder)) for recipe in golden["recipes"]
        }
    return {"versions": versions, "packages": packages, "recipes": recipes}


def main() -> None:
    """Record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", metavar="KIND", nargs="*", help=f"{', '.join(CASES)} or {FINGERPRINTS}")
    kinds = parser.parse_args().kinds or list(CASES)
    if unknown := [kind for kind in kinds if kind not in (*CASES, FINGERPRINTS)]:
        parser.error(f"unknown: {', '.join(unknown)}; name some of {', '.join([*CASES, FINGERPRINTS])}")
    torch.set_num_threads(1)
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            if kind == FINGERPRINTS:
                write(fingerprints.FILE, current_fingerprints(Path(folder)))
            else:
                write(golden_file(kind), run_case(kind, Path(folder)))


if __name__ == "__main__":
    main()
