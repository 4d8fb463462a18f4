"""The process that runs one step: `python -m pipeline.run.worker JOB`, started by an executor.

Reads the job, calls the stage, and leaves what it made in `out` beside the job, and in `checkpoints` what it takes to
go on after an interruption. What the stage and its libraries print goes to standard error, which the executor keeps as
the step's log; standard output carries only progress, one JSON list per line, and at last the result, a JSON object.

A step with `launch` runs in several processes, its ranks: the worker starts `python -m pipeline.run.worker JOB --rank`
in each. All call the stage; only rank 0 reports progress and writes what is published, and the other ranks' folders are
deleted. Every rank ends when the worker does.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock

from pipeline.run.local_executor import CORES
from pipeline.run.os_errors import explain_os_error
from pipeline.store.provenance import machine
from pipeline.store.store import CHECKPOINTS
from stages import KINDS
from stages.base import Context, Input, UserError
from stages.records.metrics import Metrics
from stages.system.integrity import files_in, write_json
from stages.system.memory import peak_memory
from stages.training.launch import Launch, RankFailed, run_ranks


def main(job_file: Path, is_rank: bool = False) -> int:
    """Run the job; 0 where the stage returned its metrics, 1 where it raised."""
    threading.Thread(target=_end_with_parent, args=(os.dup(0),), daemon=True).start()
    if cores := os.environ.get(CORES):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    folder = job_file.parent
    job = json.loads(job_file.read_text(encoding="utf-8"))
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if is_rank:
        rank = int(os.environ.get("RANK", "0"))
        result = _result(lambda: _run(job, folder, events, rank), folder)
        write_json(_rank_file(folder, rank), result | {"time": time.time()})
    else:
        result = _result(lambda: _make(job, folder, events), folder)
        print(json.dumps(result), file=events)
    return 1 if "error" in result else 0


def _result(run: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What is told of a run: what it returned, or its error and whether the user can mend it."""
    try:
        return run()
    except (UserError, RankFailed) as error:
        return {"error": explain_os_error(error) or str(error), "is_user_error": isinstance(error, UserError)}
    except Exception as error:
        with contextlib.suppress(OSError):  # the log may lie on the full disk
            traceback.print_exc()
        if why := explain_os_error(error, folder):
            return {"error": why, "is_user_error": True}
        return {"error": f"{type(error).__name__}: {error}", "is_user_error": False}


def _make(job: dict[str, Any], folder: Path, events: TextIO) -> dict[str, Any]:
    """Run the job in this process, or in the ranks that it asks for; the result."""
    with FileLock(job["lock"]):  # a killed run's worker may take a moment to end
        for left in folder.iterdir():  # of an earlier attempt
            if left.is_dir() and left.name != CHECKPOINTS:
                shutil.rmtree(left)
            elif left.name.startswith("result-"):
                left.unlink()
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
        result = _run_ranks(job, folder, events) if job["config"].get("launch") else _run(job, folder, events)
        return result | {"outputs": files_in(folder / "out")}


def _run(job: dict[str, Any], folder: Path, events: TextIO, rank: int = 0) -> dict[str, Any]:
    stage = KINDS[job["kind"]]
    cache = Path(job["cache"])
    inputs = {name: _input(value) for name, value in job["inputs"].items()}
    own = folder / f"rank-{rank}" if rank else folder

    def progress(done: int, total: int, note: str) -> None:
        if rank == 0:
            told = ", ".join(filter(None, [note, peak_memory()]))
            print(json.dumps([done, total, told]), file=events)

    context = Context(
        recipe=job["recipe"],
        step=job["step"],
        config=stage.model_validate(job["config"]),
        inputs={name: replace(value, path=loadable(value.path, cache)) for name, value in inputs.items()},
        out=own / "out",
        scratch=own / "scratch",
        checkpoints=folder / CHECKPOINTS,
        cache=cache,
        progress=progress,
        logs=Path(job["logs"]),
    )
    context.out.mkdir(parents=True)
    context.scratch.mkdir()
    if job["config"].get("trust_remote_code"):  # transformers copies a model's code there: one copy for each process
        os.environ["HF_MODULES_CACHE"] = str(context.scratch / "modules")
    metrics = stage.load("run")(context)
    return {"metrics": metrics.to_json(), "machine": machine()}


def _run_ranks(job: dict[str, Any], folder: Path, events: TextIO) -> dict[str, Any]:
    """Run the job in the processes that its `launch` asks for: rank 0's result, or the error that came first."""
    launch = Launch.model_validate(job["config"]["launch"])
    os.dup2(events.fileno(), 1)  # for rank 0's progress
    sys.stdout = sys.stderr
    until_our_end, _held = os.pipe()  # its end of file tells the ranks that we are gone, however we ended
    os.dup2(until_our_end, 0)
    try:
        run_ranks(launch, "pipeline.run.loop.worker", [str(folder / "job.json"), "--rank"], folder)
    except RankFailed as error:
        raise RankFailed(_first_error(folder, launch.num_processes) or str(error)) from None
    if not _rank_file(folder, 0).is_file():
        raise RankFailed("process 0 ran on another machine, which has the result")
    return json.loads(_rank_file(folder, 0).read_text(encoding="utf-8"))


def _first_error(folder: Path, ranks: int) -> str | None:
    """The error of the rank that failed first. One that a user can mend goes first: others may have lost its rank."""
    files = [file for rank in range(ranks) if (file := _rank_file(folder, rank)).is_file()]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    failed = [result for result in results if "error" in result]
    return min(failed, key=lambda result: (not result["is_user_error"], result["time"]))["error"] if failed else None


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.json"


def _input(value: dict[str, Any]) -> Input:
    nested = {name: _input(inner) for name, inner in value["inputs"].items()}
    metrics = Metrics.model_validate(value.get("metrics", {}))
    return Input(**{**value, "path": Path(value["path"]), "inputs": nested, "metrics": metrics})


def loadable(path: Path, cache: Path) -> Path:
    """A model in a .gguf file as a folder that from_pretrained loads; any other path as it is."""
    if path.suffix != ".gguf":
        return path
    from stages.models.gguf import to_safetensors

    return to_safetensors(path, cache)


def _end_with_parent(channel: int) -> None:
    """End at once when our parent's end of standard input closes: no worker outlives the run that started it."""
    while os.read(channel, 1):  # not through sys.stdin, whose lock would be held when the interpreter shuts down
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # what it started, too
    os._exit(1)


if __name__ == "__main__":
    is_rank = sys.argv[2:] == ["--rank"]
    status = main(Path(sys.argv[1]), is_rank)
    if is_rank:  # freeing what torch holds for a group of processes may wait forever
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)
