"""The task that runs a step on a machine of a Ray cluster.

Ray pickles this module by value: it looks for modules in the user's current folder first, where a folder `pipeline`
need not be ours. So nothing of this project can be imported here.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

PROGRESS_FILE = "progress.json"
"""In a job's folder: the last progress of the step."""
PROGRESS_SECONDS = 0.5


def unmet_requirement(file: str, paths: str) -> str | None:
    """Why no step can run on this machine; None if one can.

    Args:
        file: a file in the runs folder, with a name that no other folder has.
        paths: further folders in which the project may be installed.
    """
    path = Path(file)
    try:
        path.stat()
        probe = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"does not see {path.parent} as this machine does, or cannot write to it: {error.strerror}"
    call = [sys.executable, "-P", "-c", "import pipeline.run.worker"]
    imported = subprocess.run(call, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if imported.returncode:
        return f"cannot run this project: {''.join(imported.stderr.strip().splitlines()[-1:])}"
    return None


def run(folder: str, log: str, environment: dict[str, str]) -> tuple[str | None, int]:
    """Run the step's worker; return the line with its result, if it wrote one, and its exit status."""
    progress, result, written = Path(folder) / PROGRESS_FILE, None, 0.0
    call, environment = [sys.executable, "-P", "-m"], os.environ | environment
    with open(log, "ab", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW)) as file:
        mask = subprocess.Popen([*call, "pipeline.run.masked_log"], env=environment, stdin=subprocess.PIPE, stdout=file)
    assert mask.stdin is not None
    with mask.stdin:
        worker = subprocess.Popen(
            [*call, "pipeline.run.worker", str(Path(folder) / "job.json")],
            env=environment,
            stdin=subprocess.PIPE,  # end of file on it ends the worker when this process ends
            stdout=subprocess.PIPE,
            stderr=mask.stdin,
            text=True,
            start_new_session=True,
        )
    assert worker.stdout is not None
    for line in worker.stdout:
        if isinstance(json.loads(line), dict):
            result = line
        elif time.monotonic() - written >= PROGRESS_SECONDS:
            written = time.monotonic()
            with contextlib.suppress(OSError):
                temporary = progress.with_name(f".{PROGRESS_FILE}-{os.getpid()}")
                temporary.write_text(line, encoding="utf-8")
                temporary.replace(progress)
    status = worker.wait()
    with contextlib.suppress(subprocess.TimeoutExpired):  # of a process that the worker left behind
        mask.wait(timeout=5)
    return result, status
