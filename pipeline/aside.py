"""A process beside the command, in which stages say what only their libraries know: what rows become, what a model
takes, what a task reads. The command itself stays light."""

from __future__ import annotations

import json
import subprocess
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
