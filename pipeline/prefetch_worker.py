"""The process in which stages fetch what they read: `python -m pipeline.prefetch_worker`, started by pipeline.prefetch.

Reads its job from standard input and writes an answer for each step to standard output, as JSON; what libraries print
goes to standard error.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from pipeline.aside import serve
from stages import KINDS
from stages.base import BadInput


def main() -> None:
    """Do the job."""
    serve(lambda job: [_fetched(step) for step in job["steps"]])


def _fetched(step: dict[str, Any]) -> dict[str, Any]:
    config = KINDS[step["kind"]].model_validate(step["config"])
    assert config.fetcher
    module, _, function = config.fetcher.partition(":")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            paths = {name: Path(path) for name, path in step["paths"].items()}
            return {"fetched": getattr(importlib.import_module(module), function)(config, paths, Path(scratch))}
    except BadInput as error:
        return {"error": str(error), "key": error.key}


if __name__ == "__main__":
    main()
