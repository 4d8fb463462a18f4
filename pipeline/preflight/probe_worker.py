"""The process behind checks, --preview, --estimate and --prefetch: `python -m pipeline.preflight.probe_worker ABILITY`.

Reads one job for each step from standard input and writes their answers to standard output, both as JSON. The output of
libraries goes to standard error.
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
from stages.base import Context, Input, StageConfig, UserError
from stages.estimate.result import Estimate, EstimateInputs
from stages.kinds import KINDS

Answer = Callable[[StageConfig, dict[str, Path], dict[str, Any]], dict[str, Any]]


def main(ability: str) -> int:
    """Answer for each job; return 0."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    jobs = json.load(sys.stdin.buffer)
    with output, tempfile.TemporaryDirectory() as modules:
        if ability != "fetch" and any(job["config"].get("trust_remote_code") for job in jobs):
            os.environ["HF_MODULES_CACHE"] = modules  # transformers copies a model's code there
        json.dump([_answer(ABILITIES[ability], job) for job in jobs], output)
    return 0


def _answer(function: Answer, job: dict[str, Any]) -> dict[str, Any]:
    try:
        config = KINDS[job["kind"]].model_validate(job["config"])
        paths = {name: loadable(Path(path), Path(job["cache"])) for name, path in job["paths"].items()}
        return function(config, paths, job)
    except UserError as error:
        return {"problems": [(error.key, str(error))]}


def preview(config: StageConfig, paths: dict[str, Path], job: dict[str, Any]) -> dict[str, Any]:
    """Show `count` rows: for programs, as a page, and as text for a terminal with `colors` and `width`."""
    text = io.StringIO()
    screen = Console(
        file=text,
        force_terminal=job["colors"] is not None,
        color_system=job["colors"],
        width=job["width"],
        highlight=False,
        legacy_windows=False,
    )
    values, html, renderable = config.load("preview")(job["step"], config, paths, job["count"])
    screen.print(renderable)
    return {"values": values, "html": html, "text": text.getvalue()}


def fetch(config: StageConfig, paths: dict[str, Path], job: dict[str, Any]) -> dict[str, Any]:
    """Download what no key of the section names."""
    config = config.evaluation or config
    with tempfile.TemporaryDirectory() as scratch:
        return {"fetched": config.load("fetch")(config, paths, Path(scratch))}


def estimate(config: StageConfig, paths: dict[str, Path], job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        values = {name: job[name] for name in EstimateInputs.model_fields if name in job}
        inputs = EstimateInputs(**values | {"paths": paths, "scratch": Path(scratch)}).on_this_device()
        return dict(config.load("estimate")(config, inputs).model_dump())


def check(config: StageConfig, paths: dict[str, Path], job: dict[str, Any]) -> dict[str, Any]:
    """Check a step as the context of its run will be."""
    with _context(config, paths, job) as context:
        findings = config.load("check")(context, job["on_this_machine"])
    if job["gpus"] and config.can_share_gpu and config.has("estimate") and not findings.problems:
        with contextlib.suppress(UserError):
            memory = Estimate(**estimate(config, paths, job)).memory
            findings.gpu_memory = memory.total if memory else 0
    return dict(findings.model_dump())


def probe(config: StageConfig, paths: dict[str, Path], job: dict[str, Any]) -> dict[str, Any]:
    """Try the largest step of a step."""
    with _context(config, paths, job) as context:
        return dict(config.load("probe")(context))


@contextlib.contextmanager
def _context(config: StageConfig, paths: dict[str, Path], job: dict[str, Any]) -> Iterator[Context]:
    """A context like that of the step's run, with a scratch folder that is deleted."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, contents = Path(scratch), job["contents"]
        yield Context(
            recipe=job["recipe"],
            step=job["step"],
            config=config,
            inputs={name: Input(path, fingerprint=contents[name] or "") for name, path in paths.items()},
            out=folder / "out",
            scratch=folder,
            checkpoints=folder / "checkpoints",
            cache=Path(job["cache"]),
            progress=lambda done, total, note: None,
        )


ABILITIES: dict[str, Answer] = {answer.__name__: answer for answer in (preview, fetch, estimate, check, probe)}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
