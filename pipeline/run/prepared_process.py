"""A process that imports the libraries of a stage once, and forks workers: `python -m pipeline.run.prepared_process`.

There is one for each set of imports (StageConfig.prepared_with) and environment, since libraries read variables when
they are imported. It ends where a fork would be unsafe: with a second thread, or with CUDA open. A fork is a process
of its own with what a started worker has: session, cores, environment, log, and the end of its run.
"""

import contextlib
import gc
import json
import os
import select
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from pipeline.run import worker
from stages import KINDS

REQUEST_BYTES = 2**14
"""More than a request has: the path of a job, and two variables."""


def main(kinds: Sequence[str]) -> int:
    """Import what the stages need, and fork a worker for each request on standard input; its own status in a fork."""
    for kind in kinds:
        KINDS[kind].load("run")
    gc.freeze()  # collections in the workers leave shared pages alone
    workers: dict[Any, socket.socket] = {}
    with socket.socket(fileno=os.dup(0)) as control:
        while _can_fork():
            for ready in select.select([control, *workers], [], [])[0]:
                if ready is not control:
                    _report_end(ready, workers.pop(ready))
                    continue
                request, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 4)
                if not request:
                    return 0  # the run has ended
                *standard, descriptor = descriptors
                channel = socket.socket(fileno=descriptor)
                if (pid := os.fork()) == 0:
                    os.setsid()
                    _send(channel, os.getpid())
                    for inherited in (control, channel, *workers.values()):
                        inherited.close()
                    for child in workers:
                        os.close(child)
                    return _work(json.loads(request), standard)
                for descriptor in standard:
                    os.close(descriptor)
                workers[os.pidfd_open(pid)] = channel
    return 1


def _can_fork() -> bool:
    """Whether this process has a single thread and has not opened CUDA, which also needs this device."""
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    opened = [os.readlink(name) for name in names if os.path.islink(name)]  # noqa: PTH114, PTH115
    return len(os.listdir("/proc/self/task")) == 1 and not any("nvidia-uvm" in name for name in opened)  # noqa: PTH208


def _work(request: Mapping[str, Any], standard: Sequence[int]) -> int:
    """Run a job in this fork; return its status."""
    for number, descriptor in enumerate(standard):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.update(request["environment"])
    setproctitle(f"{sys.executable} -m pipeline.run.worker {request['job']}")
    return worker.main(Path(request["job"]))


def _report_end(child: int, channel: socket.socket) -> None:
    ended = os.waitid(os.P_PIDFD, child, os.WEXITED)
    assert ended is not None
    os.close(child)
    with channel:
        _send(channel, ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def _send(channel: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the run has ended
        channel.sendall(f"{number}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
