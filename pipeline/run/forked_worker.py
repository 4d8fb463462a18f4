"""Workers that are forks of a prepared process (pipeline.run.prepared_process), which has imported their libraries."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from stages.system.module_command import module_command

FIT_TO_FORK = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Keeps numpy and Arrow from starting threads when they are imported, and torch from opening CUDA to count GPUs."""


class ForkedWorker:
    """A worker that a prepared process forked; what subprocess.Popen is for one that was started."""

    def __init__(self, pid: int, stdin: int, stdout: int, channel: socket.socket) -> None:
        self.pid, self.stdout = pid, os.fdopen(stdout)
        self._stdin, self._channel, self._lock = os.fdopen(stdin, "w"), channel, threading.Lock()
        self._status: int | None = None

    def wait(self) -> int:
        """Return the exit status, negative after a signal. The prepared process sends it when the worker has ended."""
        with self._lock:
            if self._status is None:
                self._status = int(_read_line(self._channel) or -signal.SIGKILL)
                self._stdin.close()
            return self._status


class PreparedProcess:
    """A process that has imported what stages of some kinds import, or is about to."""

    def __init__(self, kinds: Sequence[str], environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        call, base = module_command("pipeline.run.prepared_process", *kinds)
        with theirs:
            self._process = subprocess.Popen(
                call,
                env=base | dict(environment) | FIT_TO_FORK,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # if it fails, a worker that is started says why
                start_new_session=True,
            )

    def fork(self, job_file: Path, variables: Mapping[str, str], log: int) -> ForkedWorker | None:
        """Fork a worker that writes its output to `log`; wait for the imports before. None if no fork is possible.

        `variables` are added to its environment; no library may read them when it is imported.
        """
        (worker_stdin, stdin), (stdout, worker_stdout), (channel, theirs) = os.pipe(), os.pipe(), socket.socketpair()
        request = json.dumps({"job": str(job_file), "environment": dict(variables)}).encode()
        with theirs, contextlib.suppress(OSError):
            socket.send_fds(self._control, [request], [worker_stdin, worker_stdout, log, theirs.fileno()])
        os.close(worker_stdin)
        os.close(worker_stdout)
        if line := _read_line(channel):
            return ForkedWorker(int(line), stdin, stdout, channel)
        os.close(stdin)
        os.close(stdout)
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _read_line(channel: socket.socket) -> str:
    """A line that the prepared process sent; empty if that has ended."""
    line = b""
    while not line.endswith(b"\n") and (byte := channel.recv(1)):
        line += byte
    return line.decode()
