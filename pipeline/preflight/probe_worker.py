"""The process behind checks, --preview, --estimate and --prefetch: `python -m pipeline.preflight.probe_worker ABILITY`.

Reads a job from standard input and writes one answer for each of its steps to standard output, both as JSON. The output
of libraries goes to standard error.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.run.worker import loadable
from stages import KINDS
from stages.base import Context, Input, StageConfig, UserError
from stages.estimate.result import Estimate, EstimateInputs

Answer = Callable[[StageConfig, dict[str, Path], dict[str, Any]], dict[str, Any]]


def main(ability: str) -> None:
    """Answer for each step of the job."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.load(sys.stdin.buffer)
    with output, tempfile.TemporaryDirectory() as modules:
        if ability != "fetch" and any(step["config"].get("trust_remote_code") for step in job["steps"]):
            os.environ["HF_MODULES_CACHE"] = modules  # transformers copies a model's code there
        json.dump([_answer(ABILITIES[ability], step, job) for step in job["steps"]], output)


def _answer(function: Answer, step: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    cache = Path(job["cache"])
    try:
        config = KINDS[step["kind"]].model_validate(step["config"])
        paths = {name: loadable(Path(path), cache) for name, path in step["paths"].items()}
        return function(
            config, paths, {"step": step["step"], "cache": job["cache"], **job["arguments"], **step["arguments"]}
        )
    except UserError as error:
        return {"problems": [(error.key, str(error))]}


def preview(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """Show `count` rows: for programs, as a page, and as text for a terminal with `colors` and `width`."""
    screen = Console(
        file=io.StringIO(),
        force_terminal=arguments["colors"] is not None,
        color_system=arguments["colors"],
        width=arguments["width"],
        highlight=False,
        legacy_windows=False,
    )
    values, html, renderable = config.load("preview")(arguments["step"], config, paths, arguments["count"])
    screen.print(renderable)
    assert isinstance(screen.file, io.StringIO)
    return {"values": values, "html": html, "text": screen.file.getvalue()}


def fetch(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """Download what no key of the section names."""
    with tempfile.TemporaryDirectory() as scratch:
        return {"fetched": config.load("fetch")(config, paths, Path(scratch))}


def estimate(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        inputs = EstimateInputs(paths=paths, scratch=Path(scratch), **arguments).on_this_device()
        return dict(config.load("estimate")(config, inputs).model_dump())


def check(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """Check a step as the context of its run will be."""
    with _context(config, paths, arguments) as context:
        findings = config.load("check")(context, arguments["on_this_machine"])
    if arguments["gpus"] and config.can_share_gpu and config.has("estimate") and not findings.problems:
        findings.gpu_memory = _gpu_memory(config, paths, arguments)
    return dict(findings.model_dump())


def _gpu_memory(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> int:
    """The bytes that a step needs by its estimate; 0 if they are unknown."""
    needed = {name: arguments[name] for name in ("dtype", "room", "threads")}
    try:
        memory = Estimate(**estimate(config, paths, {"missing": {}} | needed)).memory
    except UserError:
        return 0
    return memory.total if memory else 0


def probe(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> dict[str, Any]:
    """Try the largest step of a step."""
    with _context(config, paths, arguments) as context:
        return dict(config.load("probe")(context))


@contextlib.contextmanager
def _context(config: StageConfig, paths: dict[str, Path], arguments: dict[str, Any]) -> Iterator[Context]:
    """A context like that of the step's run, with a scratch folder that is deleted."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, contents = Path(scratch), arguments["contents"]
        yield Context(
            recipe=arguments["recipe"],
            step=arguments["step"],
            config=config,
            inputs={name: Input(path, fingerprint=contents[name] or "") for name, path in paths.items()},
            out=folder / "out",
            scratch=folder,
            checkpoints=folder / "checkpoints",
            cache=Path(arguments["cache"]),
            progress=lambda done, total, note: None,
        )


ABILITIES: dict[str, Answer] = {
    "preview": preview,
    "fetch": fetch,
    "estimate": estimate,
    "check": check,
    "probe": probe,
}

if __name__ == "__main__":
    main(sys.argv[1])
