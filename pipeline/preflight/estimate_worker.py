"""The process that says what steps take: `python -m pipeline.preflight.estimate_worker`, started by pipeline.estimate.

Reads its job from standard input and writes an answer for each step to standard output, as JSON; what libraries print
goes to standard error.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from pipeline.preflight.probe import serve
from pipeline.run.worker import loadable
from stages import KINDS
from stages.estimate.result import Finished, Given
from stages.system.module_command import module_command


def main() -> None:
    """Do the job."""
    serve(_estimated)


@functools.cache
def _libraries(kinds: frozenset[str]) -> dict[str, int]:
    """What the process of each kind holds before it loads a model; a process for each finds out."""
    modules = {kind: f"{KINDS[kind].__module__.rpartition('.')[0]}.stage" for kind in kinds}
    running = {}
    for module in set(modules.values()):
        call, environment = module_command("stages.estimate.library_memory", module)
        running[module] = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE)
    said = {module: process.communicate()[0] for module, process in running.items()}
    return {kind: int(said[module].split()[-1]) for kind, module in modules.items()}


def _estimated(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    import torch

    config = KINDS[step["kind"]].model_validate(step["config"])
    libraries = _libraries(frozenset(each["kind"] for each in job["steps"]))[step["kind"]]
    finished, gpu = step["finished"], torch.cuda.is_available()
    room, room_of = step["room"], step["room_of"]
    if gpu:
        device = torch.cuda.get_device_properties(0)
        room, room_of = device.total_memory, f"each {device.name}"
    with tempfile.TemporaryDirectory() as scratch:
        given = Given(
            paths={name: loadable(Path(path), Path(job["cache"])) for name, path in step["paths"].items()},
            missing=step["missing"],
            dtype=step["dtype"],
            device="cuda" if gpu else "cpu",
            room=room,
            room_of=room_of,
            libraries=libraries,
            threads=job["threads"],
            finished=Finished(**finished) if finished else None,
            scratch=Path(scratch),
        )
        estimate: dict[str, Any] = config.load("estimate")(config, given).model_dump()
        return estimate


if __name__ == "__main__":
    main()
