"""A process beside the command, in which stages say what only their libraries know: what rows become, what a model
takes, what a task reads. The command itself stays light."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.plan.planner import Step
from pipeline.recipe.nodes import split_key
from stages.base import UserError
from stages.system.module_command import module_command


class ProbeError(Exception):
    """The process broke down; the message is what it said last."""


def run_probe(
    option: str, module: str, steps: Sequence[Step], job: dict[str, Any], **variables: str
) -> list[dict[str, Any]]:
    """What `python -m module` answers of each of `steps`, which `job["steps"]` tells it of, as JSON both; `option` is
    what the user asked for. `variables` are laid over the environment.

    Raises RecipeError for what a stage finds wrong, ProbeError where the process breaks down.
    """
    if not steps:
        return []
    call, environment = module_command(module)
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run(call, input=json.dumps(job).encode(), capture_output=True, env=environment, check=False)
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ProbeError(f"{option}: its process ended with status {done.returncode}: {''.join(last)}")
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    for step, answer in zip(steps, answers, strict=True):
        if "error" in answer:
            key = split_key(answer["key"]) if answer["key"] else ()
            raise step.recipe.error(("stages", step.stage, *key), answer["error"])
    return answers


def serve(answer: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]) -> None:
    """What such a process does: reads its job from standard input and writes `answer(step, job)` for each of its steps
    to standard output, as JSON; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin.buffer)
    with answers:
        json.dump([_answer(answer, step, job) for step in job["steps"]], answers)


def _answer(
    answer: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]], step: dict[str, Any], job: dict[str, Any]
) -> dict[str, Any]:
    try:
        return answer(step, job)
    except UserError as error:
        return {"error": str(error), "key": error.key}
