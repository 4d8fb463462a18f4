"""Code, packages and machine, for each step's manifest."""

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from stages.system.secrets import mask_secrets


@cache
def environment() -> dict[str, Any]:
    """Return versions, commit and command, the same for every step of a run."""
    cpu = _output("grep", "-m1", "model name", "/proc/cpuinfo") or ""
    in_checkout = _output("git", "ls-files", "--error-unmatch", __file__)
    commit = _output("git", "rev-parse", "HEAD") if in_checkout else None
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": cpu.partition(": ")[2] or platform.processor() or None,
        "cores": os.cpu_count(),
        "gpus": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "packages": dict(sorted((package.name, package.version) for package in metadata.distributions())),
        "commit": commit,
        "uncommitted_changes": bool(_output("git", "status", "--porcelain")) if commit else None,
        "command": [Path(sys.argv[0]).name, *map(mask_secrets, sys.argv[1:])],
    }


@cache
def installed_version(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Return device and threads, after the stage has run, and whether it would give the same bytes again."""
    torch: Any = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else 1
    if not torch or not torch.cuda.is_initialized():
        return {"device": "cpu", "threads": threads, "repeatable": True}
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "threads": threads}
    if torch.are_deterministic_algorithms_enabled():
        return {**device, "repeatable": True}
    reason = "GPU kernels may sum in a different order each time; train.full_determinism: true prevents this"
    return {**device, "repeatable": False, "why_not": reason}


def _output(*command: str) -> str | None:
    """Return what a command prints in this file's folder, or None if it fails."""
    try:
        return subprocess.check_output(
            command, cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, text=True, timeout=20
        ).strip()
    except (OSError, subprocess.SubprocessError):
        return None
