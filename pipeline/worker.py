"""The process that runs one step: `python -m pipeline.worker JOB`, started by an executor.

Reads the job, calls the stage, writes `result.json` beside the job. What the stage and its libraries print goes to
standard error, which the executor keeps as the step's log; standard output carries only progress, one JSON per line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from pipeline.store import write_json
from stages import KINDS
from stages.base import BadInput, Context, Input


def main(job_file: Path) -> int:
    """Run the job; 0 where the stage returned its metrics, 1 where it raised."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(job_file.read_text(encoding="utf-8"))
    result: dict[str, Any]
    try:
        result = {"metrics": _run(job, job_file.parent, events)}
    except BadInput as error:
        result = {"error": str(error)}
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    write_json(job_file.with_name("result.json"), result)
    return 1 if "error" in result else 0


def _run(job: dict[str, Any], folder: Path, events: TextIO) -> dict[str, Any]:
    stage = KINDS[job["kind"]]
    cache = Path(job["cache"])
    inputs = {name: _input(value) for name, value in job["inputs"].items()}
    context = Context(
        recipe=job["recipe"],
        step=job["step"],
        config=stage.model_validate(job["config"]),
        inputs={name: _loadable(value, cache) for name, value in inputs.items()},
        out=folder / "out",
        scratch=folder / "scratch",
        cache=cache,
        progress=lambda done, total, note: print(json.dumps([done, total, note]), file=events),
    )
    context.out.mkdir()
    context.scratch.mkdir()
    module, _, function = stage.runner.partition(":")
    return getattr(importlib.import_module(module), function)(context)


def _input(value: dict[str, Any]) -> Input:
    nested = {name: _input(inner) for name, inner in value["inputs"].items()}
    return Input(**{**value, "path": Path(value["path"]), "inputs": nested})


def _loadable(found: Input, cache: Path) -> Input:
    """A model in a .gguf file as a folder that from_pretrained loads."""
    if found.path.suffix != ".gguf":
        return found
    from stages.gguf import to_safetensors

    return Input(**{**vars(found), "path": to_safetensors(found.path, cache)})


def _end_with_parent() -> None:
    """End at once when the executor's end of standard input closes: no worker outlives the run that started it."""
    while os.read(0, 1):  # not through sys.stdin, whose lock would be held when the interpreter shuts down
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
