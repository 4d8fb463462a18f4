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

from pipeline.store.secrets import masked


@cache
def environment() -> dict[str, Any]:
    """Versions, commit and command: the same for every step of a run."""
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "--error-unmatch", __file__) else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "packages": dict(sorted((found.name, found.version) for found in metadata.distributions())),
        "commit": commit,
        "uncommitted_changes": bool(_git("status", "--porcelain")) if commit else None,
        "command": [Path(sys.argv[0]).name, *map(masked, sys.argv[1:])],
    }


@cache
def installed(package: str) -> str | None:
    """The version of a package; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the process of one step worked with: to be asked after its stage has run.

    `repeatable` says whether the same step gives the same bytes on such a machine, and if not, why not.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return {"device": "cpu", "threads": 1, "repeatable": True}
    threads = torch.get_num_threads()
    if not torch.cuda.is_initialized():
        return {"device": "cpu", "threads": threads, "repeatable": True}
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "threads": threads}
    if torch.are_deterministic_algorithms_enabled():
        return {**device, "repeatable": True}
    why = "GPU kernels may add up in another order each time; train.full_determinism: true forbids them to"
    return {**device, "repeatable": False, "why_not": why}


def _processor() -> str | None:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


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
