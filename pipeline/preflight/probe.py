"""Runs an ability of several stages (check, preview, estimate, fetch) in one separate process, so that the command
never imports their libraries."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.plan.step import Step
from pipeline.recipe.nodes import RecipeError, split_key
from stages.base import Ability
from stages.system.limits import END_SIGNAL, END_TEXT
from stages.system.module_command import module_command
from stages.system.secrets import mask_secrets


class ProbeError(Exception):
    """The process failed without blaming the recipe. The message has its last words."""


@dataclass(frozen=True)
class Request:
    """A step for which the process does something."""

    step: Step
    paths: Mapping[str, Path]
    """Input name -> local path, of a model or of the one that its training starts from."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the ability for this step, as JSON."""

    def to_json(self) -> dict[str, Any]:
        paths = {name: str(path.resolve()) for name, path in self.paths.items()}
        values = {"step": self.step.name, "kind": self.step.kind, "config": self.step.config.model_dump()}
        return values | {"paths": paths, "arguments": self.arguments}


def run_probe(
    ability: Ability,
    option: str,
    cache: Path,
    requests: Sequence[Request],
    arguments: Mapping[str, Any] | None = None,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run `ability` for each request; return their answers.

    Args:
        ability: the function that the stages have.
        option: the command's option, for errors.
        cache: the folder that all steps share.
        arguments: arguments for all steps, as JSON.
        environment: further environment variables of the process.

    Raises:
        RecipeError: with all UserErrors. Those of checks are returned instead, as `problems` of the answers.
        ProbeError: if the process fails.
    """
    if not requests:
        return []
    steps = [request.to_json() for request in requests]
    job = {"cache": str(cache.resolve()), "arguments": arguments or {}, "steps": steps}
    call, variables = module_command("pipeline.preflight.probe_worker", ability)
    variables |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    process = subprocess.run(call, input=json.dumps(job).encode(), capture_output=True, env=variables, check=False)
    if process.returncode == -END_SIGNAL:
        raise ProbeError(f"{option}: {END_TEXT}")
    if process.returncode != 0:
        last = process.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ProbeError(f"{option}: its process ended with status {process.returncode}: {mask_secrets(''.join(last))}")
    answers: list[dict[str, Any]] = json.loads(mask_secrets(process.stdout.decode()))
    problems = [
        request.step.recipe.problem(("stages", request.step.stage, *split_key(key or "")), text)
        for request, answer in zip(requests, answers, strict=True)
        for key, text in answer.get("problems", ())
    ]
    if problems and ability != "check":
        raise RecipeError([], problems)
    return answers
