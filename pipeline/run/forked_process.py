"""Checks and workers that are forks of a prepared process (pipeline.run.prepared_process), and how to end them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

from stages.system.module_command import module_command

FIT_TO_FORK = {
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Keeps numpy and Arrow from starting threads when they are imported, and torch from opening CUDA to count GPUs."""


class ForkedProcess:
    """A fork of a prepared process. It has what LocalExecutor uses of subprocess.Popen."""

    def __init__(self, pid: int, stdin: int, stdout: int, messages: TextIO) -> None:
        self.pid, self.stdout = pid, os.fdopen(stdout, encoding="utf-8")
        self._stdin, self._messages, self._lock = os.fdopen(stdin, "w", encoding="utf-8"), messages, threading.Lock()
        self._status: int | None = None

    def communicate(self, text: str) -> str:
        """Write this to its standard input and close that; return its output. Ends it if it is interrupted."""
        try:
            with contextlib.suppress(BrokenPipeError), self._stdin:
                self._stdin.write(text)
            return self.stdout.read()
        except BaseException:
            kill(self)
            raise

    def wait(self) -> int:
        """Return the exit status, negative after a signal. The prepared process sends it when the fork has ended."""
        with self._lock:
            if self._status is None:
                self._status = int(self._messages.readline() or -signal.SIGKILL)
                self._stdin.close()
            return self._status


class PreparedProcess:
    """A process that has imported what stages of these kinds import, or is about to."""

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

    def fork(
        self, kinds: Iterable[str], module: str, argument: str, log: int, variables: Mapping[str, str] | None = None
    ) -> ForkedProcess | None:
        """Fork, and call main(argument) of a module there. None if no fork is possible.

        Args:
            kinds: the fork waits until the libraries of these kinds of stages are imported.
            module: the module's full name.
            argument: its argument.
            log: descriptor of the file for standard error.
            variables: added to the environment; no library may read them when it is imported.
        """
        (fork_stdin, stdin), (stdout, fork_stdout), (channel, theirs) = os.pipe(), os.pipe(), socket.socketpair()
        request = {"kinds": [*kinds], "module": module, "argument": argument, "environment": dict(variables or {})}
        with theirs, contextlib.suppress(OSError):
            message = json.dumps(request).encode()
            socket.send_fds(self._control, [message], [fork_stdin, fork_stdout, log, theirs.fileno()])
        os.close(fork_stdin)
        os.close(fork_stdout)
        with channel:
            messages = channel.makefile()
        if line := messages.readline():
            return ForkedProcess(int(line), stdin, stdout, messages)
        os.close(stdin)
        os.close(stdout)
        return None

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def kill(process: subprocess.Popen[str] | ForkedProcess) -> None:
    """End a process that leads its process group, and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
