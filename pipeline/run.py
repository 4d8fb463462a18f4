"""Plan -> events: runs the steps that have no result yet, side by side where they can, and publishes what they make."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, Timeout

from pipeline import artifacts
from pipeline.artifacts import Artifact, ArtifactError, Hub, Local
from pipeline.console import Console
from pipeline.executors import Job, LocalExecutor
from pipeline.places import Problem, split_key
from pipeline.plan import Plan, Step, beginning, below, changed_input, inputs_of, refresh
from pipeline.provenance import environment
from pipeline.recipe import RecipeError
from pipeline.secret import mask_file, masked
from pipeline.store import Published, Store
from stages.base import BadInput
from stages.names import file_name
from stages.sealed import write_json

POLL_SECONDS = 0.5
"""How often a run looks whether another has made the step that it waits for."""


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
    outcome: dict[str, dict[str, Any]] = field(default_factory=dict)
    paths: dict[Artifact, Path] = field(default_factory=dict)
    _whole: set[str] = field(default_factory=set)
    """Steps whose results were read in full, or made, by this run."""
    _waited: set[str] = field(default_factory=set)
    """Steps that were found to be made by another run."""
    _elsewhere: bool = False
    """Whether a step that could start now is being made by another run."""

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
            files = {name: path for name, s in step.inputs.items() if (path := beginning(s, self.paths))}
            try:
                step.config.check(files)
            except BadInput as error:
                if error.key:
                    key = ("stages", step.stage, *split_key(error.key))
                    problems.append(self.plan.recipe.problem(key, str(error)))
                else:
                    errors += str(error).splitlines()
        if problems or errors:
            raise RecipeError(list(dict.fromkeys(errors)), problems)

    def execute(self, executor: LocalExecutor) -> int:
        """Run what has to run; 0 where all went well, 1 where a step failed. Raises RecipeError before anything ran."""
        waiting = self._todo()
        for step in waiting:
            if lack := executor.lacks(step.config.processes):
                raise self.plan.recipe.error(split_key(f"stages.{step.stage}.launch.num_processes"), lack)
        self.folder.mkdir(parents=True, exist_ok=True)
        for step in self.plan.steps:
            if step.state == "cached":
                self._note(step, "cached")
            elif step not in waiting:
                self._note(step, "not asked for")
        self.store.sweep()
        self._record("running")
        running: dict[str, Running] = {}
        try:
            while waiting or running:
                waiting = self._start_ready(waiting, running, executor)
                if (running or self._elsewhere) and (ended := self._handle(executor, running)):
                    waiting += self._outdated(ended)
        except BaseException:
            executor.stop()
            with contextlib.suppress(OSError):  # the disk may be why we are here
                for work in running.values():
                    self._leave(work)
                    self._note(work.step, "interrupted")
                    mask_file(work.job.log)
                self._record("interrupted")
            raise
        failed = any(state["state"] == "failed" for state in self.outcome.values())
        self._record("failed" if failed else "done")
        return 1 if failed else 0

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
        commits: dict[Artifact, Artifact] = {}
        for step in self.plan.steps:
            for name, source in step.inputs.items():
                if isinstance(source, Hub) and not source.commit:
                    if source not in commits:
                        commits[source] = self._have(artifacts.resolve, source)
                        self.plan.where[commits[source]] = self.plan.where[source]
                    step.inputs[name] = commits[source]

    def _fetch(self, steps: Iterable[Step]) -> None:
        code = [source for step in steps for source in step.with_code]
        for source in (source for step in steps for source in step.inputs.values()):
            if not isinstance(source, Step) and source not in self.paths:
                if not isinstance(source, Local):
                    self.console.say(f"fetching {source}")
                self.paths[source] = self._have(artifacts.fetch, source, self.runs / "cache", source in code)

    def _have(self, function: Callable[..., Any], source: Artifact, *arguments: Any) -> Any:
        """What `function` makes of `source`; where it cannot be had, an error at its place in the recipe."""
        try:
            return function(source, *arguments)
        except ArtifactError as error:
            raise RecipeError([f"{self.plan.where[source]}: {error}"]) from None

    def _start_ready(self, waiting: list[Step], running: dict[str, Running], executor: LocalExecutor) -> list[Step]:
        """Start every step whose needs are met while there is room; return those that still wait."""
        still: list[Step] = []
        unsettled = {step.name for step in waiting} | set(running)
        self._elsewhere = False
        for step in waiting:
            lost = [n.name for n in step.needs if self.outcome.get(n.name, {}).get("state") in ("failed", "skipped")]
            if lost:
                self._note(step, "skipped", error=f"needs {', '.join(lost)}")
                self.console.skipped(step.name, lost)
                continue
            ready = not unsettled & below(step) and executor.has_room(step.config.processes)
            if not (ready and self._start(step, running, executor)):
                still.append(step)
        return still

    def _start(self, step: Step, running: dict[str, Running], executor: LocalExecutor) -> bool:
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
                self._note(step, "cached")
                self.console.say(f"  cached {step.name}: its result is there now")
                lock.release()
                return True
            job = self._job(step)
            executor.start(job)
        except BaseException:
            lock.release()
            raise
        started = datetime.now(UTC).isoformat(timespec="seconds")
        running[step.name] = Running(step, job, lock, time.monotonic(), started)
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

    def _outdated(self, made: Step) -> list[Step]:
        """The cached steps that have to run after all, for `made` came out otherwise than when they were made."""
        outdated = []
        for step in self.plan.steps:
            if step.name in self.chosen and step.state == "cached" and made in step.needs and changed_input(step):
                step.state, step.why, step.published = "run", f"{made.name} came out differently", None
                outdated.append(step)
        self._fetch(outdated)
        return outdated

    def _handle(self, executor: LocalExecutor, running: dict[str, Running]) -> Step | None:
        """Wait for the next event of a running step and act on it; return the step if it has a new result."""
        event = executor.wait(POLL_SECONDS if self._elsewhere else None)
        if event is None:
            return None
        work = running[event.job.step]
        step = work.step
        if event.result is None:
            self.console.progress(step.name, event.done, event.total, event.note)
            return None
        del running[step.name]
        seconds = round(time.monotonic() - work.began, 1)
        mask_file(event.job.log)
        error = masked(event.result.get("error") or "") or self._changed_file(step)
        if error is None:
            try:
                self._publish(work, event.result, seconds)
            except OSError as problem:
                error = f"its result could not be published: {problem}"
        self._leave(work)
        if error is None:
            self._note(step, "done", seconds)
            self.console.finished(step.name, seconds, event.result["metrics"].get("notes", []))
        else:
            self._note(step, "failed", seconds, error)
            self.console.failed(step.name, error, event.job.log, bool(event.result.get("mendable")))
        self._record("running")
        return step if error is None else None

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
                    if artifacts.identity(source, self.plan.hashes.of) == self.plan.contents[source]:
                        continue
                except ArtifactError:
                    pass
                return f"{source.path} was changed while the step ran; run it again"
        return None

    def _job(self, step: Step) -> Job:
        assert step.fingerprint
        folder = self.store.unfinished(step.fingerprint)
        folder.mkdir(parents=True, exist_ok=True)
        job = {
            "recipe": self.plan.recipe.name,
            "step": step.name,
            "kind": step.kind,
            "config": step.config.model_dump(),
            "inputs": {name: self._input(source) for name, source in step.inputs.items()},
            "cache": str((self.runs / "cache").resolve()),
            "lock": str(self.store.lock(f"{step.fingerprint}.worker").lock_file),
        }
        write_json(folder / "job.json", job)
        log = self.folder / "logs" / f"{_file_name(step.name)}.txt"
        return Job(step.name, folder.resolve(), log.resolve(), step.config.processes)

    def _input(self, source: Step | Artifact) -> dict[str, Any]:
        """What a worker is told of an input, with all it was made from."""
        if not isinstance(source, Step):
            path = str(self.paths[source].resolve()) if source in self.paths else str(source)
            return {"path": path, "fingerprint": self.plan.contents.get(source) or "", "inputs": {}}
        assert source.published is not None
        return {
            "path": str(source.published.path.resolve()),
            "step": source.name,
            "kind": source.kind,
            "fingerprint": source.fingerprint,
            "config": source.config.model_dump(),
            "metrics": source.published.manifest["metrics"],
            "inputs": {name: self._input(inner) for name, inner in source.inputs.items()},
        }

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

    def _note(self, step: Step, state: str, seconds: float | None = None, error: str | None = None) -> None:
        path = step.published.path if step.published else None
        self.outcome[step.name] = {
            "step": step.name,
            "kind": step.kind,
            "state": state,
            "fingerprint": step.fingerprint,
            "path": os.path.relpath(path, self.runs) if path else None,
            "seconds": seconds,
            "error": error,
        }
        link = self.folder / _file_name(step.name)
        if path:
            _link(link, path)
        elif link.is_symlink():
            link.unlink()  # it leads to an older result, of other settings

    def _record(self, status: str) -> None:
        """Write run.json: the state of every step, in the plan's order."""
        steps = [self.outcome[step.name] for step in self.plan.steps if step.name in self.outcome]
        write_json(self.folder / "run.json", {"recipe": self.plan.recipe.name, "status": status, "steps": steps})


def reports_of(plan: Plan) -> list[tuple[str, dict[str, Any]]]:
    """The step name and metrics of every report that is made, and of what the plan's results are now."""
    made = [step for step in plan.steps if step.config.makes == "report" and step.published]
    stale = {step.name for step in plan.steps if step.published is None or changed_input(step)}
    return [
        (step.name, step.published.manifest["metrics"])
        for step in made
        if step.published and not stale & {step.name, *below(step)}
    ]


def run_record(runs: Path, recipe: str) -> dict[str, Any]:
    """The last run.json of a recipe."""
    return json.loads((runs / recipe / "run.json").read_text(encoding="utf-8"))


def _file_name(step: str) -> str:
    """A step's name as one file name: models found by reference have slashes in theirs, and any length."""
    return file_name(step)


def _link(link: Path, target: Path) -> None:
    """Let `link` lead to `target`, relative, whatever it was before."""
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target.resolve(), link.parent.resolve()))
    temporary.replace(link)
