"""The process that shows what stages would train on: `python -m pipeline.preflight.preview_worker`, started by
pipeline.preflight.preview.

Reads its job from standard input and writes the results to standard output, as JSON; what libraries print goes to
standard error.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.preflight.probe import serve
from pipeline.run.worker import loadable
from stages import KINDS


def main() -> None:
    """Do the job."""
    serve(_show)


def _show(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    config = KINDS[step["kind"]].model_validate(step["config"])
    screen = Console(
        file=io.StringIO(),
        force_terminal=job["colors"] is not None,
        color_system=job["colors"],
        width=job["width"],
        highlight=False,
        legacy_windows=False,
    )
    paths = {name: loadable(Path(path), Path(job["cache"])) for name, path in step["paths"].items()}
    values, html, shown = config.load("preview")(step["step"], config, paths, job["count"])
    screen.print(shown)
    assert isinstance(screen.file, io.StringIO)
    return {"values": values, "html": html, "text": screen.file.getvalue()}


if __name__ == "__main__":
    main()
