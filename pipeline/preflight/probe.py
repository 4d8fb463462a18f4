"""Runs an ability of several stages (check, preview, estimate, fetch) in one separate process, so that the command
never imports their libraries."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.plan.step import Step
from pipeline.recipe.nodes import RecipeError, split_key
from pipeline.store.secrets import mask_secrets
from stages.base import Ability
from stages.system.module_command import module_command


class ProbeError(Exception):
    """The process failed without blaming the recipe. The message has its last words."""


@dataclass(frozen=True)
class ProbeStep:
    """What the process gets to know of one step."""

    step: str
    kind: str
    config: dict[str, Any]
    paths: Mapping[str, str]
    """Input name -> local path, of a model or of the one that its training starts from."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the ability for this step, as JSON."""


def run_probe(
    ability: Ability,
    option: str,
    cache: Path,
    steps: Sequence[Step],
    requests: Sequence[ProbeStep],
    arguments: Mapping[str, Any] | None = None,
    **environment: str,
) -> list[dict[str, Any]]:
    """Do `ask`, and raise RecipeError with all problems if stages blame the recipe; `steps` has their locations."""
    answers = ask(ability, option, cache, requests, arguments, **environment)
    problems = [
        step.recipe.problem(("stages", step.stage, *split_key(key or "")), text)
        for step, answer in zip(steps, answers, strict=True)
        for key, text in answer.get("problems", ())
    ]
    if problems:
        raise RecipeError([], problems)
    return answers


def ask(
    ability: Ability,
    option: str,
    cache: Path,
    requests: Sequence[ProbeStep],
    arguments: Mapping[str, Any] | None = None,
    **environment: str,
) -> list[dict[str, Any]]:
    """Run `ability` for each step; return one answer for each, or `problems`: (key, text) of its UserError.

    Args:
        ability: the function that the stages have.
        option: the command's option, for errors.
        cache: the folder that all steps share.
        requests: one for each step.
        arguments: arguments for all steps, as JSON.
        environment: further environment variables of the process.

    Raises:
        ProbeError: if the process fails.
    """
    if not requests:
        return []
    job = {"cache": str(cache.resolve()), "arguments": arguments or {}, "steps": [asdict(each) for each in requests]}
    call, variables = module_command("pipeline.preflight.probe_worker", ability)
    variables |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    process = subprocess.run(call, input=json.dumps(job).encode(), capture_output=True, env=variables, check=False)
    if process.returncode != 0:
        last = process.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ProbeError(f"{option}: its process ended with status {process.returncode}: {mask_secrets(''.join(last))}")
    answers: list[dict[str, Any]] = json.loads(mask_secrets(process.stdout.decode()))
    return answers
