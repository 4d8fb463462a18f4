"""The process that says what steps take: `python -m pipeline.estimate_worker`, started by pipeline.estimate.

Reads its job from standard input and writes an answer for each step to standard output, as JSON; what libraries print
goes to standard error.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from pipeline.aside import serve
from pipeline.worker import loadable
from stages import KINDS
from stages.estimate.result import Finished, Given
from stages.process import module_call


def main() -> None:
    """Do the job."""
    serve(_estimated)


@functools.cache
def _libraries(kinds: frozenset[str]) -> dict[str, int]:
    """What the process of each kind holds before it loads a model; a process for each finds out."""
    modules = {kind: KINDS[kind].runner.partition(":")[0] for kind in kinds}
    running = {}
    for module in set(modules.values()):
        call, environment = module_call("stages.estimate.libraries", module)
        running[module] = subprocess.Popen(call, env=environment, stdout=subprocess.PIPE)
    said = {module: process.communicate()[0] for module, process in running.items()}
    return {kind: int(said[module].split()[-1]) for kind, module in modules.items()}


def _estimated(step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    import torch

    config = KINDS[step["kind"]].model_validate(step["config"])
    assert config.estimator
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
        estimate: dict[str, Any] = resolve_name(config.estimator)(config, given).model_dump()
        return estimate


if __name__ == "__main__":
    main()
