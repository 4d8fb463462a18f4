"""Finds everything that is known to be wrong before any step runs, and fetches what the steps need.

Checks that passed are cached by content, so that a second check takes no time.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.plan.cache import Decisions, cached_results, decide
from pipeline.plan.resolver import Resolver
from pipeline.plan.selection import Selection, check_inputs, steps_to_run
from pipeline.plan.step import Plan, Step
from pipeline.preflight.estimate import cost_settings, format_bytes
from pipeline.preflight.probe import Request, problem_at, run_probe, start_request
from pipeline.recipe.nodes import Problem, RecipeError
from pipeline.run.executor import Executor
from pipeline.run.local_executor import LocalExecutor, free_disk, machine_memory
from pipeline.store.provenance import installed_version
from pipeline.store.store import Store
from stages.base import Findings, UserError
from stages.system.integrity import content_hash, read_json, write_json

CHECK_VERSION = 3  # part of the cache key; increase it when a check finds more than before
MAX_CACHED = 20_000  # checks in the cache, so that it stays small
PACKAGES = (
    "torch", "transformers", "tokenizers", "trl", "peft", "accelerate", "datasets", "lm_eval", "bitsandbytes",
    "deepspeed", "flash_attn", "kernels",
)  # fmt: skip
ENVIRONMENT = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")

_DELETED_FOLDERS = ("scratch", "out")
"""Folders of an unfinished step that are deleted as a whole, without following a link, before anything is written."""


@dataclass
class Preparation:
    """What is known about a plan right before it runs."""

    decisions: Decisions
    """The cache decisions, with the commits of hub references resolved and all inputs of steps that run verified."""
    steps: list[Step]
    """The steps that run."""
    findings: dict[str, Findings] = field(default_factory=dict)
    """Step -> findings, of steps that passed; empty if only files were checked."""
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
            self.problems.append(problem_at(step, key, text))
        else:
            self.errors += text.splitlines()


def refuse_foreign_links(runs: Path) -> None:
    """Raise RecipeError for a symbolic link below `runs`, which may itself be one, to something else than a result."""
    if links := sorted(_foreign_links(runs.resolve())):
        text = "is a symbolic link to something else than a result, and nothing is written or deleted through it"
        raise RecipeError([f"{runs / link}: {text}; delete the link" for link in links[:20]])


def _foreign_links(root: Path) -> Iterator[Path]:
    queue = [root] if root.is_dir() else []
    while queue:
        folder = queue.pop()
        parts = folder.relative_to(root).parts
        is_published = len(parts) == 3 and parts[0] == "store" and parts[1] not in ("unfinished", "locks")
        is_deleted = len(parts) == 4 and parts[:2] == ("store", "unfinished") and parts[3] in _DELETED_FOLDERS
        if is_published or is_deleted:
            continue
        is_run = len(parts) == 1 and parts[0] not in ("store", "cache")
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_symlink():
                    if not is_run or not Path(os.path.realpath(entry.path)).is_relative_to(root / "store"):
                        yield Path(entry.path).relative_to(root)
                elif entry.is_dir(follow_symlinks=False):
                    queue.append(Path(entry.path))


def prepare(
    plan: Plan,
    selection: Selection,
    store: Store,
    resolver: Resolver,
    executor: Executor | None = None,
    say: Callable[[str], None] = lambda line: None,
    runs_next: bool = False,
) -> Preparation:
    """Resolve and fetch references, verify the inputs of steps that run, and check the steps as `executor` would run
    them; without one, only their files. Writes only to the cache.

    Raises:
        RecipeError: with all problems.
        ProbeError: if the process of the checks fails.
    """
    resolver.pin(plan.steps)
    decisions = _decide_verified(plan, selection, store, resolver)
    resolver.hashes.save()
    check_inputs(plan, selection, decisions)
    preparation = Preparation(decisions, steps_to_run(plan, selection, decisions))
    resolver.fetch(preparation.steps)
    results = cached_results(decisions)
    requests = [start_request(step, results, resolver) for step in preparation.steps]
    if executor:
        if runs_next:
            executor.expect(dict.fromkeys(step.kind for step in preparation.steps))
        _check_steps(preparation, requests, resolver, executor, say)
    else:
        _check_files(preparation, requests)
    if preparation.problems or preparation.errors:
        raise RecipeError(preparation.errors, preparation.problems)
    return preparation


def _decide_verified(plan: Plan, selection: Selection, store: Store, resolver: Resolver) -> Decisions:
    """Decide what is cached, and read the results that steps about to run start from; damaged ones run again."""
    damaged: dict[str, str] = {}
    verified: set[str] = set()
    while True:
        decisions = decide(plan, store, resolver, selection.forced, damaged)
        sources = {
            source.name: result
            for step in steps_to_run(plan, selection, decisions)
            for source in step.dependencies
            if (result := decisions[source.name].published) and source.name not in verified
        }
        if not sources:
            return decisions
        for name, result in sources.items():
            verified.add(name)
            if damage := result.damage():
                damaged[name] = damage


def _check_steps(
    preparation: Preparation,
    requests: Sequence[Request],
    resolver: Resolver,
    executor: Executor,
    say: Callable[[str], None],
) -> None:
    """Check steps that are about to run on `executor`, and add to `preparation` what was found."""
    on_this_machine, findings = isinstance(executor, LocalExecutor), preparation.findings
    gpus, threads = (executor.gpus, executor.threads) if isinstance(executor, LocalExecutor) else ([], 1)
    machine = [CHECK_VERSION, *map(installed_version, PACKAGES), *map(os.environ.get, ENVIRONMENT)]
    machine += gpus if on_this_machine else ["cluster"]
    cache_file = resolver.runs / "cache" / "checks.json"
    cache, keys = _read(cache_file), dict[str, str]()
    for request in requests:
        step, config = request.step, request.step.config
        if unmet := executor.unmet_requirement(config):
            preparation.blame(step, *unmet)
        try:
            config.check_services()
        except UserError as error:
            preparation.blame(step, error.key, str(error))
        content = [step.kind, config.version, config.model_dump(), request.contents, machine]
        keys[step.name] = key = content_hash(content)  # of all that decides the check, but services and free disk
        if key in cache:
            findings[step.name] = Findings.model_validate(cache[key])
    unknown = _check_files(preparation, [each for each in requests if each.step.name not in findings])
    able = [request for request in unknown if request.step.config.has("check")]
    if able:
        say(f"checking {len(able)} steps: models, tokenizers, every row and task")
    arguments = {"on_this_machine": on_this_machine, "gpus": gpus, "threads": threads, "room": machine_memory()}
    answers = run_probe("check", "checks", resolver.runs / "cache", able, arguments, executor=executor)
    checked = dict.fromkeys((request.step.name for request in unknown), Findings(passed=["files"]))
    checked |= {each.step.name: Findings.model_validate(answer) for each, answer in zip(able, answers, strict=True)}
    for step in (request.step for request in unknown):
        for blamed, text in checked[step.name].problems:
            preparation.blame(step, blamed, text)
        if not checked[step.name].problems:
            findings[step.name] = checked[step.name]
            cache[keys[step.name]] = checked[step.name].model_dump()
    _check_tasks(preparation)
    if findings:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache_file, dict(list(cache.items())[-MAX_CACHED:]))
    passed = [step for step in preparation.steps if step.name in findings]
    notes = [problem_at(step, blamed, text) for step in passed for blamed, text in findings[step.name].notes]
    preparation.notes = str(RecipeError([], notes)).splitlines()  # each once, in the order of the recipe
    _check_disk(preparation, resolver.runs, executor.width)


def _check_files(preparation: Preparation, requests: Sequence[Request]) -> list[Request]:
    """Check the files of steps without any library; return the requests of those that passed."""
    passed = []
    for request in requests:
        try:
            request.step.config.check(dict(request.paths))
            passed.append(request)
        except UserError as error:
            preparation.blame(request.step, error.key, str(error))
    return passed


def _check_tasks(preparation: Preparation) -> None:
    """Refuse tasks by which a training chooses its best point if a group or tag that is reported has them."""
    steps, findings = [step for step in preparation.steps if step.name in preparation.findings], preparation.findings
    scored = [step for step in steps if step.config.output_kind == "scores"]
    reporting = {task: step.stage for step in scored for task in findings[step.name].tasks}
    for step in (step for step in steps if step.config.output_kind == "model"):
        if shared := [task for task in findings[step.name].tasks if task in reporting]:
            text = f"select chooses by items of {shared[0].strip()}, and stages.{reporting[shared[0]]} reports a score"
            preparation.blame(step, "select.task", f"{text} on them, which would be inflated; name other items")


def _check_disk(preparation: Preparation, runs: Path, width: int) -> None:
    """Compare the free disk with all results and the largest checkpoints that exist at a time."""
    published = sum(each.published for each in preparation.findings.values())
    checkpoints = sum(sorted(each.checkpoints for each in preparation.findings.values())[-width:])
    preparation.disk, preparation.disk_free = published + checkpoints, free_disk(runs)
    free = f"{format_bytes(preparation.disk_free)} are free; free some, or name another folder by --runs"
    if published > preparation.disk_free:
        preparation.errors.append(f"{runs}: the models need {format_bytes(published)}, and {free}")
    elif preparation.disk > preparation.disk_free:
        needed = format_bytes(preparation.disk)
        preparation.notes.append(f"{runs}: models and checkpoints need up to {needed}, and {free}")


def _read(file: Path) -> dict[str, Any]:
    """Read the cache; empty if there is none, or a damaged one."""
    with contextlib.suppress(OSError, ValueError):
        if isinstance(cache := read_json(file), dict):
            return cache
    return {}


def try_longest_rows(
    preparation: Preparation, resolver: Resolver, say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Run one forward and backward pass of each training on its longest rows; return step -> rows, tokens of the
    longest, seconds and peak memory. Of steps that differ only in what does not affect cost, the first is tried.

    Raises RecipeError if rows do not fit, and ProbeError if the process fails.
    """
    groups: dict[str, Request] = {}
    results = cached_results(preparation.decisions)
    for step in (step for step in preparation.steps if step.config.has("probe")):
        request = start_request(step, results, resolver)
        key = [step.kind, cost_settings(step), list(request.contents.values())]
        groups.setdefault(content_hash(key), request)
    names = [request.step.name for request in groups.values()]
    if names:
        say(f"trying the longest rows of {', '.join(names)}")
    answers = run_probe("probe", "--probe", resolver.runs / "cache", list(groups.values()))
    return {name: answer for name, answer in zip(names, answers, strict=True) if answer}
