"""A process that imports the libraries of stages once, and forks checks and workers: `python -m
pipeline.run.prepared_process KIND ...`.

There is one for each environment, since libraries read variables when they are imported. It imports the libraries of
one kind of stage after the other, first those that a fork waits for. It does not fork where that would be unsafe: with
a second thread, or with CUDA open. A fork is a process of its own with what a started worker has: session, cores,
environment, log, and the end of its run.
"""

import contextlib
import gc
import json
import os
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from setproctitle import setproctitle

from stages.kinds import KINDS

REQUEST_BYTES = 2**14
"""More than a request has: kinds, a module, the path of a job, and two variables."""


def main(kinds: Sequence[str]) -> int:
    """Import what the stages of these kinds need, and fork for each request on standard input.

    Returns 0 when the run has ended, in a fork the status of what it runs.
    """
    to_import = list(kinds)
    forks: dict[Any, socket.socket] = {}
    with socket.socket(fileno=os.dup(0)) as control:
        while True:
            readable = select.select([control, *forks], [], [], 0 if to_import else None)[0]
            if not readable:
                _import(to_import.pop(0))
            for ready in readable:
                if ready is not control:
                    _report_end(ready, forks.pop(ready))
                    continue
                message, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 4)
                if not message:
                    return 0
                request = json.loads(message)
                for kind in request["kinds"]:
                    _import(kind)
                *standard, descriptor = descriptors
                channel = socket.socket(fileno=descriptor)
                if not _can_fork():
                    channel.close()
                elif (pid := os.fork()) == 0:
                    os.setsid()
                    _send(channel, os.getpid())
                    for inherited in (control, channel, *forks.values()):
                        inherited.close()
                    for fork in forks:
                        os.close(fork)
                    return _run_module(request, standard)
                else:
                    forks[os.pidfd_open(pid)] = channel
                for descriptor in standard:
                    os.close(descriptor)


def _import(kind: str) -> None:
    with contextlib.suppress(Exception):  # a fork meets the error again, and reports it
        KINDS[kind].load("run")
    gc.freeze()  # collections in the forks leave shared pages alone


def _can_fork() -> bool:
    """Whether this process has a single thread and has not opened CUDA, which also needs this device."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    opened = [os.readlink(name) for name in names if os.path.islink(name)]  # noqa: PTH114, PTH115
    return len(os.listdir("/proc/self/task")) == 1 and not any("nvidia-uvm" in name for name in opened)  # noqa: PTH208


def _run_module(request: Mapping[str, Any], standard: Sequence[int]) -> int:
    """Run a module in this fork; return its status."""
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(request["environment"])
    setproctitle(f"{sys.executable} -m {request['module']} {request['argument']}")
    status: int = import_module(request["module"]).main(request["argument"])
    return status


def _report_end(fork: int, channel: socket.socket) -> None:
    ended = os.waitid(os.P_PIDFD, fork, os.WEXITED)
    assert ended is not None
    os.close(fork)
    with channel:
        _send(channel, ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def _send(channel: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the run has ended
        channel.sendall(f"{number}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
