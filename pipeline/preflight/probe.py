"""Runs an ability of several stages (check, preview, estimate, fetch) in one separate process, so that the command
never imports their libraries."""

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.plan.resolver import Resolver
from pipeline.plan.step import Step
from pipeline.recipe.nodes import Problem, RecipeError, split_key
from pipeline.run.executor import Executor
from pipeline.store.references import Local
from pipeline.store.store import Published
from stages.base import Ability
from stages.system.limits import END_SIGNAL, END_TEXT
from stages.system.module_command import module_command
from stages.system.secrets import mask_secrets

WORKER = "pipeline.preflight.probe_worker"


class ProbeError(Exception):
    """The process failed without blaming the recipe. The message has its last words."""


@dataclass(frozen=True)
class Request:
    """A step for which the process does something."""

    step: Step
    paths: Mapping[str, Path]
    """Input name -> local path, of a model or of the one that its training starts from."""
    contents: Mapping[str, str | None] = field(default_factory=dict)
    """Input name -> content hash, for abilities that need it."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the ability for this step, as JSON."""


def start_request(step: Step, results: Mapping[str, Published], resolver: Resolver) -> Request:
    """Return a request with the paths and content hashes of the step's models and references, which are fetched.

    Of a model that is not trained yet, walk back to its nearest published ancestor, else to the base model.
    """
    paths, contents = dict[str, Path](), dict[str, str | None]()
    for name, source in step.inputs.items():
        while isinstance(source, Step) and source.config.output_kind == "model" and source.name not in results:
            source = source.inputs["model"]
        if not isinstance(source, Step):
            paths[name], contents[name] = resolver.path(source), resolver.content(source)
        elif source.config.output_kind == "model":
            result = results[source.name]
            paths[name], contents[name] = result.path, result.manifest.digest
    return Request(step, paths, contents)


def model_dtype(step: Step) -> str:
    """Return the dtype of the step's model if the recipe or a local config.json names it, else `auto`."""
    source = step.inputs.get("model")
    if isinstance(source, Step):
        return source.config.published_dtype or "auto"
    config = source.path / "config.json" if isinstance(source, Local) else None
    try:
        return str(json.loads(config.read_text())["dtype"]) if config else "auto"
    except (OSError, ValueError, KeyError, TypeError):  # the stage reports a broken config
        return "auto"


def problem_at(step: Step, key: str, text: str) -> Problem:
    """Return a problem of a dotted key in the stage's section; an empty key blames the whole section."""
    return step.recipe.problem(("stages", step.stage, *split_key(key)), text)


def run_probe(
    ability: Ability,
    option: str,
    cache: Path,
    requests: Sequence[Request],
    arguments: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    executor: Executor | None = None,
) -> list[dict[str, Any]]:
    """Run `ability` for each request; return their answers.

    Args:
        ability: the function that the stages have.
        option: the command's option, for errors.
        cache: the folder that all steps share.
        arguments: arguments for all steps, as JSON.
        environment: further environment variables of the process, if it is no fork.
        executor: one that may have a process to fork, which has imported the libraries.

    Raises:
        RecipeError: with all UserErrors. Those of checks are returned instead, as `problems` of the answers.
        ProbeError: if the process fails.
    """
    if not requests:
        return []
    jobs = [
        {
            "recipe": request.step.recipe.name,
            "step": request.step.name,
            "kind": request.step.kind,
            "config": request.step.config.model_dump(),
            "dtype": model_dtype(request.step),
            "paths": {name: str(path.resolve()) for name, path in request.paths.items()},
            "contents": request.contents,
            "cache": str(cache.resolve()),
            **(arguments or {}),
            **request.arguments,
        }
        for request in requests
    ]
    kinds = {request.step.kind for request in requests}
    # transformers reads where to copy a model's own code when it is imported
    copies_code = any(job["config"].get("trust_remote_code") for job in jobs)
    with tempfile.TemporaryFile() as log:
        if executor and not copies_code and (forked := executor.fork(kinds, WORKER, ability, log.fileno())):
            output, status = forked.communicate(json.dumps(jobs)), forked.wait()
        else:
            call, variables = module_command(WORKER, ability)
            variables |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1", **(environment or {})}
            text, pipe = json.dumps(jobs).encode(), subprocess.PIPE
            process = subprocess.run(call, input=text, stdout=pipe, stderr=log, env=variables, check=False)
            output, status = process.stdout.decode(), process.returncode
        log.seek(0)
        last_line = log.read().decode(errors="replace").strip().splitlines()[-1:]
    if status == -END_SIGNAL:
        raise ProbeError(f"{option}: {END_TEXT}")
    if status != 0:
        raise ProbeError(f"{option}: its process ended with status {status}: {mask_secrets(''.join(last_line))}")
    answers: list[dict[str, Any]] = json.loads(mask_secrets(output))
    problems = [
        problem_at(request.step, key or "", text)
        for request, answer in zip(requests, answers, strict=True)
        for key, text in answer.get("problems", ())
    ]
    if problems and ability != "check":
        raise RecipeError([], problems)
    return answers
