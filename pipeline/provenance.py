"""What each manifest says of code, packages and machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.secret import masked

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "lm-eval", "tokenizers", "numpy")


@cache
def environment() -> dict[str, Any]:
    """Versions, commit and machine; the same for every step of a run."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "gpus": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "command": [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says of the folder this code lies in; None outside a checkout."""
    return _output("git", *arguments)


def _output(*command: str) -> str | None:
    """What a command prints, run in the folder of this file; None where it cannot be run or fails."""
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
