"""The process in which stages fetch what they read: `python -m pipeline.preflight.prefetch_worker`, started by
pipeline.preflight.prefetch.

Reads its job from standard input and writes an answer for each step to standard output, as JSON; what libraries print
goes to standard error.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pipeline.preflight.probe import serve
from stages import KINDS


def main() -> None:
    """Do the job."""
    serve(_fetched)


def _fetched(step: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    config = KINDS[step["kind"]].model_validate(step["config"])
    with tempfile.TemporaryDirectory() as scratch:
        paths = {name: Path(path) for name, path in step["paths"].items()}
        return {"fetched": config.load("fetch")(config, paths, Path(scratch))}


if __name__ == "__main__":
    main()
