"""What a task does on a machine of a Ray cluster. Sent there as it stands: Ray looks for modules in the user's current
folder first, where a folder `pipeline` need not be ours, so nothing of ours may be imported here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

PROGRESS = "progress.json"
"""In a job's folder: what the step told of its progress last."""
TELL_SECONDS = 0.5


def unmet_requirement(file: str, token: str, paths: str) -> str | None:
    """Why no step can run on this machine; None where one can.

    Args:
        file: in the folder of runs, with `token` in it.
        paths: where else than where it is installed the project may be found.
    """
    path = Path(file)
    try:
        if path.read_text(encoding="utf-8") != token:
            return f"sees another file at {file}"
        mine = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
        mine.touch()
        mine.unlink()
    except OSError as error:
        return f"does not see {path.parent} as this machine does, or may not write to it: {error.strerror}"
    call = [sys.executable, "-P", "-c", "import pipeline.run.worker"]
    tried = subprocess.run(call, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"cannot run this project: {''.join(tried.stderr.strip().splitlines()[-1:])}"
    return None


def run(folder: str, log: str, environment: dict[str, str]) -> tuple[dict[str, Any], int]:
    """The step's worker, from start to end: what it returned, and its exit status."""
    progress, result, told = Path(folder) / PROGRESS, dict[str, Any](), 0.0
    with Path(log).open("a", encoding="utf-8") as file:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.run.loop.worker", str(Path(folder) / "job.json")],
            env=os.environ | environment,
            stdin=subprocess.PIPE,  # its end of file tells the worker that this process is gone
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            start_new_session=True,
        )
        assert worker.stdout is not None
        for line in worker.stdout:
            said = json.loads(line)
            if isinstance(said, dict):
                result = said
            elif time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                with contextlib.suppress(OSError):
                    mine = progress.with_name(f".{PROGRESS}-{os.getpid()}")
                    mine.write_text(line, encoding="utf-8")
                    mine.replace(progress)
        return result, worker.wait()
