"""The process that shows what stages would train on: `python -m pipeline.preview_worker`, started by pipeline.preview.

Reads its job from standard input and writes the results to standard output, as JSON; what libraries print goes to
standard error.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.aside import serve
from pipeline.worker import loadable
from stages import KINDS
from stages.base import BadInput


def main() -> None:
    """Do the job."""
    serve(lambda job: [_show(step, job) for step in job["steps"]])


def _show(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    config = KINDS[step["kind"]].model_validate(step["config"])
    assert config.previewer
    module, _, function = config.previewer.partition(":")
    screen = Console(
        file=io.StringIO(),
        force_terminal=job["colors"] is not None,
        color_system=job["colors"],
        width=job["width"],
        highlight=False,
        legacy_windows=False,
    )
    try:
        paths = {name: loadable(Path(path), Path(job["cache"])) for name, path in step["paths"].items()}
        show = getattr(importlib.import_module(module), function)
        values, html, shown = show(step["step"], config, paths, job["count"])
    except BadInput as error:
        return {"error": str(error), "key": error.key}
    screen.print(shown)
    assert isinstance(screen.file, io.StringIO)
    return {"values": values, "html": html, "text": screen.file.getvalue()}


if __name__ == "__main__":
    main()
