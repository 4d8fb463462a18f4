"""The process that runs one step: `python -m pipeline.run.worker JOB`, started by an executor.

It reads the job, calls the stage, and leaves the result in `out` next to the job, and in `checkpoints` what the next
attempt needs after an interruption. The output of the stage and its libraries goes to standard error, which the
executor writes to the step's log; standard output has only messages (pipeline.run.job), one on each line.

A step with `launch` runs in several processes, its ranks: the worker starts `python -m pipeline.run.worker JOB --rank`
in each. All call the stage; only rank 0 reports progress and writes what is published, and the other ranks' folders are
deleted. Every rank ends when the worker does.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from filelock import FileLock, Timeout

from pipeline.run.executor import CORES
from pipeline.run.job import Job, StepResult, encode, read_job, read_result, to_json
from pipeline.store.provenance import machine
from pipeline.store.store import CHECKPOINTS
from stages.base import Context, UserError
from stages.kinds import KINDS
from stages.records.run_record import Progress
from stages.system.integrity import delete, files_in, write_json
from stages.system.locks import holder, sign
from stages.system.memory import peak_memory
from stages.system.os_errors import explain_os_error
from stages.system.terminal_text import first_line
from stages.training.launch import Launch, RankFailed, run_ranks

LOCK_SECONDS = 2.0
"""How often a worker that waits for another one says so."""


def main(job_file: str, is_rank: bool = False) -> int:
    """Run the job in this file; return 0 if the stage returned its metrics, 1 if it raised."""
    threading.Thread(target=_end_with_parent, args=(os.dup(0),), daemon=True).start()
    if cores := os.environ.get(CORES):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    job = read_job(Path(job_file))
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if is_rank:
        rank = int(os.environ.get("RANK", "0"))
        result = _result(lambda: _run_stage(job, messages, rank), job.folder)
        write_json(_rank_file(job.folder, rank), {"time": time.time(), "result": to_json(result)})
    else:
        result = _result(lambda: _run_step(job, messages), job.folder)
        print(encode(result), file=messages)
    return 1 if result.error else 0


def _result(run: Callable[[], StepResult], folder: Path) -> StepResult:
    """What `run` returns, or the error that it raises."""
    try:
        return run()
    except (UserError, RankFailed) as error:
        key = f"{error.key}: " if isinstance(error, UserError) and error.key else ""
        message = explain_os_error(error) or f"{key}{error}"
        return StepResult(error=message, is_user_error=isinstance(error, UserError))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exception
        with contextlib.suppress(OSError):  # the log may be on the full disk
            traceback.print_exc()
        if text := explain_os_error(error, folder):
            return StepResult(error=text, is_user_error=True)
        if type(error).__name__ == "OutOfMemoryError":
            text = "a GPU's memory is full; --estimate shows what needs it, and what would make the step fit"
            return StepResult(error=f"{text} ({first_line(error)})", is_user_error=True, gpu_was_full=True)
        return StepResult(error=f"{type(error).__name__}: {error}")


def _run_step(job: Job, messages: TextIO) -> StepResult:
    """Run the stage in this process, or in its ranks."""
    with _locked(job.lock, messages):
        for entry in job.folder.iterdir():  # from an earlier attempt
            if entry.name.startswith("result-") or (entry.is_dir() and entry.name != CHECKPOINTS):
                delete(entry)
        (job.folder / CHECKPOINTS).mkdir(exist_ok=True)
        result = _run_ranks(job, messages) if job.config.get("launch") else _run_stage(job, messages)
        return replace(result, outputs=files_in(job.folder / "out"))


@contextlib.contextmanager
def _locked(path: Path, messages: TextIO) -> Iterator[None]:
    """Hold the lock of the step's workers: that of a killed run can take a moment to end, or may be stopped."""
    lock = FileLock(path)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            print(encode(Progress(0, 1, f"waits for another worker of this step: {holder(lock)}")), file=messages)
    sign(lock)
    try:
        yield
    finally:
        lock.release()


def _run_stage(job: Job, messages: TextIO, rank: int = 0) -> StepResult:
    stage = KINDS[job.kind]
    folder = job.folder / f"rank-{rank}" if rank else job.folder

    def progress(done: int, total: int, note: str) -> None:
        if rank == 0:
            note = ", ".join(filter(None, [note, peak_memory()]))
            print(encode(Progress(done, total, note)), file=messages)

    context = Context(
        recipe=job.recipe,
        step=job.step,
        config=stage.model_validate(job.config),
        inputs={name: replace(source, path=loadable(source.path, job.cache)) for name, source in job.inputs.items()},
        out=folder / "out",
        scratch=folder / "scratch",
        checkpoints=job.folder / CHECKPOINTS,
        cache=job.cache,
        progress=progress,
        logs=job.log.parent,
    )
    context.out.mkdir(parents=True)
    context.scratch.mkdir()
    if job.config.get("trust_remote_code"):  # transformers copies a model's code there: one copy for each process
        os.environ["HF_MODULES_CACHE"] = str(context.scratch / "modules")
    return StepResult(metrics=stage.load("run")(context), machine=machine())


def _run_ranks(job: Job, messages: TextIO) -> StepResult:
    """Run the stage in the processes that `launch` asks for; return rank 0's result. Raises RankFailed."""
    launch = Launch.model_validate(job.config["launch"])
    os.dup2(messages.fileno(), 1)  # for rank 0's progress
    sys.stdout = sys.stderr
    pipe, _write_end = os.pipe()  # its end of file tells the ranks that this process has ended, however it ended
    os.dup2(pipe, 0)
    try:
        run_ranks(launch, "pipeline.run.worker", [str(job.file), "--rank"], job.folder)
    except RankFailed as error:
        raise RankFailed(_first_error(job.folder, launch.num_processes) or str(error)) from None
    if not _rank_file(job.folder, 0).is_file():
        raise RankFailed("process 0 ran on another machine, which has the result")
    return _rank_result(_rank_file(job.folder, 0))[1]


def _first_error(folder: Path, ranks: int) -> str | None:
    """The error of the rank that failed first. User errors come before others, which may only have lost their peer."""
    files = [file for rank in range(ranks) if (file := _rank_file(folder, rank)).is_file()]
    failed = [(seconds, result) for seconds, result in map(_rank_result, files) if result.error]
    return min(failed, key=lambda entry: (not entry[1].is_user_error, entry[0]))[1].error if failed else None


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"result-{rank}.json"


def _rank_result(file: Path) -> tuple[float, StepResult]:
    """When a rank ended, and its result."""
    values = json.loads(file.read_text(encoding="utf-8"))
    return values["time"], read_result(values["result"])


def loadable(path: Path, cache: Path) -> Path:
    """Return a folder that from_pretrained loads for a model in a .gguf file; any other path as it is."""
    if path.suffix != ".gguf":
        return path
    from stages.models.gguf import to_safetensors

    return to_safetensors(path, cache)


def _end_with_parent(channel: int) -> None:
    """End at once when the parent's end of standard input closes: no worker outlives the run that started it."""
    while os.read(channel, 1):  # sys.stdin has a lock, which the thread would hold when the interpreter shuts down
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # and the processes it started
    os._exit(1)


if __name__ == "__main__":
    is_rank = sys.argv[2:] == ["--rank"]
    status = main(sys.argv[1], is_rank)
    if is_rank:
        # A normal exit of a rank can hang: torch frees its process group and waits for ranks that have ended. os._exit
        # skips that, and with it the exit handlers, so they run here. Without them trackers lose their last values,
        # and temporary folders of libraries stay.
        atexit._run_exitfuncs()
        os._exit(status)
    sys.exit(status)
