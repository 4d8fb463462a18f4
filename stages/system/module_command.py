"""The command that runs a module of this project in its own process."""

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line and the environment of `python -m module arguments`.

    `-P` removes the current folder from the search path, where a folder `pipeline` or `stages` would hide ours.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
