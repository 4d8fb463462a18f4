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

from stages import KINDS
from stages.base import StageConfig
from stages.estimate.result import Finished, Given
from stages.system.module_command import module_command


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


def estimated(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """Estimate the cost of a step."""
    import torch

    libraries = _libraries(frozenset({config.kind}))[config.kind]
    finished, gpu = arguments["finished"], torch.cuda.is_available()
    room, room_of = arguments["room"], arguments["room_of"]
    if gpu:
        device = torch.cuda.get_device_properties(0)
        room, room_of = device.total_memory, f"each {device.name}"
    with tempfile.TemporaryDirectory() as scratch:
        given = Given(
            paths=paths,
            missing=arguments["missing"],
            dtype=arguments["dtype"],
            device="cuda" if gpu else "cpu",
            room=room,
            room_of=room_of,
            libraries=libraries,
            threads=arguments["threads"],
            finished=Finished(**finished) if finished else None,
            scratch=Path(scratch),
        )
        estimate: dict[str, Any] = config.load("estimate")(config, given).model_dump()
        return estimate
