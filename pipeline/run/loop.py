"""Plan -> events: runs the steps that have no result yet, side by side where they can, and publishes what they make."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from pipeline.console.console import Console
from pipeline.plan.cache import changed_input, inputs_of, refresh
from pipeline.plan.planner import Plan, Step, start_model_path
from pipeline.recipe.loader import RecipeError
from pipeline.recipe.nodes import Problem, split_key
from pipeline.run.job import LOGS, write_job
from pipeline.run.local_executor import Executor, Job
from pipeline.run.os_errors import explain_os_error
from pipeline.run.run_record import Record, counted, in_words, seconds_left
from pipeline.run.schedule import Schedule
from pipeline.store import references
from pipeline.store.provenance import environment
from pipeline.store.references import BadReferenceError, Hub, Local, Reference
from pipeline.store.secrets import mask_file, mask_secrets
from pipeline.store.store import Published, Store
from stages.base import UserError
from stages.records.past_runs import FILE
from stages.system.file_names import file_name

POLL_SECONDS = 0.5
"""How often a run looks whether another has made the step that it waits for."""

UNMADE = ("failed", "skipped", "interrupted", "waiting")
"""States of steps that were to be made and have no result."""


@dataclass(frozen=True)
class Running:
    """A step whose worker is at work."""

    step: Step
    job: Job
    lock: BaseFileLock
    """Held for as long as it is made."""
    began: float
    """On the monotonic clock, in seconds."""
    started: str
    """Time of day, ISO 8601, UTC."""


@dataclass
class Run:
    """One run of a plan: what was asked for, and how each step went."""

    plan: Plan
    store: Store
    runs: Path
    """The folder given by --runs."""
    console: Console
    chosen: set[str]
    """The names of the steps that may run; the others must be cached where they are needed."""
    forced: set[str]
    """The names of the steps that run although they are cached."""
    paths: dict[Reference, Path] = field(default_factory=dict)
    paid_requests: list[tuple[Step, str]] = field(default_factory=list)
    """What steps will ask of a service that may charge for it, once prepared."""
    record: Record = field(init=False)
    _commits: dict[Reference, Reference] = field(default_factory=dict)
    """A reference to a branch on the hub -> the same at its commit."""
    _whole: set[str] = field(default_factory=set)
    """Steps whose results were read in full, or made, by this run."""
    _fresh: set[str] = field(default_factory=set)
    """Steps whose results came to be while this run went on."""
    _waited: set[str] = field(default_factory=set)
    """Steps that were found to be made by another run."""
    _elsewhere: bool = False
    """Whether a step that could start now is being made by another run."""

    def __post_init__(self) -> None:
        self.record = Record(self.folder / FILE, self.plan.recipe.name, 1)

    @property
    def folder(self) -> Path:
        """Where this recipe's links, logs and run.json lie."""
        return self.runs / self.plan.recipe.name

    def prepare(self) -> None:
        """Find out all that can be known wrong before anything runs. Raises RecipeError; writes only to the cache."""
        self._resolve()
        refresh(self.plan, self.store, self.forced)
        self._read_inputs()
        self.plan.hashes.save()
        self.plan.require_inputs(self.chosen)
        todo = self._todo()
        self._fetch(todo)
        problems: list[Problem] = []
        errors: list[str] = []
        for step in todo:
            files = {name: path for name, s in step.inputs.items() if (path := start_model_path(s, self.paths))}
            try:
                step.config.check(files)
                self.paid_requests += [(step, asked) for asked in step.config.paid_requests(files)]
            except UserError as error:
                if error.key:
                    key = ("stages", step.stage, *split_key(error.key))
                    problems.append(step.recipe.problem(key, str(error)))
                else:
                    errors += str(error).splitlines()
        if problems or errors:
            raise RecipeError(list(dict.fromkeys(errors)), problems)

    def prefetch(self) -> None:
        """Fetch all that the chosen steps refer to. Raises RecipeError."""
        self._resolve()
        self._fetch([step for step in self.plan.steps if step.name in self.chosen])

    def execute(self, executor: Executor) -> int:
        """Run what has to run; 0 where all went well, 1 where a step failed. Raises RecipeError before anything ran."""
        for step in self._todo():
            if lack := executor.unmet_requirement(step.config):
                raise step.recipe.error(split_key(f"stages.{step.stage}.{lack[0]}"), lack[1])
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record.width = executor.width
        for step in self.plan.steps:
            self._note(step, "cached" if step.state == "cached" else "not asked for")
        for step in self._todo():
            self._note(step, "waiting")
        self.store.sweep()
        self.record.write("running")
        if self._todo():
            self.console.begin(self.record.steps, self.folder / LOGS)
        schedule, running = Schedule(self.plan.steps), dict[str, Running]()
        try:
            while self._reach(schedule) or running:
                self._start_ready(schedule, running, executor)
                if running or self._elsewhere:
                    self._handle(executor, schedule, running)
        except BaseException:
            executor.stop()
            with contextlib.suppress(OSError):  # the disk may be why we are here
                for work in running.values():
                    self._leave(work)
                    self._note(work.step, "interrupted")
                    mask_file(work.job.log)
                self.record.write("interrupted")
            raise
        failed = any(state["state"] == "failed" for state in self.record.steps.values())
        self.record.write("failed" if failed else "done")
        return 1 if failed else 0

    def unmade(self) -> list[str]:
        """The steps that were to be made and have no result."""
        return [step["step"] for step in self.record.steps.values() if step["state"] in UNMADE]

    def _todo(self) -> list[Step]:
        return [step for step in self.plan.steps if step.name in self.chosen and step.state == "run"]

    def _read_inputs(self) -> None:
        """Read in full the results that steps about to run start from; a damaged one is made again first."""
        damaged: dict[str, str] = {}
        while unread := self._unread(self._todo()):
            for name, result in unread.items():
                if damage := result.damage():
                    damaged[name] = damage
                else:
                    self._whole.add(name)
            refresh(self.plan, self.store, self.forced, damaged)

    def _unread(self, steps: Iterable[Step]) -> dict[str, Published]:
        """The results that `steps` start from and nobody has read in full yet."""
        needs = {need.name: need.published for step in steps for need in step.needs}
        return {name: result for name, result in needs.items() if result and name not in self._whole}

    def _resolve(self) -> None:
        """Replace references to a branch on the hub by the commit it stands at now."""
        commits = self._commits
        for step in self.plan.steps:
            for name, source in step.inputs.items():
                if isinstance(source, Hub) and not source.commit:
                    if source not in commits:
                        commits[source] = self._have(references.resolve, source, self.console.say)
                        self.plan.where[commits[source]] = self.plan.where[source]
                    step.inputs[name] = commits[source]

    def _fetch(self, steps: Iterable[Step]) -> None:
        code = [source for step in steps for source in step.with_code]
        for source in (source for step in steps for source in step.inputs.values()):
            if not isinstance(source, Step) and source not in self.paths:
                if not isinstance(source, Local):
                    self.console.say(f"fetching {source}")
                self.paths[source] = self._have(references.fetch, source, self.runs / "cache", source in code)
                for named in (named for named, pinned in self._commits.items() if pinned == source):
                    references.cache_commit(named, source)

    def _have(self, function: Callable[..., Any], source: Reference, *arguments: Any) -> Any:
        """What `function` makes of `source`; where it cannot be had, an error at its place in the recipe."""
        try:
            return function(source, *arguments)
        except BadReferenceError as error:
            raise RecipeError([f"{self.plan.where[source]}: {error}"]) from None

    def _reach(self, schedule: Schedule) -> bool:
        """Decide on the steps whose needs are settled now; whether any step may start."""
        for step in schedule.reached():
            lost = [need.name for need in step.needs if self._state(need) in ("failed", "skipped")]
            if self._state(step) == "waiting" and lost:
                self._note(step, "skipped", error=f"needs {', '.join(lost)}")
                self.console.skipped(step.name, lost)
                schedule.settle(step)
            elif self._state(step) == "waiting" or self._is_outdated(step):
                schedule.put(step)
            else:
                schedule.settle(step)
        return bool(schedule)

    def _state(self, step: Step) -> str:
        return self.record.steps[step.name]["state"]

    def _start_ready(self, schedule: Schedule, running: dict[str, Running], executor: Executor) -> None:
        """Start the steps that may start while there is room."""
        held: list[Step] = []
        self._elsewhere = False
        while executor.has_room() and (step := schedule.take()):
            fits = executor.has_room(step.config.resources, step.config.processes)
            if not (fits and self._start(step, schedule, running, executor)):
                held.append(step)
        schedule.put_back(held)

    def _start(self, step: Step, schedule: Schedule, running: dict[str, Running], executor: Executor) -> bool:
        """Start the step, or take the result that has appeared since it was planned; False while another makes it.

        That may be another run, or a step of this one that is the same under another name.
        """
        assert step.fingerprint
        lock = self.store.lock(step.fingerprint)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self._elsewhere = True
            if step.name not in self._waited and all(w.step.fingerprint != step.fingerprint for w in running.values()):
                self._waited.add(step.name)
                self.console.say(f"  wait   {step.name}: another run is making it")
            return False
        try:
            if self._appeared(step):
                self._fresh.add(step.name)
                self._note(step, "cached")
                self.console.say(f"  cached {step.name}: its result is there now")
                schedule.settle(step)
                lock.release()
                return True
            job = write_job(step, self.plan, self.paths, self.store, self.runs)
            executor.start(job)
        except BaseException:
            lock.release()
            raise
        started = datetime.now(UTC).isoformat(timespec="seconds")
        running[step.name] = Running(step, job, lock, time.monotonic(), started)
        self._note(step, "running")
        self.console.how_far(self._how_far)
        self.console.started(step.name, step.why)
        return True

    def _appeared(self, step: Step) -> bool:
        """Whether a result of the step was published since it was planned, or can be, being complete."""
        assert step.fingerprint
        if step.name in self.forced:
            return False
        step.published = self.store.recover(step.fingerprint) or self.store.find(step.kind, step.fingerprint)
        if step.published and (changed_input(step) or step.published.damage()):
            step.published = None
        return step.published is not None

    def _is_outdated(self, step: Step) -> bool:
        """Whether a cached step has to run after all, for what it needs came out otherwise than when it was made."""
        if step.state != "cached" or step.name not in self.chosen or not any(n.name in self._fresh for n in step.needs):
            return False
        if not (changed := changed_input(step)):
            return False
        step.state, step.why, step.published = "run", f"{changed} came out differently", None
        self._note(step, "waiting")
        self._fetch([step])
        return True

    def _handle(self, executor: Executor, schedule: Schedule, running: dict[str, Running]) -> None:
        """Wait for the next event of a running step and act on it."""
        event = executor.wait(POLL_SECONDS if self._elsewhere else None)
        if event is None:
            return
        work = running[event.job.step]
        step, seconds = work.step, round(time.monotonic() - work.began, 1)
        if event.result is None:
            told = event.done, event.total, event.note
            self.record.steps[step.name] |= {"seconds": seconds, "progress": told}
            self.console.progress(step.name, *told)
            if self.record.write_if_due():
                self.console.how_far(self._how_far)
            return
        del running[step.name]
        mask_file(event.job.log)
        error = mask_secrets(event.result.get("error") or "") or self._changed_file(step)
        if error is None:
            try:
                self._publish(work, event.result, seconds)
            except OSError as problem:
                error = explain_os_error(problem, work.job.folder) or f"its result could not be published: {problem}"
        self._leave(work)
        schedule.settle(step)
        self._note(step, "done" if error is None else "failed", seconds, error)
        if error is None:
            self.console.finished(step.name, seconds, event.result["metrics"].get("notes", []), self._how_far())
        else:
            self.console.failed(step.name, error, event.job.log, bool(event.result.get("is_user_error")))
        self.record.write_if_due()

    def _how_far(self) -> str:
        """`12 of 107 steps done, 95 waiting, about 20 min left`."""
        steps = list(self.record.steps.values())
        left = seconds_left(steps, self.record.width)
        return counted(steps) + (f", about {in_words(left)} left" if left else "")

    def _leave(self, work: Running) -> None:
        """Let go of a step that nothing is at work on any more."""
        assert work.step.fingerprint
        self.store.tidy(work.step.fingerprint)
        work.lock.release()

    def _changed_file(self, step: Step) -> str | None:
        """An error where a file that the step read is not what it was when its fingerprint was taken."""
        for source in step.inputs.values():
            if isinstance(source, Local):
                try:
                    if references.content_hash(source, self.plan.hashes.hash_file) == self.plan.contents[source]:
                        continue
                except BadReferenceError:
                    pass
                return f"{source.path} was changed while the step ran; run it again"
        return None

    def _publish(self, work: Running, result: dict[str, Any], seconds: float) -> None:
        """Publish what the step's worker left. Raises OSError."""
        step = work.step
        manifest = {
            "step": step.name,
            "kind": step.kind,
            "version": step.config.version,
            "fingerprint": step.fingerprint,
            "config": step.config.model_dump(),
            "inputs": inputs_of(step, self.plan),
            "metrics": result["metrics"],
            "environment": environment() | result["machine"],
            "started": work.started,
            "seconds": seconds,
        }
        step.published = self.store.publish(work.job.folder / "out", manifest, result["outputs"])
        self._whole.add(step.name)
        self._fresh.add(step.name)

    def _note(self, step: Step, state: str, seconds: float | None = None, error: str | None = None) -> None:
        path = step.published.path if step.published else None
        self.record.steps[step.name] = {
            "step": step.name,
            "kind": step.kind,
            "labels": dict(step.labels),
            "state": state,
            "fingerprint": step.fingerprint,
            "path": os.path.relpath(path, self.runs) if path else None,
            "seconds": seconds,
            "error": error,
            "progress": None,
        }
        link = self.folder / file_name(step.name)
        if path:
            _link(link, path)
        elif link.is_symlink():
            link.unlink()  # it leads to an older result, of other settings


def _link(link: Path, target: Path) -> None:
    """Let `link` lead to `target`, relative, whatever it was before."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    temporary.replace(link)
