"""Checks steps before the first one runs. What passed is cached by content, so that a second check takes no time."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.plan.resolver import Resolver, start_inputs
from pipeline.plan.step import Step, remove_key
from pipeline.preflight.estimate import model_dtype
from pipeline.preflight.estimate_table import format_bytes
from pipeline.preflight.probe import Request, run_probe
from pipeline.recipe.nodes import Problem, RecipeError, split_key
from pipeline.run.executor import Executor
from pipeline.run.local_executor import LocalExecutor, free_disk, machine_memory
from pipeline.store.provenance import installed_version
from pipeline.store.store import Published
from stages.base import Findings, UserError
from stages.system.integrity import content_hash, read_json, write_json

CHECK_VERSION = 3  # part of the cache key; increase it when a check finds more than before
MAX_CACHED = 20_000  # checks in the cache, so that it stays small
PACKAGES = (
    "torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets", "lm_eval", "bitsandbytes",
    "deepspeed", "flash_attn", "kernels",
)  # fmt: skip
ENVIRONMENT = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


@dataclass
class Checks:
    """What the checks of several steps found."""

    findings: dict[str, Findings] = field(default_factory=dict)
    """Step -> findings, of steps that passed."""
    problems: list[Problem] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Errors whose text names their place."""
    notes: list[str] = field(default_factory=list)
    disk: int = 0
    """Bytes that the steps will write to the store, at most."""
    disk_free: int = 0

    @property
    def gpu_memory(self) -> dict[str, int]:
        return {step: findings.gpu_memory for step, findings in self.findings.items()}

    def blame(self, step: Step, key: str | None, text: str) -> None:
        if key:
            self.problems.append(_problem(step, key, text))
        else:
            self.errors += text.splitlines()


def check_steps(
    steps: Sequence[Step],
    results: Mapping[str, Published],
    resolver: Resolver,
    executor: Executor,
    say: Callable[[str], None],
) -> Checks:
    """Check steps that are about to run on `executor`; their references are fetched. Writes only to the cache.

    Raises ProbeError if the process of the checks fails.
    """
    checks, on_this_machine = Checks(), isinstance(executor, LocalExecutor)
    machine = [CHECK_VERSION, *map(installed_version, PACKAGES), *map(os.environ.get, ENVIRONMENT)]
    gpus, threads = (executor.gpus, executor.threads) if isinstance(executor, LocalExecutor) else ([], 1)
    machine += gpus if on_this_machine else ["cluster"]
    cache_file = resolver.runs / "cache" / "checks.json"
    cache = _read(cache_file)
    keys = {step.name: _key(step, results, resolver, machine) for step in steps}
    for step in steps:
        if unmet := executor.unmet_requirement(step.config):
            checks.blame(step, *unmet)
        try:
            step.config.check_services()
        except UserError as error:
            checks.blame(step, error.key, str(error))
        if keys[step.name] in cache:
            checks.findings[step.name] = Findings.model_validate(cache[keys[step.name]])
    unknown = check_files([s for s in steps if s.name not in checks.findings], results, resolver, checks)
    able = [step for step in unknown if step.config.has("check")]
    if able:
        say(f"checking {len(able)} steps: models, tokenizers, every row and task")
    requests = [_request(step, results, resolver) for step in able]
    arguments = {"on_this_machine": on_this_machine, "gpus": gpus, "threads": threads, "room": machine_memory()}
    answers = run_probe("check", "checks", resolver.runs / "cache", requests, arguments)
    findings = dict.fromkeys((step.name for step in unknown), Findings(passed=["files"]))
    findings |= {step.name: Findings.model_validate(answer) for step, answer in zip(able, answers, strict=True)}
    for step in unknown:
        for key, text in findings[step.name].problems:
            checks.blame(step, key, text)
        if not findings[step.name].problems:
            checks.findings[step.name] = findings[step.name]
            cache[keys[step.name]] = findings[step.name].model_dump()
    _check_tasks(steps, checks)
    if checks.findings:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file, dict(list(cache.items())[-MAX_CACHED:]))
    named = [step for step in steps if step.name in checks.findings]
    notes = [_problem(step, key, text) for step in named for key, text in checks.findings[step.name].notes]
    checks.notes = str(RecipeError([], notes)).splitlines()  # each once, in the order of the recipe
    _check_disk(checks, resolver.runs, executor.width)
    return checks


def _check_tasks(steps: Sequence[Step], checks: Checks) -> None:
    """Refuse tasks by which a training chooses its best point if a group or tag that is reported has them."""
    scored = [step for step in steps if step.config.output_kind == "scores" and step.name in checks.findings]
    reporting = {task: step.stage for step in scored for task in checks.findings[step.name].tasks}
    for step in (step for step in steps if step.config.output_kind == "model" and step.name in checks.findings):
        if shared := [task for task in checks.findings[step.name].tasks if task in reporting]:
            text = f"select chooses by items of {shared[0].strip()}, and stages.{reporting[shared[0]]} reports a score"
            checks.blame(step, "select.task", f"{text} on them, which would be inflated; name other items")


def check_files(
    steps: Sequence[Step], results: Mapping[str, Published], resolver: Resolver, checks: Checks
) -> list[Step]:
    """Check the files of the steps without any library; return the steps that passed, and add errors to `checks`."""
    passed = []
    for step in steps:
        try:
            step.config.check(files_of(step, results, resolver))
            passed.append(step)
        except UserError as error:
            checks.blame(step, error.key, str(error))
    return passed


def files_of(step: Step, results: Mapping[str, Published], resolver: Resolver) -> dict[str, Path]:
    """Input name -> path, of a model that is not trained yet the one that its training starts from."""
    return {name: path for name, (path, _) in start_inputs(step, results, resolver).items()}


def _contents_of(step: Step, results: Mapping[str, Published], resolver: Resolver) -> dict[str, str | None]:
    """Input name -> content hash, of the inputs in `files_of`."""
    return {name: content for name, (_, content) in start_inputs(step, results, resolver).items()}


def _problem(step: Step, key: str, text: str) -> Problem:
    return step.recipe.problem(("stages", step.stage, *split_key(key)), text)


def _read(file: Path) -> dict[str, Any]:
    """Read the cache; empty if there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(cache := read_json(file), dict):
            return cache
    return {}


def _key(step: Step, results: Mapping[str, Published], resolver: Resolver, machine: list[Any]) -> str:
    """Return a key of everything that a check depends on, except services and the free disk."""
    contents = _contents_of(step, results, resolver)
    return content_hash([step.kind, step.config.version, step.config.model_dump(), contents, machine])


def _request(step: Step, results: Mapping[str, Published], resolver: Resolver) -> Request:
    contents = _contents_of(step, results, resolver)
    arguments = {"recipe": step.recipe.name, "contents": contents, "dtype": model_dtype(step)}
    return Request(step, files_of(step, results, resolver), arguments)


def _check_disk(checks: Checks, runs: Path, width: int) -> None:
    """Compare the free disk with all results and the largest checkpoints that exist at a time."""
    published = sum(each.published for each in checks.findings.values())
    checkpoints = sum(sorted(each.checkpoints for each in checks.findings.values())[-width:])
    checks.disk, checks.disk_free = published + checkpoints, free_disk(runs)
    free = f"{format_bytes(checks.disk_free)} are free; free some, or name another folder by --runs"
    if published > checks.disk_free:
        checks.errors.append(f"{runs}: the models need {format_bytes(published)}, and {free}")
    elif checks.disk > checks.disk_free:
        checks.notes.append(f"{runs}: models and checkpoints need up to {format_bytes(checks.disk)}, and {free}")


def try_longest_rows(
    steps: Sequence[Step], results: Mapping[str, Published], resolver: Resolver, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Run one forward and backward pass of each training on its longest rows; return step -> rows, tokens of the
    longest, seconds and peak memory. Of steps that differ only in what does not affect cost, the first is tried.

    Raises RecipeError if rows do not fit, and ProbeError if the process fails.
    """
    groups: dict[str, Step] = {}
    for step in (step for step in steps if step.config.has("probe")):
        settings = step.config.model_dump()
        for key in step.config.cost_invariant:
            remove_key(settings, key)
        contents = list(_contents_of(step, results, resolver).values())
        groups.setdefault(content_hash([step.kind, settings, contents]), step)
    tried = list(groups.values())
    if tried:
        say(f"trying the longest rows of {', '.join(step.name for step in tried)}")
    requests = [_request(step, results, resolver) for step in tried]
    answers = run_probe("probe", "--probe", resolver.runs / "cache", requests)
    return {step.name: answer for step, answer in zip(tried, answers, strict=True) if answer}
