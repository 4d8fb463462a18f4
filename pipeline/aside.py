"""A process beside the command, in which stages say what only their libraries know: what rows become, what a model
takes, what a task reads. The command itself stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from stages.process import module_call


class AsideFailed(Exception):
    """The process broke down; the message is what it said last."""


def aside(option: str, module: str, job: dict[str, Any], **variables: str) -> Any:
    """What `python -m module` answers to `job`, as JSON both; `option` is what the user asked for.

    `variables` are laid over the environment.
    """
    call, environment = module_call(module)
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run(call, input=json.dumps(job).encode(), capture_output=True, env=environment, check=False)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise AsideFailed(f"{option}: its process ended with status {done.returncode}: {''.join(last)}")
    return json.loads(done.stdout)


def serve(answer: Callable[[Any], list[Any]]) -> None:
    """What such a process does: reads its job from standard input and writes its answers to standard output, as JSON;
    what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin.buffer)
    with answers:
        json.dump(answer(job), answers)
